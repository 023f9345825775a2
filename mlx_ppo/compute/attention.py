"""Attention as the models of mlx-lm ask for it, and what takes its place in passes over whole rows and in plans."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx


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
    SmolLM2-135M had a cosine of 0.984 with the exact one; with this attention it has 0.999.

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
    wide = {name: it.astype(mx.float32) if _is_half(it) else it for name, it in how.items()}
    return attend(*(array.astype(mx.float32) for array in given), **wide).astype(given[0].dtype)


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
