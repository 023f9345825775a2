"""Metal's rounding, imitated on a CPU.

From mlx's source (mlx/backend/metal, read up to 0.32.2), not from a Mac. In half precision:

- products are summed up in float32 and rounded to the type that is stored;
- attention is one kernel, rounded once, outside of gradients, and single operations, rounded one by one, where a
  gradient is traced (`detail::in_grad_tracing()` in mlx/fast.cpp);
- quantised products read exact weights for few rows, and weights rounded to the stored type for many.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_FEW = 12  # rows up to which a quantised product is one of a matrix and vectors
_HALF = (mx.bfloat16, mx.float16)

attended = {"fused": 0, "unfused": 0}  # calls in half precision
_depth = [0]  # gradients that are being traced


def install() -> None:
    """Put the imitation in place, for the life of the process."""
    for owner, name, imitation in _imitations():
        setattr(owner, name, imitation)


@contextmanager
def imitated() -> Iterator[None]:
    """The imitation, for the length of a `with` block; also within itself."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _imitations()]
    install()
    try:
        yield
    finally:
        for owner, name, real in before:
            setattr(owner, name, real)


def _imitations() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Whose what is replaced by which; none where the imitation is in place."""
    if getattr(mx.fast.scaled_dot_product_attention, "imitates", False):
        return []
    made = [(mx, name, _counting_made(getattr(mx, name))) for name in ("value_and_grad", "grad")]
    called = [(mx, name, _counting(getattr(mx, name))) for name in ("vjp", "jvp")]
    return [
        *made,
        *called,
        (mx.fast, "scaled_dot_product_attention", _attention(mx.fast.scaled_dot_product_attention)),
        (mx, "quantized_matmul", _quantised(mx.quantized_matmul)),
        (nn.Linear, "__call__", _linear),
        (nn.Embedding, "as_linear", _as_linear),
    ]


@contextmanager
def _within() -> Iterator[None]:
    _depth[0] += 1
    try:
        yield
    finally:
        _depth[0] -= 1


def _counting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, during which a gradient is traced."""

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        with _within():
            return function(*given, **named)

    return call


def _counting_made(make: Callable[..., Any]) -> Callable[..., Any]:
    """What makes functions, during which a gradient is traced."""

    @functools.wraps(make)
    def call(*given: Any, **named: Any) -> Any:
        return _counting(make(*given, **named))

    return call


def _product(x: mx.array, matrix: mx.array) -> mx.array:
    return (x.astype(mx.float32) @ matrix.astype(mx.float32)).astype(x.dtype)


def _linear(self: nn.Linear, x: mx.array) -> mx.array:
    y = _product(x, self["weight"].T)
    return y + self["bias"] if "bias" in self else y


def _as_linear(self: nn.Embedding, x: mx.array) -> mx.array:
    return _product(x, self["weight"].T)


def _quantised(real: Callable[..., mx.array]) -> Callable[..., mx.array]:
    @functools.wraps(real)
    def product(
        x: mx.array,
        w: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        transpose: bool = True,
        group_size: int = 64,
        bits: int = 4,
        **rest: Any,
    ) -> mx.array:
        if x.dtype not in _HALF or biases is None:
            return real(x, w, scales, biases, transpose, group_size, bits, **rest)
        wide = (array.astype(mx.float32) for array in (scales, biases))
        matrix = mx.stop_gradient(mx.dequantize(w, *wide, group_size=group_size, bits=bits))
        if x.size // x.shape[-1] >= _FEW:
            matrix = matrix.astype(x.dtype)
        return _product(x, matrix.T if transpose else matrix)

    return product


def _attention(real: Callable[..., mx.array]) -> Callable[..., mx.array]:
    @functools.wraps(real)
    def attend(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **rest: Any
    ) -> mx.array:
        if q.dtype not in _HALF or sinks is not None:
            return real(q, k, v, scale=scale, mask=mask, sinks=sinks, **rest)
        attended["unfused" if _depth[0] else "fused"] += 1
        if _depth[0]:
            return _unfused(q, k, v, scale, mask)
        added = isinstance(mask, mx.array) and mask.dtype != mx.bool_
        wide = (array.astype(mx.float32) for array in (q, k, v))
        return real(*wide, scale=scale, mask=mask.astype(mx.float32) if added else mask).astype(q.dtype)

    attend.imitates = True  # type: ignore[attr-defined]
    return attend


def _unfused(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any) -> mx.array:
    """The fallback of mlx/fast.cpp: every result is rounded. Grouped heads share their keys and values."""
    batch, heads, count, _ = q.shape
    groups, length = k.shape[1], k.shape[2]
    q = (q * mx.array(scale, q.dtype)).reshape(batch, groups, heads // groups, count, -1)
    scores = _product(q, k[:, :, None].swapaxes(-1, -2)).reshape(batch, heads, count, length)
    if isinstance(mask, str):
        mask = mx.tri(count, length, length - count, mx.bool_)
    if mask is not None and mask.dtype == mx.bool_:
        scores = mx.where(mask, scores, mx.array(mx.finfo(q.dtype).min, q.dtype))
    elif mask is not None:
        scores = scores + mask.astype(q.dtype)
    masses = mx.softmax(scores, axis=-1, precise=True).reshape(batch, groups, heads // groups, count, length)
    return _product(masses, v[:, :, None]).reshape(batch, heads, count, -1)
