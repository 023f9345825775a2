"""What config.json and the tensors say, held to what mlx-lm computes of it: taken, translated or refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.errors import ModelError
from mlx_ppo.exporting.fuse import fused_config
from mlx_ppo.models.gate import positions_of, translated
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.parts import Context

TOKENS = mx.array([[1, 286, 288, 40, 7, 212, 9, 8, 30]])
Copy = Callable[..., Path]


def logits(folder: Path) -> np.ndarray:
    trunk = load_trunk(folder, dtype="float32")
    return np.array(trunk.logits(trunk.hidden(TOKENS)))


def arrays_of(folder: Path) -> dict[str, mx.array]:
    found = dict(mx.load(str(folder / "model.safetensors")))  # type: ignore[arg-type]
    mx.eval(found)
    return found


SPELLINGS = {
    "base": ({"rope_theta": 50.0}, {"rope_type": "default", "rope_theta": 50.0}),
    "linear": (
        {"rope_theta": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0},
    ),
    "yarn": (
        {"rope_theta": 50.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 50.0},
    ),
    "one object for each kind of layer": (
        {"rope_theta": 50.0},
        {"full_attention": {"rope_theta": 50.0}, "sliding_attention": {"rope_theta": 50.0}},
    ),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_rope_of_transformers_4_and_5_is_the_same_model(copy: Copy, case: str) -> None:
    before, after = SPELLINGS[case]
    old = logits(copy(**before))
    np.testing.assert_array_equal(logits(copy(rope_theta=None, rope_parameters=after)), old)
    assert np.abs(logits(copy()) - old).max() > 1e-3, "the test could not tell"


def test_yarn_takes_its_first_length_where_transformers_does(copy: Copy) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0}
    said = {**scaling, "original_max_position_embeddings": 64}
    unsaid = logits(copy(max_position_embeddings=64, rope_scaling=scaling))
    np.testing.assert_array_equal(unsaid, logits(copy(max_position_embeddings=64, rope_scaling=said)))


def test_rope_inside_text_config_is_translated_there() -> None:
    text = {"model_type": "mistral", "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    config = {"model_type": "mistral3", "tie_word_embeddings": True, "text_config": text}
    given = translated(config, "m")["text_config"]
    assert given["rope_theta"] == 50.0 and given["tie_word_embeddings"] is True
    assert translated({**config, **translated(config, "m")}, "m") == {}, "translating again changes nothing"


def test_gemma3_has_two_bases_and_a_pattern() -> None:
    parameters = {"full_attention": {"rope_theta": 50.0}, "sliding_attention": {"rope_theta": 20.0}}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    given = translated({"model_type": "gemma3_text", "rope_parameters": parameters, "layer_types": kinds}, "m")
    assert given == {"rope_theta": 50.0, "rope_local_base_freq": 20.0, "sliding_window_pattern": 3}


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "hidden_act": ("llama", {"hidden_act": "gelu"}),
    "hidden_activation": ("gemma2", {"hidden_activation": "relu"}),
    "activation_function": ("gpt2", {"activation_function": "relu"}),
    "final_logit_softcapping": ("llama", {"final_logit_softcapping": 30.0}),
    "partial_rotary_factor": ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "scale_attn_by_inverse_layer_idx": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "rope_scaling": ("gemma2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "rope_scaling.attention_factor": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}},
    ),
    "layer_types": ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    "rope_parameters": (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 2.0}}},
    ),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_mlx_lm_leaves_out_is_refused_by_name(key: str) -> None:
    kind, keys = REFUSED[key]
    with pytest.raises(ModelError, match=f"'{key}'"):
        translated({"model_type": kind, **keys}, "m")


@pytest.mark.parametrize("config", [
    {"model_type": "llama", "hidden_act": "silu", "pretraining_tp": 1, "attention_dropout": 0.0},
    {"model_type": "gemma2", "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
    {"model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 16, "n_positions": 16},
])  # fmt: skip
def test_what_mlx_lm_reads_as_it_is_needs_nothing(config: dict[str, Any]) -> None:
    assert translated(config, "m") == {}


def test_two_bases_that_differ_are_refused() -> None:
    with pytest.raises(ModelError, match="delete the wrong one"):
        translated({"model_type": "llama", "rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "m")


def test_an_output_layer_of_its_own_is_used_where_nothing_is_said(copy: Copy) -> None:
    said, unsaid = copy(tie_word_embeddings=False), copy(tie_word_embeddings=None)
    for folder in (said, unsaid):
        arrays = arrays_of(folder)
        arrays["lm_head.weight"] = mx.roll(arrays["model.embed_tokens.weight"], 1, axis=0)
        mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    np.testing.assert_array_equal(logits(unsaid), logits(said))


@pytest.mark.parametrize("dtype", [mx.int8, mx.uint8, mx.int32])
def test_weights_that_are_no_floats_are_refused(copy: Copy, dtype: mx.Dtype) -> None:
    folder, name = copy(), "model.layers.0.mlp.up_proj.weight"
    arrays = arrays_of(folder)
    arrays[name] = (arrays[name] * 100).astype(dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    with pytest.raises(ModelError, match=f"{name} holds"):
        load_trunk(folder)


POSITIONS: list[tuple[dict[str, Any], Context | None]] = [
    ({"model_type": "llama"}, None),
    ({"model_type": "llama", "max_position_embeddings": 256},
     Context(256, learned=False)),
    ({"model_type": "mistral", "max_position_embeddings": 256, "sliding_window": 64},
     Context(64, learned=True)),
    ({"model_type": "qwen2", "max_position_embeddings": 256, "sliding_window": 64},
     Context(256, learned=False)),
    ({"model_type": "qwen2", "max_position_embeddings": 64, "rope_scaling":
      {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
     Context(256, learned=False)),
    ({"model_type": "phi3", "max_position_embeddings": 256, "original_max_position_embeddings": 64, "rope_scaling":
      {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
     Context(64, learned=True)),
]  # fmt: skip


@pytest.mark.parametrize(("config", "context"), POSITIONS)
def test_how_far_a_model_reaches(config: dict[str, Any], context: Context | None) -> None:
    assert positions_of(config) == context


def test_a_trunk_knows_its_positions(copy: Copy) -> None:
    trunk = load_trunk(copy(max_position_embeddings=32))
    assert trunk.within(32) == []
    assert "32" in trunk.within(33)[0]


def test_a_fused_folder_has_the_translated_keys() -> None:
    config = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    assert fused_config(config, {}, "float32")["rope_theta"] == 50.0
