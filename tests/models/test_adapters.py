import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters as stock_load_adapters
from mlx_lm.utils import load_model as stock_load_model

from mlx_ppo.algo.kl import FixedKL
from mlx_ppo.config.sections import LoraSection, OptimizerSection
from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import Weights, load_adapters, new_adapters
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.models.write import write_adapters, write_model
from mlx_ppo.runs import checkpoint
from mlx_ppo.stages.optimizer import Learner, Optimizer
from mlx_ppo.stages.state import State

TOKENS = mx.array([[1, 286, 288, 40, 7, 212]])
Adapters = Callable[..., Weights]


def fresh(trunk: Trunk, *, key: str = "policy", seed: int = 0, **lora: Any) -> Weights:
    return new_adapters(trunk.adapted, LoraSection(rank=4, **lora), key=key, seed=seed)


def logits(trunk: Trunk, weights: Weights) -> np.ndarray:
    with trunk.using(weights):
        return np.array(trunk.logits(trunk.hidden(TOKENS)))


def full(trunk: Trunk) -> Weights:
    keys = mx.random.split(mx.random.key(3), len(trunk.base))
    return Weights(
        {n: a + 0.05 * mx.random.normal(a.shape, key=k) for (n, a), k in zip(trunk.base.items(), keys, strict=True)}
    )


def test_fresh_adapters_change_nothing_and_depend_on_seed_and_role(trunk: Trunk) -> None:
    made = fresh(trunk)
    np.testing.assert_array_equal(logits(trunk, made), logits(trunk, Weights({})))
    assert len(made.arrays) == 2 * 7 * 2, "two arrays, seven linear layers, two blocks"
    name = "model.layers.1.mlp.down_proj.lora_a"
    assert made.arrays[name].shape == (48, 4)
    bound = 1 / np.sqrt(48)
    assert 0.8 * bound < np.abs(np.array(made.arrays[name])).max() <= bound
    again = fresh(trunk)
    np.testing.assert_array_equal(np.array(again.arrays[name]), np.array(made.arrays[name]))
    for change in ({"seed": 1}, {"key": "critic"}):
        other = fresh(trunk, **change)
        assert np.abs(np.array(other.arrays[name] - made.arrays[name])).max() > 0.01


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"layers": 1}, {f"model.layers.2.{n}" for n in ("mlp.up_proj", "self_attn.q_proj", "mlp.down_proj")}),
        ({"targets": ("mlp.up_proj",)}, {f"model.layers.{number}.mlp.up_proj" for number in range(3)}),
    ],
)
def test_layers_and_targets_choose_where_adapters_go(
    make_model: Callable[..., Path], change: dict[str, Any], expected: set[str]
) -> None:
    trunk = load_trunk(make_model(num_hidden_layers=3))
    places = {name.rpartition(".")[0] for name in fresh(trunk, **change).arrays}
    assert expected <= places
    assert len(places) == {"layers": 7, "targets": 3}[next(iter(change))]
    with pytest.raises(ModelError, match=r"up_prog.*mlp\.up_proj"):
        fresh(trunk, targets=("mlp.up_prog",))


def test_an_adapter_is_a_low_rank_change_of_the_weights(trunk: Trunk, make_adapters: Adapters) -> None:
    weights = make_adapters(trunk)
    merged = {}
    for name, a in weights.arrays.items():
        if name.endswith(".lora_a"):
            layer = name.removesuffix(".lora_a")
            change = weights.scale * (a @ weights.arrays[f"{layer}.lora_b"])
            merged[f"{layer}.weight"] = trunk.base[f"{layer}.weight"] + change.T
    np.testing.assert_allclose(logits(trunk, weights), logits(trunk, Weights(merged)), atol=2e-5)
    assert np.abs(logits(trunk, weights) - logits(trunk, Weights({}))).max() > 0.1


