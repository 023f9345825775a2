"""What the keys of a config.json do: change the numbers, or not.

Found by going through the configurations and the code of transformers 5.24 for every kind of model that mlx-lm 0.32
has too: what its code reads beside mlx-lm's is in `NEUTRAL`, what changes nothing is in `NUMBERLESS`. Shapes, biases
and layers that are there or not are told by the tensors, which mlx-lm takes all or refuses.
"""

import re
from collections.abc import Mapping
from typing import Any

NEUTRAL: dict[str, tuple[Any, ...]] = {  # values with which a key that isn't read changes nothing
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "rope_interleaved": (None, False),
    "rope_interleave": (None, True),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "clip_qkv": (None,),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "use_bidirectional_attention": (None, False),
    "alibi": (None, False),
    "norm_topk_prob": (None, False),
    "swiglu_alpha": (None, 1.702),
    "swiglu_limit": (None, 7.0),
    "full_attn_alpha_factor": (None, 1),
    "full_attn_beta_factor": (None, 1),
    "linear_attn_alpha_factor": (None, 1),
    "linear_attn_beta_factor": (None, 1),
    "mlp_alpha_factor": (None, 1),
    "mlp_beta_factor": (None, 1),
    "mlp_hidden_act": (None, "relu2"),
    "mamba_hidden_act": (None, "silu"),
}
_OF_KIND: dict[str, dict[str, tuple[Any, ...]]] = {
    "nanochat": {"final_logit_softcapping": (None, 15)},
    "mamba": {"layer_norm_epsilon": (None, 1e-5)},
    "falcon_mamba": {"layer_norm_epsilon": (None, 1e-5)},
}

_NUMBERLESS_TEXT = """
# what a model is called, and how it is saved, loaded and computed
model_type architectures _name_or_path name_or_path transformers_version transformers.js_config torch_dtype dtype
quantization quantization_config auto_map _attn_implementation _attn_implementation_autoset attn_implementation
_flash_attn_2_enabled use_flash_attn cache_implementation use_cache return_dict output_attentions is_llama_config
output_hidden_states output_router_logits output_past chunk_size_feed_forward is_encoder_decoder is_decoder
cross_attention_hidden_size add_cross_attention tie_encoder_decoder pruned_heads torchscript use_bfloat16
tf_legacy_loss task_specific_params finetuning_task id2label label2id num_labels problem_type tokenizer_class prefix
gradient_checkpointing pretraining_tp unsloth_version unsloth_fixed tokenizer_version model_max_length
attention_softmax_in_fp32 scale_attention_softmax_in_fp32 reorder_and_upcast_attn residual_in_fp32 use_mambapy
use_associative_scan use_mamba_kernels chunk_size mamba_chunk_size num_logits_to_keep mamba_ssm_cache_dtype
# what generates
max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
num_return_sequences output_scores return_dict_in_generate remove_invalid_values suppress_tokens begin_suppress_tokens
exponential_decay_length_penalty sep_token_id decoder_start_token_id
# what starts and trains a model
initializer_range initializer_factor w_init_variance_scale final_w_init_variance_scale rescale_prenorm_residual
time_step_init_scheme time_step_scale time_step_min time_step_max time_step_floor linear_a_log_min linear_a_log_max
linear_dt_min linear_dt_max linear_dt_init_floor router_aux_loss_coef router_jitter_noise input_jitter_noise
router_z_loss_coef aux_loss_alpha seq_aux mtp_loss_scaling_factor num_nextn_predict_layers
# heads of other tasks, and other senses than text
summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout vision_config
audio_config projector_hidden_act multimodal_projector_bias vision_feature_layer vision_feature_select_strategy
spatial_merge_size mm_tokens_per_image image_seq_length image_size patch_size num_channels
# what the tensors tell, and what the gate looks at by itself
tie_word_embeddings vocab_size hidden_size intermediate_size n_inner num_attention_heads num_key_value_heads head_dim
num_hidden_layers n_ctx attention_bias mlp_bias qkv_bias use_bias lm_head_bias qk_head_dim expand mamba_expand
q_lora_rank num_local_experts mlp_layer_types mlp_only_layers decoder_sparse_step max_seq_len max_position_embeddings
original_max_position_embeddings rope_theta rope_parameters rope_scaling layer_types sliding_window use_sliding_window
max_window_layers sliding_window_pattern _sliding_window_pattern interpolate_factor full_attn_mod
no_rope_layer_interval hidden_act hidden_activation activation_function
"""
NUMBERLESS = frozenset(re.sub("#.*", "", _NUMBERLESS_TEXT).split())
_NUMBERLESS_FORM = re.compile(r"(\w*_token_(id|index|ids)|\w*dropout\w*|\w*_pdrop|unsloth_\w+|_?commit_hash)")


def reads(source: str, key: str) -> bool:
    """Whether code uses a key; a class that only declares it as a field leaves it out."""
    used = re.sub(rf"^    {re.escape(key)}\s*:.*$", "", source, flags=re.M)
    return mentions(used, key)


def mentions(source: str, key: str) -> bool:
    """Whether code has a key as a word at all."""
    return re.search(rf"\b{re.escape(key)}\b", source) is not None


def left_out(section: Mapping[str, Any], source: str) -> str | None:
    """The first key that changes the numbers, by its value, and isn't read."""
    computed = _neutral(section)
    wrong = (key for key, neutral in computed.items() if section.get(key) not in neutral and not reads(source, key))
    return next(wrong, None)


def _neutral(section: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return NEUTRAL | _OF_KIND.get(str(section.get("model_type")), {})


def unknown(section: Mapping[str, Any], source: str) -> list[str]:
    """Keys with a value of which neither mlx-lm's code nor this program knows anything."""
    return [
        key
        for key, value in section.items()
        if value not in (None, False, "", [], {})
        and key not in NUMBERLESS
        and key not in _neutral(section)
        and not _NUMBERLESS_FORM.fullmatch(key)
        and not mentions(source, key)
    ]
