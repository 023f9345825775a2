"""Attention of passes over whole rows: in half precision in float32, unless its gradient is a kernel."""

import functools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.compute import attention
from mlx_ppo.compute.attention import attending_by, attention_with_gradient, model_attention

SHAPE, OF_KEYS, SCALE = (2, 4, 24, 16), (2, 2, 24, 16), 0.25
HALF = [mx.bfloat16, mx.float16]


def given(dtype: mx.Dtype) -> list[mx.array]:
    """Queries, and keys and values of half as many heads, whose scores are some tens, as those of trained models."""
    mx.random.seed(0)
    shapes = (SHAPE, OF_KEYS, OF_KEYS)
    factors = (6.0, 6.0, 1.0)
    return [(factor * mx.random.normal(shape)).astype(dtype) for factor, shape in zip(factors, shapes, strict=True)]


def gradients(attend: Any, arrays: list[mx.array], mask: Any) -> list[np.ndarray]:
    """By queries, keys and values [n] each, of a sum with fixed weights."""
    weights = mx.random.normal(SHAPE, key=mx.random.key(1))

    def total(*each: mx.array) -> mx.array:
        return (attend(*each, scale=SCALE, mask=mask).astype(mx.float32) * weights).sum()

    return [np.array(one.astype(mx.float32)).ravel() for one in mx.grad(total, (0, 1, 2))(*arrays)]


def cosines(first: list[np.ndarray], second: list[np.ndarray]) -> list[float]:
    return [float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in zip(first, second, strict=True)]


MASKS = {
    "none": lambda dtype: None,
    "causal": lambda dtype: "causal",
    "bool": lambda dtype: mx.tri(24, dtype=mx.bool_),
    "of rows": lambda dtype: mx.broadcast_to(mx.tri(24, dtype=mx.bool_), (2, 1, 24, 24)),
    "of heads": lambda dtype: mx.broadcast_to(mx.tri(24, dtype=mx.bool_), (2, 4, 24, 24)),
    "added": lambda dtype: mx.where(mx.tri(24, dtype=mx.bool_), 0.0, -1e4).astype(dtype),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_are_those_of_float32_with_the_same_numbers(dtype: mx.Dtype, mask: str) -> None:
    arrays, own = given(dtype), mx.fast.scaled_dot_product_attention
    wide = gradients(own, [array.astype(mx.float32) for array in arrays], MASKS[mask](mx.float32))

    def here(*each: mx.array, **how: Any) -> mx.array:
        return attention_with_gradient(own, *each, planned=False, **how)

    found = gradients(here, arrays, MASKS[mask](dtype))
    assert min(cosines(found, wide)) > 0.9999
    if dtype == mx.bfloat16:  # by mlx's single operations they aren't
        assert min(cosines(gradients(own, arrays, MASKS[mask](dtype)), wide)) < 0.999
    assert here(*arrays, scale=SCALE, mask=None).dtype == dtype


def test_a_kernel_and_float32_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[mx.Dtype] = []

    def own(q: mx.array, *rest: mx.array, **how: Any) -> mx.array:
        seen.append(q.dtype)
        return mx.fast.scaled_dot_product_attention(q, *rest, **how)

    attention_with_gradient(own, *given(mx.float32), planned=False, scale=SCALE, mask=None)
    assert seen == [mx.float32]
    monkeypatch.setattr(attention, "_traceable", lambda *_: False)
    attention_with_gradient(own, *given(mx.bfloat16), planned=False, scale=SCALE, mask=None)
    assert seen == [mx.float32, mx.bfloat16]


def test_within_itself_it_is_put_in_place_once() -> None:
    before = mx.fast.scaled_dot_product_attention
    with attending_by(functools.partial(attention_with_gradient, model_attention(), planned=False)):
        assert model_attention() is before and mx.fast.scaled_dot_product_attention is not before
    assert mx.fast.scaled_dot_product_attention is before
