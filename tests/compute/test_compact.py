from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ppo.compute.cpu import compact
from mlx_ppo.compute.cpu.compact import CompactEmbedding, CompactLinear, dequantised, keep_compact
from mlx_ppo.compute.cpu.vocabulary import vocabulary_statistics
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk

pytestmark = pytest.mark.usefixtures("on_cpu_engine")

TOKENS = mx.array([[1, 286, 288, 40, 7, 212, 9, 8, 30], [1, 9, 9, 41, 3, 2, 2, 2, 2]])
FORMS = [(4, 32, "affine"), (4, 64, "affine"), (8, 32, "affine"), (2, 32, "affine"), (3, 64, "affine")]
FORMS += [(4, 32, "mxfp4"), (8, 32, "mxfp8")]
Quantised = Callable[..., Path]


def both(folder: Path) -> tuple[Trunk, Trunk]:
    """The same folder, dequantised when it is loaded, and kept as it is."""
    return load_trunk(folder), load_trunk(folder, compact=True)


@pytest.mark.parametrize(("bits", "group", "mode"), FORMS)
@pytest.mark.parametrize("piece", [1 << 22, 7 * 192])
def test_a_layer(bits: int, group: int, mode: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Product and gradient are those of the matrix that mlx writes out; with a bias and without."""
    monkeypatch.setattr(compact, "PIECE", piece)
    keys = mx.random.split(mx.random.key(0), 3)
    for bias in (True, False):
        plain = nn.Linear(192, 50, bias=bias)
        plain.weight = mx.random.normal((50, 192), key=keys[0])
        if bias:
            plain.bias = mx.random.normal((50,), key=keys[1])
        layer = nn.QuantizedLinear.from_linear(plain, group, bits, mode=mode)
        plain.weight = mx.dequantize(
            layer.weight, layer.scales, layer.get("biases"), group, bits, mode, dtype=mx.float32
        )
        holder = nn.Sequential(layer)
        keep_compact(holder)
        assert type(layer) is CompactLinear
        assert mx.array_equal(dequantised(compact._packed(layer), slice(0, 50)), plain.weight).item()
        assert mx.array_equal(dequantised(compact._packed(layer), slice(20, 41)), plain.weight[20:41]).item()
        x = mx.random.normal((2, 5, 192), key=keys[2])
        np.testing.assert_allclose(np.array(layer(x)), np.array(plain(x)), rtol=1e-6, atol=1e-4)
        found, wanted = (mx.grad(lambda x, f=f: mx.sin(f(x)).sum())(x) for f in (layer, plain))
        np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-6, atol=2e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_has_the_numbers_of_the_one_that_is_written_out(
    make_model: Callable[..., Path],
    quantised: Quantised,
    make_adapters: Callable[..., Weights],
    kind: str,
    bits: int,
) -> None:
    """Tied and untied output layers, biases; to the last bit, with adapters too; gradients to rounding."""
    whole, kept = both(quantised(make_model(kind), bits=bits))
    weights = make_adapters(whole)
    targets = TOKENS.reshape(-1)

    def figures(trunk: Trunk) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        def loss(arrays: Any) -> mx.array:
            with trunk.using(weights.holding(arrays)):
                logits = trunk.logits(trunk.hidden(TOKENS)).reshape(len(targets), -1)
                logprobs, entropies = vocabulary_statistics(logits, targets, temperature=0.9)
            return (logprobs * mx.sin(logprobs) + entropies).mean()

        with trunk.using(weights):
            changed = trunk.logits(trunk.hidden(TOKENS))
        return trunk.logits(trunk.hidden(TOKENS)), changed, mx.grad(loss)(dict(weights.arrays))

    (plain, changed, gradients), (plain_, changed_, gradients_) = figures(whole), figures(kept)
    assert mx.abs(plain - changed).max().item() > 0.01, "the adapters must matter"
    np.testing.assert_array_equal(np.array(plain_), np.array(plain))
    np.testing.assert_array_equal(np.array(changed_), np.array(changed))
    for name, gradient in gradients.items():
        np.testing.assert_allclose(np.array(gradients_[name]), np.array(gradient), atol=1e-6, err_msg=name)
        assert mx.any(gradient).item()


def test_it_takes_the_memory_of_the_folder(make_model: Callable[..., Path], quantised: Quantised) -> None:
    whole, kept = both(quantised(make_model(hidden_size=128, intermediate_size=256)))
    sizes = [sum(array.nbytes for array in trunk.base.values()) for trunk in (whole, kept)]
    assert sizes[1] < 0.2 * sizes[0]  # 4 bits, and two float32 numbers for each 32 elements: 6 of 32 bits
    assert {array.dtype for array in kept.base.values()} == {mx.uint32, mx.float32}
    assert "one matrix at a time" in kept.remarks[0] and "one matrix" not in whole.remarks[0]
    assert any(isinstance(module, CompactEmbedding) for module in kept.model.modules())


def test_a_gradient_keeps_no_matrix(make_model: Callable[..., Path], quantised: Quantised) -> None:
    """What is there after a forward pass, and at the peak of a backward pass, is less by the matrices' size."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "deviation": 0.02}
    trunk = load_trunk(quantised(make_model(**sizes)), compact=True)
    x = mx.zeros((1, 4, 512))
    mx.eval(x)
    matrices = 3 * 4 * 512 * 1024 * 4  # of the feed-forward blocks alone, 25 MB

    def loss(x: mx.array) -> mx.array:
        for layer in trunk.model.layers:
            x = x + layer.mlp(x)
        return x.sum()

    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(loss)(x))
    assert mx.get_peak_memory() - before < matrices / 6


def test_checkpointing_gives_the_same_gradient(
    make_model: Callable[..., Path], quantised: Quantised, make_adapters: Callable[..., Weights]
) -> None:
    """Also where a block above has no adapters."""
    trunk = load_trunk(quantised(make_model(num_hidden_layers=3)), compact=True)
    whole = make_adapters(trunk)
    weights = whole.holding({name: array for name, array in whole.arrays.items() if ".layers.1." in name})

    def loss(arrays: Any) -> mx.array:
        with trunk.using(weights.holding(arrays)):
            return mx.sin(trunk.hidden(TOKENS)).sum()

    plain = mx.grad(loss)(dict(weights.arrays))
    with trunk.checkpointing():
        found = mx.grad(loss)(dict(weights.arrays))
    for name, gradient in plain.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(gradient), atol=1e-4, err_msg=name)


def test_half_precision_and_random_weights_are_as_ever(make_model: Callable[..., Path], quantised: Quantised) -> None:
    folder = quantised(make_model())
    half = load_trunk(folder, dtype="bfloat16", compact=True)
    assert not any(isinstance(module, CompactLinear) for module in half.model.modules())
    fresh = load_trunk(folder, random_seed=1, compact=True)
    assert {array.dtype for _, array in tree_flatten(fresh.model.parameters())} == {mx.float32}
