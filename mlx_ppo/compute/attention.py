"""Attention as the models of mlx-lm ask for it, and what takes its place in passes over whole rows and in plans."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_ppo.compute.needs import planned as traced_as
from mlx_ppo.compute.needs import planned_gradient


@contextmanager
def attending_by(function: Callable[..., mx.array]) -> Iterator[None]:
    """Let mlx-lm's models compute attention by another function for the length of a `with` block."""
    before = mx.fast.scaled_dot_product_attention
    try:
        mx.fast.scaled_dot_product_attention = function
        yield
    finally:
        mx.fast.scaled_dot_product_attention = before


def kernel_attention(q: mx.array, k: mx.array, v: mx.array, **_: Any) -> mx.array:
    """Stands for a kernel while a plan is made: an array like q, whose gradient makes ones like k and v."""
    return q + (k[..., :1, :1].sum() + v[..., :1, :1].sum())


def model_attention() -> Callable[..., mx.array]:
    """Mlx's attention, or what a test has put in its place; not this engine's own, which is there within a pass."""
    found: Any = mx.fast.scaled_dot_product_attention
    while isinstance(found, functools.partial):
        found = found.args[0]
    attend: Callable[..., mx.array] = found
    return attend


def attention_with_gradient(attend: Callable[..., mx.array], *given: mx.array, planned: bool, **how: Any) -> mx.array:
    """Mlx's own, as its device has it, but in float32 where its gradient isn't a kernel, which sums so by itself.

    The single operations that mlx takes then round every score to the type of the queries. In bfloat16 a score of
    some tens is off by a tenth, and so are the masses. Under an imitation of that rounding the policy's gradient of
    SmolLM2-135M had a cosine of 0.984 with the exact one; with this attention it has 0.999. No score is kept for the
    gradient, which computes them again (Dao et al. 2022, arXiv:2205.14135, section 3.1, without its tiles).

    Args:
        attend: mlx's.
        given: queries, keys and values [B, H, T, D].
        planned: where the gradient is a kernel, which mlx can't trace, take what stands for one. Source: mlx 0.32.4,
            whose export knows no ScaledDotProductAttentionVJP; CUDA has it for lengths that 128 divides.
        how: scale, mask, sinks.
    """
    half = _is_half(given[0])
    if half or planned:
        known = tuple((name, _Like(it.shape, it.dtype) if isinstance(it, mx.array) else it) for name, it in how.items())
        if not _traceable(attend, tuple(_Like(array.shape, array.dtype) for array in given), known):
            return (kernel_attention if planned else attend)(*given, **how)
    if not half:
        return attend(*given, **how)
    if how.get("sinks") is not None:
        wide = {name: it.astype(mx.float32) if _is_half(it) else it for name, it in how.items()}
        return attend(*(array.astype(mx.float32) for array in given), **wide).astype(given[0].dtype)
    return _in_float32(attend, *given, scale=how["scale"], mask=how.get("mask"))


def _in_float32(
    attend: Callable[..., mx.array], q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any
) -> mx.array:
    """Attention [B, H, T, D] in float32, of which the gradient keeps what is given and what comes out."""
    masks = [mask] if isinstance(mask, mx.array) else []

    def forward(q: mx.array, k: mx.array, v: mx.array, *masks: mx.array) -> mx.array:
        wide = [array.astype(mx.float32) for array in (q, k, v)]
        how = masks[0].astype(mx.float32) if masks and _is_half(masks[0]) else masks[0] if masks else mask
        return attend(*wide, scale=scale, mask=how).astype(q.dtype)

    def gradient(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], results: Sequence[mx.array]
    ) -> Sequence[mx.array]:
        q, k, v, *masks = mx.depends(list(primals), list(cotangents))  # or all blocks' scores would be there at once
        groups, shared = k.shape[1], q.shape[1] // k.shape[1]

        def by_group(array: mx.array) -> mx.array:
            return array.astype(mx.float32).reshape(len(array), groups, -1, *array.shape[2:])

        queries, keys, values = by_group(q) * scale, by_group(k), by_group(v)
        masses = mx.softmax(_masked(queries @ keys.swapaxes(-1, -2), masks[0] if masks else mask, shared), axis=-1)
        given, found = by_group(cotangents[0]), by_group(results[0])
        by_scores = masses * (given @ values.swapaxes(-1, -2) - (given * found).sum(axis=-1, keepdims=True))
        of_each = (
            (by_scores @ keys) * scale,
            (by_scores.swapaxes(-1, -2) @ queries).sum(axis=2),
            (masses.swapaxes(-1, -2) @ given).sum(axis=2),
        )
        own = [one.reshape(array.shape).astype(array.dtype) for one, array in zip(of_each, (q, k, v), strict=True)]
        return [*own, *map(mx.zeros_like, masks)]

    made: Any = mx.custom_function(forward)
    made.vjp(lambda primals, cotangent, result: gradient(primals, [cotangent], [result]))
    key = (
        "attention",
        scale,
        *(_Like(array.shape, array.dtype) for array in (q, k, v, *masks)),
        mask if not masks else 0,
    )

    def stand_in(*primals: mx.array) -> mx.array:
        found: mx.array = planned_gradient(lambda *given: [forward(*given)], gradient, primals, key)[0]
        return found

    result: mx.array = traced_as(made, stand_in)(q, k, v, *masks)
    return result


def _masked(scores: mx.array, mask: Any, shared: int) -> mx.array:
    """Scores [B, G, H / G, T, L] with a mask as mlx's attention takes it, for heads by H."""
    if isinstance(mask, str):
        count, length = scores.shape[-2:]
        mask = mx.tri(count, length, length - count, mx.bool_)
    if mask is None:
        return scores
    if mask.ndim == 4:  # of [B or 1, H or 1, T, L]
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(len(mask), -1, shared, *mask.shape[2:])
    elif mask.ndim == 3:
        mask = mask[:, None] if len(mask) == 1 else mask.reshape(-1, shared, *mask.shape[1:])
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, mx.finfo(mx.float32).min)
    added: mx.array = scores + mask.astype(mx.float32)
    return added


def _is_half(value: Any) -> bool:
    return isinstance(value, mx.array) and value.dtype in (mx.bfloat16, mx.float16)


class _Like(NamedTuple):
    """Of an array."""

    shape: tuple[int, ...]
    dtype: mx.Dtype


@functools.lru_cache(maxsize=1024)
def _traceable(attend: Callable[..., mx.array], given: tuple[_Like, ...], how: tuple[tuple[str, Any], ...]) -> bool:
    """Whether mlx can tell of what the gradient of attention consists for arrays of such shapes."""
    like = [mx.zeros(*one) for one in given]
    fixed = {name: mx.zeros(*it) if isinstance(it, _Like) else it for name, it in how}

    def gradient(*arrays: mx.array) -> Sequence[mx.array]:
        found: Sequence[mx.array] = mx.grad(lambda *each: attend(*each, **fixed).sum(), (0, 1, 2))(*arrays)
        return found

    try:
        mx.export_function(lambda _: None, gradient, *like)
    except ValueError as error:
        if "Unable to get state" not in str(error):
            raise
        return False
    return True
