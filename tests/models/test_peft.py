"""PEFT's form of adapters: what is taken, and what is refused by name; its own logits are in tests/importing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.peft import fill_with_peft, given_adapters
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.models.write import write_adapters

Adapters = Callable[..., Weights]
TOKENS = mx.array([[1, 5, 7, 3, 2]])


@pytest.fixture
def trunk(make_model: Callable[..., Path]) -> Trunk:
    return load_trunk(make_model())


@pytest.fixture
def saved(trunk: Trunk, make_adapters: Adapters, tmp_path: Path) -> Callable[..., Path]:
    """A folder as PEFT saves it, with some keys of its configuration changed."""

    def make(**changes: Any) -> Path:
        fill_with_peft(tmp_path, make_adapters(trunk), check_model_folder(Path(trunk.name)).tensors, base="a model")
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        return tmp_path

    return make


def logits(trunk: Trunk, weights: Weights) -> np.ndarray:
    with trunk.using(weights):
        return np.array(trunk.logits(trunk.hidden(TOKENS)))


@pytest.mark.parametrize("options", [{}, {"layers": 1}, {"targets": ("mlp.up_proj",), "scale": 0.7}])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_both_ways(
    make_model: Callable[..., Path], make_adapters: Adapters, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    trunk = load_trunk(make_model(kind))
    if kind == "gpt2" and "targets" in options:
        options = {"targets": ("mlp.c_fc",), "scale": 0.7}
    weights = make_adapters(trunk, **options)
    fill_with_peft(tmp_path, weights, check_model_folder(Path(trunk.name)).tensors, base="a model")
    found = given_adapters(tmp_path, trunk.adapted)
    assert found.arrays.keys() == weights.arrays.keys() and found.scale == pytest.approx(weights.scale)
    np.testing.assert_allclose(logits(trunk, found), logits(trunk, weights), atol=1e-5)


def test_those_of_mlx_lm_are_read_as_before(trunk: Trunk, make_adapters: Adapters, tmp_path: Path) -> None:
    weights = make_adapters(trunk)
    folder = write_adapters(tmp_path / "a", weights, trunk.blocks)
    np.testing.assert_array_equal(logits(trunk, given_adapters(folder, trunk.adapted)), logits(trunk, weights))


def test_the_factor_is_peft_s(trunk: Trunk, saved: Callable[..., Path]) -> None:
    rank = 3
    assert given_adapters(saved(lora_alpha=12), trunk.adapted).scale == 12 / rank
    assert given_adapters(saved(lora_alpha=12, use_rslora=True), trunk.adapted).scale == pytest.approx(12 / rank**0.5)
    plain = given_adapters(saved(lora_alpha=12), trunk.adapted)
    own = given_adapters(saved(lora_alpha=12, alpha_pattern={"up_proj": 3}), trunk.adapted)
    ratios = {
        name: float((own.arrays[name] / array).mean().item())
        for name, array in plain.arrays.items()
        if name.endswith("lora_b")
    }
    assert {name.split(".")[-2] for name, ratio in ratios.items() if ratio == pytest.approx(0.25)} == {"up_proj"}
    assert own.scale == plain.scale


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "PEFT's IA3; only LoRA"),
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, '"pissa" changes the model\'s own weights'),
        ({"bias": "all"}, 'bias = "all"'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: it trained all of lm_head"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters, which this program doesn't know"),
        ({"lora_bias": True}, "lora_bias, which this program doesn't know"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_alpha": "many"}, "lora_alpha or alpha_pattern can't be read"),
        ({"lora_alpha": float("nan")}, "make no factor"),
        ({"alpha_pattern": {"(": 3}}, "lora_alpha or alpha_pattern can't be read"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(
    trunk: Trunk, saved: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError) as told:
        given_adapters(saved(**changes), trunk.adapted)
    assert message in str(told.value)


def changed(folder: Path, change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> Path:
    file = folder / "adapter_model.safetensors"
    arrays = change(dict(mx.load(str(file)).items()))  # type: ignore[union-attr]
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays)
    return folder


NAME = "base_model.model.model.layers.0.mlp.up_proj.lora_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: {n: a for n, a in arrays.items() if n != f"{NAME}B.weight"}, "only one of lora_A and lora_B"),
        (lambda arrays: arrays | {f"{NAME}A.weight": mx.zeros((3, 31))}, "don't fit"),
        (lambda arrays: arrays | {f"{NAME}A.weight": mx.zeros((2, 32))}, "don't fit"),
        (lambda arrays: arrays | {f"{NAME}A.weight": mx.full((3, 32), mx.inf)}, "NaN or infinity"),
        (lambda arrays: arrays | {"base_model.model.lm_head.weight": mx.zeros((2, 2))}, "is no LoRA adapter"),
        (lambda arrays: arrays | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": mx.zeros((3, 32))},
         "another one?"),
        (lambda _: {}, "holds no tensors"),
    ],
)  # fmt: skip
def test_arrays_that_dont_fit_are_refused(
    trunk: Trunk, saved: Callable[..., Path], change: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ModelError) as told:
        given_adapters(changed(saved(), change), trunk.adapted)
    assert message in str(told.value)


def test_a_pickle_is_refused(trunk: Trunk, saved: Callable[..., Path]) -> None:
    folder = saved()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="a pickle, which can run code"):
        given_adapters(folder, trunk.adapted)
