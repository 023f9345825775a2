"""Run by a Python that has torch and transformers: tiny models as transformers 5 saves them, with their logits.

python torch_models.py FOLDER
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch
import transformers as T

torch.set_num_threads(1)  # the workers of the tests share the processors

out = Path(sys.argv[1])
torch.manual_seed(0)
base = dict(
    vocab_size=8016,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.3,
)
rope = {"rope_type": "default", "rope_theta": 50.0}
hd = dict(head_dim=8)
gpt2 = dict(
    vocab_size=8016,
    n_embd=32,
    n_head=4,
    n_layer=2,
    n_positions=128,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)
C = {
    "llama": T.LlamaConfig(**base, rope_parameters=rope),
    "llama3": T.LlamaConfig(
        **base,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 50.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "yarn": T.Qwen2Config(
        **base,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 50.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "linear": T.LlamaConfig(
        **base, tie_word_embeddings=True, rope_parameters={"rope_type": "linear", "rope_theta": 50.0, "factor": 4.0}
    ),
    "mistral": T.MistralConfig(**base, **hd, rope_parameters=rope, sliding_window=None),
    "qwen2": T.Qwen2Config(**base, rope_parameters=rope),
    "qwen3": T.Qwen3Config(**base, **hd, rope_parameters=rope),
    "gemma2": T.Gemma2Config(**base, **hd, rope_parameters=rope, query_pre_attn_scalar=8),
    "gemma3_text": T.Gemma3TextConfig(
        **base,  # mlx-lm rounds the embedding's factor, the root of its size, to bfloat16
        **hd,
        query_pre_attn_scalar=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 20.0}},
    ),
    "gemma": T.GemmaConfig(**base, **hd, rope_parameters=rope),
    "starcoder2": T.Starcoder2Config(**base, rope_parameters=rope, sliding_window=None),
    "gpt_neox": T.GPTNeoXConfig(
        **{key: value for key, value in base.items() if key != "num_key_value_heads"} | {"intermediate_size": 128},
        rope_parameters={**rope, "partial_rotary_factor": 0.25},
    ),
    "qwen3_moe": T.Qwen3MoeConfig(
        **base,
        **hd,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 50.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "phi3": T.Phi3Config(**base, rope_parameters={**rope, "partial_rotary_factor": 1.0}),
    "phi3long": T.Phi3Config(
        **base,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 50.0,
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 64,
        },
    ),
    "smollm3": T.SmolLM3Config(**base, rope_parameters=rope),
    "olmo2": T.Olmo2Config(**base, rope_parameters=rope),
    "granite": T.GraniteConfig(
        **base,
        rope_parameters=rope,
        logits_scaling=2.0,
        attention_multiplier=0.3,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
    ),
    "gelu": T.LlamaConfig(**base, rope_parameters=rope, hidden_act="gelu"),
    "gpt2": T.GPT2Config(**gpt2),
    "gpt2gelu": T.GPT2Config(**gpt2, activation_function="gelu"),
}
C["mistral3"] = T.Mistral3Config(
    text_config=dict(model_type="mistral", **base, **hd, rope_parameters=rope, sliding_window=None),
    vision_config=dict(
        model_type="pixtral",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    ),
    tie_word_embeddings=False,
)
ids = torch.tensor([[1, 5, 77, 1234, 9, 4021, 300, 7, 11, 4567, 12, 13]])
for name, c in C.items():
    cls = T.Mistral3ForConditionalGeneration if name == "mistral3" else T.AutoModelForCausalLM
    m = (cls(c) if name == "mistral3" else cls.from_config(c)).eval().float()
    d = out / name
    m.save_pretrained(d)
    with torch.no_grad():
        np.save(d / "logits.npy", m(input_ids=ids).logits[0].numpy())
