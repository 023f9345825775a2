from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.compute.cpu.attention import attend
from mlx_ppo.compute.cpu.engine import CpuEngine
from mlx_ppo.compute.portable import PortableEngine
from mlx_ppo.models.load import load_trunk

MLX = mx.fast.scaled_dot_product_attention
Masks = dict[str, str | mx.array]


def drawn(seed: int, *shape: int) -> mx.array:
    return 2 * mx.random.normal(shape, key=mx.random.key(seed))


def masks(rows: int, count: int, length: int) -> Masks:
    generator = np.random.default_rng(0)
    padding = np.arange(length) >= generator.integers(0, length - count + 1, (rows, 1, 1, 1))
    causal = np.arange(length) <= np.arange(length - count, length)[:, None]
    nothing = padding & causal
    nothing[0, :, 0] = False  # as of a padded position
    return {
        "causal": "causal",
        "padding": mx.array(padding & causal),
        "a row of nothing": mx.array(nothing),
        "added": mx.array(generator.normal(size=(count, length)).astype(np.float32)),
    }


@pytest.mark.parametrize("shape", [(2, 6, 2, 5, 9), (1, 4, 4, 7, 7), (3, 4, 1, 2, 300)])
@pytest.mark.parametrize("kind", ["causal", "padding", "a row of nothing", "added"])
def test_values_and_gradients_are_mlx_own(shape: tuple[int, ...], kind: str) -> None:
    rows, heads, groups, count, length = shape
    given = [drawn(0, rows, heads, count, 8), drawn(1, rows, groups, length, 8), drawn(2, rows, groups, length, 6)]
    weight, mask = drawn(3, rows, heads, count, 6), masks(rows, count, length)[kind]

    def of(function: Callable[..., mx.array]) -> tuple[mx.array, tuple[mx.array, ...]]:
        def loss(*arrays: mx.array) -> mx.array:
            return (weight * function(*arrays, scale=0.4, mask=mask)).sum()

        return function(*given, scale=0.4, mask=mask), mx.grad(loss, argnums=(0, 1, 2))(*given)

    found, gradient = of(attend)
    wanted, exact = of(MLX)
    np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-5, atol=1e-5)
    for slope, other in zip(gradient, exact, strict=True):
        np.testing.assert_allclose(np.array(slope), np.array(other), rtol=1e-5, atol=1e-4)


def test_what_is_not_its_kind_is_left_to_mlx() -> None:
    q, k = drawn(0, 1, 2, 3, 8), drawn(1, 1, 2, 3, 8)
    half = attend(q.astype(mx.bfloat16), k.astype(mx.bfloat16), k.astype(mx.bfloat16), scale=1.0, mask="causal")
    assert half.dtype == mx.bfloat16
    assert mx.array_equal(attend(q, k, k, scale=1.0), MLX(q, k, k, scale=1.0))
    one = q[:, :, :1]
    assert mx.array_equal(attend(one, k, k, scale=1.0, mask="causal"), MLX(one, k, k, scale=1.0, mask="causal"))
    sinks = drawn(2, 2)
    assert mx.array_equal(
        attend(q, k, k, scale=1.0, mask="causal", sinks=sinks), MLX(q, k, k, scale=1.0, mask="causal", sinks=sinks)
    )


def test_mlx_own_comes_back() -> None:
    with pytest.raises(ValueError), CpuEngine().computing():
        assert mx.fast.scaled_dot_product_attention is attend
        with CpuEngine().computing():
            pass
        assert mx.fast.scaled_dot_product_attention is attend
        raise ValueError
    assert mx.fast.scaled_dot_product_attention is MLX
    with PortableEngine().computing():
        assert mx.fast.scaled_dot_product_attention is MLX


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_a_model_gives_what_it_gave(make_model: Callable[..., Path], kind: str) -> None:
    trunk, tokens = load_trunk(make_model(kind)), mx.array([[1, 5, 9, 12], [3, 2, 2, 7]])
    found = trunk.logits(trunk.hidden(tokens))
    np.testing.assert_allclose(np.array(found), np.array(trunk.model(tokens)), rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_comes_through_without_a_warning() -> None:
    q, k = drawn(0, 1, 2, 3, 8), drawn(1, 1, 2, 3, 8)
    q[0, 0, 1, 0] = float("inf")
    for function in (attend, MLX):
        found = function(q, k, k, scale=1.0, mask="causal")
        gradient = mx.grad(lambda q, function=function: function(q, k, k, scale=1.0, mask="causal").sum())(q)
        assert not mx.isfinite(found[0, 0, 1]).any().item() and not mx.isfinite(gradient[0, 0, 1]).any().item()
        assert mx.isfinite(found[0, 1]).all().item() and mx.isfinite(gradient[0, 1]).all().item()
