"""Attention of several positions, its weights by numpy.

On the CPU mlx makes attention of single operations, and its softmax is unvectorised (12 ns an element). Here numpy
computes the weights, mask and scale included, with their own gradient.

Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Ainslie et al. 2023, arXiv:2305.13245 (grouped heads).
"""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.cpu.products import Floats
from mlx_ppo.compute.needs import Work, outside, planned

silent = np.errstate(over="ignore", invalid="ignore")  # what isn't finite is found, and said, further on
_LOWEST = np.finfo(np.float32).min  # of a score that doesn't count, as in mlx: a row without any is uniform


_of_mlx = mx.fast.scaled_dot_product_attention


def attend(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: str | mx.array | None = None, **others: Any
) -> mx.array:
    """What `mx.fast.scaled_dot_product_attention` gives, [B, H, N, D]; in numpy for several positions in float32.

    Args:
        q: [B, H, N, D].
        k: [B, K, S, D]; K divides H.
        v: [B, K, S, D].
        scale: of the products.
        mask: "causal", for the last N of S positions; or one of booleans or to be added, broadcast to [B, H, N, S].
        others: what else mlx takes; then mlx computes.
    """
    rows, heads, count, _ = q.shape
    groups, length = k.shape[1:3]
    others = {name: value for name, value in others.items() if value is not None}
    if count == 1 or mask is None or others or {q.dtype, k.dtype, v.dtype} != {mx.float32}:
        return _of_mlx(q, k, v, scale=scale, mask=mask, **others)
    if isinstance(mask, str):
        mask = mx.tri(count, length, length - count, mx.bool_)
    together = (rows, groups, heads // groups * count)
    scores = (q.reshape(*together, -1) @ k.swapaxes(-1, -2)).reshape(rows, heads, count, length)
    weights: mx.array = _weights(scores, mask, mx.array(scale))
    return (weights.reshape(*together, length) @ v).reshape(rows, heads, count, v.shape[-1])


def softmax_in_place(scores: Floats) -> None:
    """Over the last axis."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)


@mx.custom_function
@silent
def _weights_numpy(scores: mx.array, mask: mx.array, scale: mx.array) -> mx.array:
    values, allowed, factor = np.asarray(scores), np.asarray(mask), np.float32(np.asarray(scale))
    allowed = np.broadcast_to(allowed, values.shape)
    weights = np.empty(values.shape, np.float32)
    for row, counts, out in zip(values, allowed, weights, strict=True):  # a row of the batch, which fits the cache
        np.multiply(row, factor, out=out)
        if counts.dtype == np.bool_:
            np.putmask(out, ~counts, _LOWEST)
        else:
            out += counts
        softmax_in_place(out)
    return mx.array(weights)


@_weights_numpy.vjp
@silent
def _weights_numpy_vjp(
    primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    _, mask, scale = primals
    given, made, factor = np.asarray(cotangent), np.asarray(weights), np.float32(np.asarray(scale))
    allowed = np.broadcast_to(np.asarray(mask), made.shape)
    gradient = np.empty(made.shape, np.float32)
    for by, weight, counts, out in zip(given, made, allowed, gradient, strict=True):
        np.multiply(by, weight, out=out)
        out -= weight * out.sum(axis=-1, keepdims=True)
        out *= factor
        if counts.dtype == np.bool_:
            np.putmask(out, ~counts, 0)
    return mx.array(gradient), mx.zeros_like(mask), mx.zeros_like(scale)


def _planned(scores: mx.array, mask: mx.array, scale: mx.array) -> mx.array:
    """Selecting has a gradient of the same shape. Numpy holds what it returns as well."""
    anywhere = mx.broadcast_to(mx.array(True), scores.shape)
    work = Work(scores.nbytes, scores.nbytes + scores.nbytes // len(scores))
    return mx.where(outside(anywhere, [scores, mask, scale], work), scores, mx.zeros(()))


_weights = planned(_weights_numpy, _planned)
