"""What config.json and the tensors say, held to what mlx-lm computes of it: taken, translated or refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.errors import ModelError
from mlx_ppo.exporting.fuse import fused_config
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.gate import misread, translated, unknown_keys
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.parts import Context, InPlace
from mlx_ppo.models.positions import positions_of

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


UNREAD: dict[str, tuple[str, dict[str, Any]]] = {  # declared by mlx-lm's class, or hard-coded in it, and not computed
    "rope_scaling": ("qwen3_moe", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
    "norm_topk_prob": ("qwen2_moe", {"norm_topk_prob": True}),
    "swiglu_limit": ("gpt_oss", {"swiglu_limit": 5.0}),
    "final_logit_softcapping": ("nanochat", {"final_logit_softcapping": 30.0}),
    "layer_norm_epsilon": ("mamba", {"layer_norm_epsilon": 1e-3}),
    "rope_interleave": ("deepseek_v3", {"rope_interleave": False}),
    "partial_rotary_factor": ("glm", {"partial_rotary_factor": 0.5}),
    "clip_qkv": ("olmoe", {"clip_qkv": 8.0}),
}


@pytest.mark.parametrize("key", UNREAD)
def test_what_a_class_declares_and_does_not_compute_is_refused(key: str) -> None:
    kind, keys = UNREAD[key]
    with pytest.raises(ModelError, match=f"'{key}'"):
        translated({"model_type": kind, **keys}, "m")


PUBLISHED: dict[str, dict[str, Any]] = {  # as the models' makers wrote them, but for their sizes
    "llama-3.2": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": [2, 3], "head_dim": 64, "hidden_act": "silu", "initializer_range": 0.02, "mlp_bias": False,
        "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05, "tie_word_embeddings": True,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": True,
    },
    "smollm2": {
        "architectures": ["LlamaForCausalLM"], "is_llama_config": True, "model_type": "llama", "hidden_act": "silu",
        "pad_token_id": 2, "pretraining_tp": 1, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "initializer_range": 0.041666666666666664,
    },
    "qwen2.5": {
        "model_type": "qwen2", "hidden_act": "silu", "max_window_layers": 21, "sliding_window": 32768,
        "use_mrope": False, "use_sliding_window": False, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
    "gemma-3": {
        "model_type": "gemma3_text", "attn_logit_softcapping": None, "cache_implementation": "hybrid",
        "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "_sliding_window_pattern": 6,
    },
    "phi-4-mini": {
        "model_type": "phi3", "embd_pdrop": 0.0, "resid_pdrop": 0.0, "full_attn_mod": 1, "interpolate_factor": 1,
        "lm_head_bias": False, "mlp_bias": False, "hidden_act": "silu", "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "sliding_window": 262144,
    },
    "smollm3": {
        "model_type": "smollm3", "layer_types": ["full_attention"] * 2, "max_window_layers": 28, "rope_scaling": None,
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1], "sliding_window": None, "use_sliding_window": False,
    },
    "gpt2": {
        "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "n_ctx": 1024,
        "model_type": "gpt2", "summary_activation": None, "summary_first_dropout": 0.1, "summary_type": "cls_index",
        "summary_proj_to_labels": True, "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "pythia": {
        "model_type": "gpt_neox", "hidden_act": "gelu", "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "use_parallel_residual": True, "tie_word_embeddings": False, "classifier_dropout": 0.1,
    },
    "granite-3": {
        "model_type": "granite", "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "hidden_act": "silu",
        "logits_scaling": 8.0, "residual_multiplier": 0.22, "rope_theta": 10000000.0, "rope_scaling": None,
    },
    "olmo-2": {"model_type": "olmo2", "hidden_act": "silu", "rope_theta": 500000, "rope_scaling": None},
    "qwen3, quantised by mlx-lm": {
        "model_type": "qwen3", "quantization": {"group_size": 64, "bits": 4}, "max_window_layers": 28,
        "quantization_config": {"group_size": 64, "bits": 4}, "use_sliding_window": False, "sliding_window": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_taken_without_a_word(name: str) -> None:
    translated(PUBLISHED[name], name)
    assert unknown_keys(PUBLISHED[name], name) == []


@pytest.mark.parametrize("keys", [{"embedding_scale": 3.0}, {"norm_type": "layernorm"}, {"use_post_norm": True}])
def test_a_key_that_nobody_knows_is_named(copy: Copy, keys: dict[str, Any]) -> None:
    (line,) = [text for text in load_trunk(copy(**keys)).remarks if "warning" in text]
    assert f"'{next(iter(keys))}'" in line
    assert unknown_keys({"model_type": "llama", **dict.fromkeys(keys, False)}, "m") == [], "off is nothing"


def test_gpt_neox_of_transformers_5_has_its_bases_where_mlx_lm_reads_them() -> None:
    rope = {"rope_theta": 50.0, "partial_rotary_factor": 0.5}
    for config in (rope, {"rope_parameters": rope}):
        assert translated({"model_type": "gpt_neox", **config}, "m") == {"rotary_emb_base": 50.0, "rotary_pct": 0.5}


def test_gpt2_with_the_names_of_transformers_is_the_same_model(copy: Copy) -> None:
    plain, foreign = copy("gpt2"), copy("gpt2")
    arrays = {f"transformer.{name.removeprefix('model.')}": array for name, array in arrays_of(plain).items()}
    for name in arrays:  # a convolution's matrices lie the other way round, and so sanitised
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            arrays[name] = arrays[name].T
    mx.save_safetensors(str(foreign / "model.safetensors"), arrays, metadata={"format": "pt"})
    np.testing.assert_allclose(logits(foreign), logits(plain), rtol=0, atol=1e-5)  # transposed, so summed otherwise
    assert misread(check_model_folder(plain)) == []
    assert misread(check_model_folder(foreign)) == ["the tensors' names"], "stock mlx-lm can't read it"


def test_the_gelu_is_that_of_the_configuration(copy: Copy) -> None:
    exact, by_tanh = (logits(copy("gpt2", activation_function=name)) for name in ("gelu", "gelu_new"))
    assert 1e-6 < np.abs(exact - by_tanh).max() < 1e-2
    np.testing.assert_array_equal(logits(copy("gpt2")), by_tanh)


def test_gemma3_scales_its_embeddings_by_the_exact_root(copy: Copy) -> None:
    trunk = load_trunk(copy("gemma3_text"), dtype="float32")
    first, entering = trunk.inner.layers[0], list[mx.array]()

    def note(states: mx.array, *given: Any, **named: Any) -> mx.array:
        entering.append(states)
        return first(states, *given, **named)

    trunk.inner.layers[0] = InPlace(first, note)
    trunk.hidden(TOKENS)
    factor = np.array(entering[0]) / np.array(trunk.inner.embed_tokens(TOKENS))
    np.testing.assert_allclose(factor, np.sqrt(32), rtol=1e-6)


@pytest.mark.parametrize("keys", [
    {"hidden_act": ["silu"]}, {"hidden_act": {"a": 1}}, {"rope_scaling": {"rope_type": "yarn", "factor": "x"}},
    {"rope_parameters": {"rope_theta": [1]}}, {"layer_types": [1, None]}, {"rope_theta": "x"},
])  # fmt: skip
def test_values_of_a_kind_that_nobody_expects_are_refused(copy: Copy, keys: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="copy"):
        load_trunk(copy(**keys))
