"""Adapters merged into weights, against mlx-lm's own layers; PEFT's own logits are in tests/importing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model

from mlx_ppo.compute.choose import exactly
from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.merging import merged_arrays
from mlx_ppo.models.peft import fill_with_peft, given_adapters
from mlx_ppo.models.trunk import Trunk

MakeModel = Callable[..., Path]
TOKENS = mx.array([[1, 5, 7, 3, 2, 200, 41]])
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": 8}
MOE |= {"moe_intermediate_size": 16, "tie_word_embeddings": True, "norm_topk_prob": True}
LINEAR = ("self_attn.q_proj", "mlp.down_proj")


def saved_by_mlx_lm(model: Path, folder: Path, *, kind: str, keys: tuple[str, ...], layers: int = 2) -> Path:
    """Random adapters in mlx-lm's own files."""
    net, _ = load_model(model, trust_remote_code=False)
    net.freeze()
    parameters = {"rank": 3, "scale": 1.5, "dropout": 0.0, "keys": list(keys)}
    linear_to_lora_layers(net, layers, parameters, use_dora=kind == "dora")
    keyed = zip(tree_flatten(net.trainable_parameters()), mx.random.split(mx.random.key(3), 400), strict=False)
    arrays = {name: array + 0.1 * mx.random.normal(array.shape, key=key) for (name, array), key in keyed}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def logits_by_mlx_lm(model: Path, adapters: Path) -> np.ndarray:
    net, _ = load_model(model, trust_remote_code=False)
    net.eval()
    return np.array(load_adapters(net, str(adapters))(TOKENS).astype(mx.float32))


