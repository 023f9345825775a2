"""Tiny random models of several architectures, and their tokenizer, written as files."""

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

_WORDS = ("▁the", "▁a", "▁film", "▁is", "▁of", "▁good", "▁bad", "▁and", "▁it", "▁was", "▁story", "▁very", "▁not", "▁in")
_PIECES = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(97, 123)), *_WORDS)
VOCABULARY = 304  # the pieces (300), what transformers may add for a model type, and unused rows

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8}
COMMON_KINDS: list[tuple[str, dict[str, Any]]] = [  # of the architecture that numpy computes on a CPU
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_scaling": LLAMA3, "num_key_value_heads": 1, "vocab_size": 331}),
    ("qwen2", {"intermediate_size": 50}),
    ("qwen3", {"num_hidden_layers": 3}),
]

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "sliding_window_pattern": 2},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_ctx": 512, "n_positions": 512, "layer_norm_epsilon": 1e-5},
}


def write_word_tokenizer(folder: Path) -> None:
    """A unigram tokenizer with byte fallback, like that of `models/reviews`."""
    scores = [-10.0 if piece.startswith("<") else -float(6 - len(piece)) for piece in _PIECES]
    tokenizer = Tokenizer(models.Unigram(list(zip(_PIECES, scores, strict=True)), unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    document = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(document), "utf-8")


def write_weights(folder: Path, config: dict[str, Any], seed: int, deviation: float) -> None:
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    names = [name for name, _ in tree_flatten(model.parameters())]
    keys = dict(zip(names, mx.random.split(mx.random.key(seed), len(names)), strict=True))
    arrays = {}
    for name, array in tree_flatten(model.parameters()):
        noise = deviation * mx.random.normal(array.shape, key=keys[name])
        arrays[name] = noise if array.ndim > 1 or name.endswith("bias") else array + noise
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
