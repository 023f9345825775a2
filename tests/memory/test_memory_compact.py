"""Predicted against measured peaks where something stays quantised: matrices on a CPU, keys and values."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_ppo.compute.cpu import compact
from mlx_ppo.compute.cpu.vocabulary import vocabulary_statistics
from mlx_ppo.compute.kv_cache import new_caches
from mlx_ppo.config.sections import LoraSection
from mlx_ppo.data.model_files import json_object
from mlx_ppo.memory.model import weightless_trunk
from mlx_ppo.memory.simulator.replay import predict
from mlx_ppo.models.adapters import Weights, new_adapters
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk

pytestmark = pytest.mark.usefixtures("on_cpu_engine")

SIZES = {
    "hidden_size": 256,
    "vocab_size": 2048,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
ROWS, LENGTH = 2, 48


@pytest.fixture(autouse=True)
def sequential() -> Iterator[None]:
    """The limit under which mlx doesn't run ahead."""
    before = mx.set_memory_limit(1)
    yield
    mx.set_memory_limit(before)


def measured(function: Callable[..., Any], *arguments: Any) -> int:
    """The highest peak of two runs, above what was there before."""
    peaks: list[int] = []
    for _ in range(2):
        mx.eval(arguments)
        gc.collect()
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(function(*arguments))
        peaks.append(mx.get_peak_memory() - before)
    return max(peaks)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, make_model: Callable[..., Path], quantised: Callable[..., Path]) -> Path:
    """Untied and tied output layers."""
    return quantised(make_model(request.param, deviation=0.02, **SIZES))


@pytest.fixture(scope="module")
def trunk(folder: Path) -> Trunk:
    return load_trunk(folder, compact=True)


@pytest.fixture
def lora(trunk: Trunk) -> Weights:
    weights = new_adapters(trunk.adapted, LoraSection(layers=2), key="memory", seed=0)
    mx.eval(dict(weights.arrays))
    return weights


@pytest.fixture
def tokens() -> mx.array:
    tokens = mx.random.randint(0, SIZES["vocab_size"], (ROWS, LENGTH), key=mx.random.key(3))
    mx.eval(tokens)
    return tokens


def size(trunk: Trunk) -> int:
    return sum(array.nbytes for array in trunk.base.values())


def test_weights_without_weights(folder: Path, trunk: Trunk) -> None:
    """The plan's trunk has the arrays of the real one, layers with other bits included."""
    config = json_object(folder / "config.json")
    planned = weightless_trunk(config, "x", dtype="auto", compact=True)
    assert {n: (a.shape, a.dtype) for n, a in planned.base.items()} == {
        n: (a.shape, a.dtype) for n, a in trunk.base.items()
    }
    assert size(weightless_trunk(config, "x", dtype="auto")) > 4 * size(trunk)
    config["quantization"]["model.layers.1.mlp.up_proj"] = {"bits": 8, "group_size": 64}
    other = weightless_trunk(config, "x", dtype="auto", compact=True)
    assert other.base["model.layers.1.mlp.up_proj.weight"].shape == (704, 64)
    assert other.base["model.layers.1.mlp.gate_proj.weight"].shape == (704, 32)


@pytest.mark.parametrize("piece", [1 << 22, 1000 * 256])
def test_scoring(trunk: Trunk, lora: Weights, tokens: mx.array, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices in one piece, and in several."""
    monkeypatch.setattr(compact, "PIECE", piece)

    def scoring(tokens: mx.array) -> Any:
        with trunk.using(lora):
            logits = trunk.logits(trunk.hidden(tokens)).reshape(ROWS * LENGTH, -1)
            return vocabulary_statistics(logits, tokens.reshape(-1), temperature=0.9)

    predicted, found = predict(scoring, tokens).transient, measured(scoring, tokens)
    assert predicted == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("piece", [1 << 22, 1000 * 256])
def test_update(trunk: Trunk, lora: Weights, tokens: mx.array, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "PIECE", piece)

    def loss(arrays: dict[str, mx.array]) -> mx.array:
        with trunk.using(lora.holding(arrays)):
            logits = trunk.logits(trunk.hidden(tokens)).reshape(ROWS * LENGTH, -1)
            logprobs, _ = vocabulary_statistics(logits, tokens.reshape(-1), temperature=0.9)
        return (logprobs * mx.sin(logprobs)).mean()

    function = mx.value_and_grad(loss)
    predicted, found = predict(function, dict(lora.arrays)), measured(function, dict(lora.arrays))
    assert predicted.transient == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("form", ["full", "8-bit"])
def test_a_token_on_top_of_a_cache(make_model: Callable[..., Path], form: str) -> None:
    """Old arrays are written over, because the step lets go of them; a layer's keys and values are written out."""
    wide = load_trunk(make_model(deviation=0.02, **SIZES))
    rows, length = 8, 96
    token = mx.zeros((rows, 1), mx.int32)
    mx.eval(token)

    def step(token: mx.array, boxes: list[Any]) -> list[Any]:
        caches = new_caches(wide.model, form, rows)
        for cache, (keys, values) in zip(caches, boxes, strict=True):
            cache.keys, cache.values, cache._idx, cache.offset = keys, values, length, cache.offset + length
        boxes.clear()
        states = wide.hidden(token, caches)[:, -1]
        return [states, [[cache.keys, cache.values] for cache in caches]]

    def filled() -> list[Any]:
        caches = new_caches(wide.model, form, rows)
        for cache in caches:
            cache.step = length + 16
        wide.hidden(mx.zeros((rows, length), mx.int32), caches)
        return [[cache.keys, cache.values] for cache in caches]

    peaks = []
    for _ in range(2):
        boxes = filled()
        mx.eval(boxes)
        gc.collect()
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(token, boxes))
        peaks.append(mx.get_peak_memory() - before)
    predicted = predict(step, token, filled(), held=[0]).transient
    cache = sum(array.nbytes for _, array in tree_flatten(filled()))
    assert abs(predicted - max(peaks)) < 0.03 * (cache + max(peaks))