def merged(model: Path, adapters: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits without and with them."""
    with exactly():
        trunk = load_trunk(model, dtype="float32")
        weights = Weights(merged_arrays(adapters, trunk))
        plain = np.array(trunk.logits(trunk.hidden(TOKENS)))
        with trunk.using(weights):
            return plain, np.array(trunk.logits(trunk.hidden(TOKENS)))


@pytest.mark.parametrize("keys", [LINEAR, (*LINEAR, "model.embed_tokens")], ids=["linear", "embedding"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("model", ["llama", "qwen2", "gemma2"])
def test_logits_are_those_of_mlx_lm(
    make_model: MakeModel, tmp_path: Path, model: str, kind: str, keys: tuple[str, ...]
) -> None:
    folder = make_model(model)
    adapters = saved_by_mlx_lm(folder, tmp_path / "a", kind=kind, keys=keys)
    names = dict(mx.load(str(adapters / "adapters.safetensors")))  # type: ignore[arg-type, call-overload]
    assert any("embed" in name for name in names) == (len(keys) > 2)
    plain, found = merged(folder, adapters)
    assert np.abs(found - plain).max() > 0.01
    np.testing.assert_allclose(found, logits_by_mlx_lm(folder, adapters), rtol=0, atol=2e-3)


def test_experts(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", **MOE)
    adapters = saved_by_mlx_lm(folder, tmp_path / "a", kind="lora", keys=("mlp.switch_mlp.up_proj", *LINEAR[:1]))
    plain, found = merged(folder, adapters)
    assert np.abs(found - plain).max() > 0.01
    np.testing.assert_allclose(found, logits_by_mlx_lm(folder, adapters), rtol=0, atol=2e-3)


def test_of_a_quantised_model_it_is_that_of_the_dequantised_one(
    make_model: MakeModel, quantised: Callable[..., Path], tmp_path: Path
) -> None:
    folder = quantised(make_model())
    for kind in ("lora", "dora"):
        adapters = saved_by_mlx_lm(folder, tmp_path / kind, kind=kind, keys=LINEAR)
        np.testing.assert_allclose(merged(folder, adapters)[1], logits_by_mlx_lm(folder, adapters), atol=5e-3)


def test_whole_weights(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model()
    name, array = "model.norm.weight", mx.full((32,), 1.5)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {name: array})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "num_layers": 2}))
    plain, found = merged(folder, tmp_path)
    assert np.abs(found - plain).max() > 0.01
    np.testing.assert_allclose(found, logits_by_mlx_lm(folder, tmp_path), rtol=0, atol=2e-3)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {name: mx.zeros((31,))})
    with pytest.raises(ModelError, match="is no parameter of this model"):
        merged(folder, tmp_path)


@pytest.fixture
def trunk(make_model: MakeModel) -> Trunk:
    return load_trunk(make_model(), dtype="float32")


@pytest.fixture
def peft(trunk: Trunk, make_adapters: Callable[..., Weights], tmp_path: Path) -> Callable[..., Path]:
    """A folder as PEFT saves it, with keys of its configuration and arrays changed."""

    def make(arrays: dict[str, mx.array] | None = None, **changes: Any) -> Path:
        fill_with_peft(tmp_path, make_adapters(trunk), check_model_folder(Path(trunk.name)).tensors, base="a model")
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        file = str(tmp_path / "adapter_model.safetensors")
        both = {**dict(mx.load(file).items()), **(arrays or {})}  # type: ignore[union-attr]
        mx.eval(both)
        mx.save_safetensors(file, both)
        return tmp_path

    return make


def logits(trunk: Trunk, weights: Weights) -> np.ndarray:
    with trunk.using(weights):
        return np.array(trunk.logits(trunk.hidden(TOKENS)))


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"alpha_pattern": {"up_proj": 3}}])
def test_of_peft_they_are_what_would_be_attached(
    trunk: Trunk, peft: Callable[..., Path], changes: dict[str, Any]
) -> None:
    folder = peft(**changes)
    found = logits(trunk, Weights(merged_arrays(folder, trunk)))
    np.testing.assert_allclose(found, logits(trunk, given_adapters(folder, trunk.adapted)), atol=1e-4)


def test_magnitudes_and_whole_modules_of_peft(trunk: Trunk, peft: Callable[..., Path]) -> None:
    """In float64, of one layer; a norm is taken whole."""
    layer, rows = "model.layers.1.mlp.up_proj", trunk.base["model.layers.1.mlp.up_proj.weight"].shape[0]
    outs = {name: trunk.base[f"{name}.weight"].shape[0] for name in trunk.adapted}
    vectors = {f"base_model.model.{n}.lora_magnitude_vector.weight": mx.full((size,), 0.5) for n, size in outs.items()}
    vectors[f"base_model.model.{layer}.lora_magnitude_vector.weight"] = mx.arange(1, rows + 1) / rows
    whole = {"base_model.model.model.norm.weight": mx.full((32,), 1.5)}
    folder = peft({**vectors, **whole}, use_dora=True, modules_to_save=["norm"])
    found = merged_arrays(folder, trunk)
    lora = given_adapters(peft(), trunk.adapted)
    a, b, w = (np.array(array, np.float64) for array in (
        lora.arrays[f"{layer}.lora_a"], lora.arrays[f"{layer}.lora_b"], trunk.base[f"{layer}.weight"]
    ))  # fmt: skip
    after = w + lora.scale * (a @ b).T
    wanted = after / np.linalg.norm(after, axis=1, keepdims=True) * (np.arange(1, rows + 1) / rows)[:, None]
    np.testing.assert_allclose(np.array(found[f"{layer}.weight"]), wanted, atol=1e-5)
    assert found["model.norm.weight"].tolist() == [1.5] * 32


def test_an_embedding_of_peft(trunk: Trunk, peft: Callable[..., Path], make_model: MakeModel) -> None:
    name, (tokens, width) = "base_model.model.model.embed_tokens", trunk.base["model.embed_tokens.weight"].shape
    a, b = mx.random.normal((3, tokens), key=mx.random.key(0)), mx.random.normal((width, 3), key=mx.random.key(1))
    own = trunk.base["model.embed_tokens.weight"]
    arrays = {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b, f"{name}.base_layer.weight": own}
    folder = peft(arrays, lora_alpha=6)
    found = merged_arrays(folder, trunk)["model.embed_tokens.weight"]
    np.testing.assert_allclose(found, own + 2.0 * (b @ a).T, rtol=1e-5, atol=1e-5)
    tied = load_trunk(make_model(tie_word_embeddings=True), dtype="float32")
    with pytest.raises(ModelError, match="is the output layer, too"):
        merged_arrays(folder, tied)


def test_what_cannot_be_merged_is_refused_by_name(
    trunk: Trunk, peft: Callable[..., Path], make_model: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="has no magnitude"):
        merged_arrays(peft(use_dora=True), trunk)
    with pytest.raises(ModelError, match="IA3"):
        merged_arrays(peft(peft_type="IA3"), trunk)
    with pytest.raises(ModelError, match='bias = "all"'):
        merged_arrays(peft(bias="all"), trunk)
    with pytest.raises(ModelError, match=r"lm_head\.weight is no adapter"):
        merged_arrays(peft({"base_model.model.lm_head.weight": mx.zeros((304, 32))}), trunk)
    with pytest.raises(ModelError, match="no parameter of this model"):
        merged_arrays(peft({"base_model.model.lm_head.weight": mx.zeros((3, 32))}, modules_to_save=["lm_head"]), trunk)
    own = tmp_path / "own"
    saved_by_mlx_lm(make_model(), own, kind="lora", keys=LINEAR)
    with pytest.raises(ModelError, match="don't fit"):
        merged_arrays(own, load_trunk(make_model(hidden_size=64), dtype="float32"))
    config = json.loads((own / "adapter_config.json").read_text())
    for changes, words in (
        ({"fine_tune_type": "other"}, "fine_tune_type is 'other'"),
        ({"lora_parameters": {}}, "has no scale"),
        ({"lora_parameters": {"scale": float("inf")}}, "which can't be"),
    ):
        (own / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=words):
            merged_arrays(own, trunk)
    with pytest.raises(ModelError, match="no such folder"):
        merged_arrays(tmp_path / "nothing", trunk)