@pytest.mark.parametrize("options", [{}, {"layers": 1}, {"targets": ("self_attn.q_proj",), "scale": 0.7}])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_adapters_load_in_stock_mlx_lm_and_here(
    make_model: Callable[..., Path], make_adapters: Adapters, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    trunk = load_trunk(make_model(kind))
    weights = make_adapters(trunk, **options)
    expected = logits(trunk, weights)
    with_head = weights.holding({**weights.arrays, "head.weight": mx.zeros((32,))})
    folder = write_adapters(tmp_path / "adapters", with_head, trunk.blocks)
    assert {file.name for file in folder.iterdir()} == {"adapters.safetensors", "adapter_config.json"}
    stock = stock_load_adapters(stock_load_model(Path(trunk.name))[0], str(folder))
    np.testing.assert_allclose(np.array(stock(TOKENS)), expected, atol=2e-5)
    read = load_adapters(folder, trunk.adapted)
    assert read.scale == weights.scale
    assert read.arrays.keys() == weights.arrays.keys()
    np.testing.assert_array_equal(logits(trunk, read), expected)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_checkpoint_folder_loads_in_stock_mlx_lm(
    trunk: Trunk, make_adapters: Adapters, tmp_path: Path, kind: str
) -> None:
    weights = make_adapters(trunk) if kind == "lora" else full(trunk)
    optimizer = Optimizer(OptimizerSection(), learning_rate=1e-3, total_steps=1)
    state = State(Learner(weights, optimizer), None, FixedKL(0.1), iteration=3)
    folder = checkpoint.save(tmp_path, state.as_checkpoint(trunk.blocks), keep_last=1, best=None)
    stock = stock_load_adapters(stock_load_model(Path(trunk.name))[0], str(folder))
    np.testing.assert_allclose(np.array(stock(TOKENS)), logits(trunk, weights), atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_written_model_loads_in_stock_mlx_lm(trunk: Trunk, tmp_path: Path, dtype: str) -> None:
    weights = full(trunk)
    folder = write_model(tmp_path / "model", Path(trunk.name), trunk, weights, dtype=dtype)
    stock, config = stock_load_model(folder)
    assert config["torch_dtype"] == dtype
    assert str(stock.model.norm.weight.dtype) == f"mlx.core.{dtype}"
    error = np.abs(np.array(stock(TOKENS).astype(mx.float32)) - logits(trunk, weights)).max()
    assert error < {"float32": 2e-5, "bfloat16": 0.2}[dtype]
    kinds = {"float32": mx.float32, "bfloat16": mx.bfloat16}
    rounded = weights.holding({n: a.astype(kinds[dtype]).astype(mx.float32) for n, a in weights.arrays.items()})
    np.testing.assert_array_equal(logits(load_trunk(folder), Weights({})), logits(trunk, rounded))


def damage(arrays: dict[str, mx.array], how: str) -> dict[str, mx.array]:
    name = "model.layers.0.mlp.up_proj.lora_"
    if how == "one side":
        return {n: a for n, a in arrays.items() if n != f"{name}b"}
    if how == "other layer":
        return {**arrays, "model.layers.7.mlp.up_proj.lora_a": mx.zeros((32, 3))}
    if how == "shape":
        return {**arrays, f"{name}a": mx.zeros((31, 3))}
    if how == "ranks":
        return {**arrays, f"{name}a": mx.zeros((32, 2))}
    return {**arrays, f"{name}a": mx.full((32, 3), mx.nan)}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("one side", "only one"),
        ("other layer", "no linear layer"),
        ("shape", "fit this model"),
        ("ranks", "rank"),
        ("nan", "NaN"),
    ],
)
def test_adapters_that_dont_fit_are_refused(
    trunk: Trunk, make_adapters: Adapters, tmp_path: Path, how: str, message: str
) -> None:
    weights = make_adapters(trunk)
    folder = write_adapters(tmp_path / "a", weights.holding(damage(dict(weights.arrays), how)), trunk.blocks)
    with pytest.raises(ModelError, match=message):
        load_adapters(folder, trunk.adapted)


@pytest.mark.parametrize("config", [None, [], {}, {"lora_parameters": None}, {"lora_parameters": {"scale": "x"}}])
def test_a_broken_adapter_config_is_refused(
    trunk: Trunk, make_adapters: Adapters, tmp_path: Path, config: object
) -> None:
    folder = write_adapters(tmp_path / "a", make_adapters(trunk), trunk.blocks)
    (folder / "adapter_config.json").unlink()
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="not a folder of LoRA adapters"):
        load_adapters(folder, trunk.adapted)


def test_adapters_on_quantised_layers(make_model: Callable[..., Path], make_adapters: Adapters) -> None:
    path = make_model(intermediate_size=64)
    base = load_trunk(path)
    stock, _ = stock_load_model(path)
    nn.quantize(stock, group_size=32, bits=8)
    trunk = Trunk(stock, base.tokenizer, "quantised", base.engine)
    assert {n: a.shape for n, a in make_adapters(trunk).arrays.items()} == {
        n: a.shape for n, a in make_adapters(base).arrays.items()
    }
    change = logits(trunk, make_adapters(trunk)) - logits(base, make_adapters(base))
    assert 0 < np.abs(change).max() < 0.3, "8 bits are near the whole weights"
    assert np.abs(logits(trunk, make_adapters(trunk)) - logits(trunk, Weights({}))).max() > 0.5
