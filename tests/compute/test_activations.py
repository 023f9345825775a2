from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_ppo.compute.cpu.activations import GatedMLP, swiglu, use_fast_gates
from mlx_ppo.models.load import load_trunk

pytestmark = pytest.mark.usefixtures("on_cpu_engine")


def rows(seed: int, shape: tuple[int, ...] = (7, 9, 6000)) -> mx.array:
    return 4 * mx.random.normal(shape, key=mx.random.key(seed))


def test_value_is_that_of_the_formula_in_float64() -> None:
    """Over more than one piece, extremes included."""
    gate, up = rows(0), rows(1)
    gate[0, 0, :4] = mx.array([-200.0, -90.0, 90.0, 0.0])
    exact = np.array(gate, np.float64)
    exact = exact / (1 + np.exp(-exact)) * np.array(up, np.float64)
    np.testing.assert_allclose(np.array(swiglu(gate, up)), exact, rtol=1e-6, atol=1e-30)


def test_gradients_are_mlx_own() -> None:
    gate, up, weight = rows(0), rows(1), rows(2)

    def of(function: Callable[[mx.array, mx.array], mx.array]) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        return mx.value_and_grad(lambda g, u: (weight * function(g, u)).sum(), argnums=(0, 1))(gate, up)

    value, gradients = of(swiglu)
    wanted, exact = of(lambda g, u: nn.silu(g) * u)
    np.testing.assert_allclose(value.item(), wanted.item(), rtol=1e-4)
    for found, other in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(np.array(found), np.array(other), rtol=1e-5, atol=2e-5)


def test_strided_and_half_precision_arguments() -> None:
    gate, up = rows(0, (6, 8)).T, rows(1, (16, 12))[::2, ::2]
    np.testing.assert_allclose(np.array(swiglu(gate, up)), np.array(nn.silu(gate) * up), atol=1e-6)
    half = swiglu(gate.astype(mx.bfloat16), up.astype(mx.bfloat16))
    assert half.dtype == mx.bfloat16


@pytest.mark.parametrize(("kind", "replaced"), [("llama", True), ("qwen2", True), ("qwen3", True), ("gemma2", False)])
def test_only_blocks_of_this_formula_are_replaced(make_model: Callable[..., Path], kind: str, replaced: bool) -> None:
    from mlx_lm.utils import load_model

    folder, tokens = make_model(kind), mx.array([[1, 5, 9, 12]])
    stock, _ = load_model(folder, lazy=False)
    wanted = stock(tokens)
    classes = {type(module) for module in stock.modules()}
    trunk = load_trunk(folder)
    found = [module for module in trunk.model.modules() if isinstance(module, GatedMLP)]
    assert len(found) == (trunk.blocks if replaced else 0)
    np.testing.assert_allclose(np.array(trunk.model(tokens)), np.array(wanted), rtol=1e-5, atol=1e-5)
    assert {type(module) for module in stock.modules()} == classes, "the architecture's own class must stay as it is"
    use_fast_gates(trunk.model)
    assert len([module for module in trunk.model.modules() if isinstance(module, GatedMLP)]) == len(found)
