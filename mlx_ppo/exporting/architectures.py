"""The architectures that are written as GGUF: metadata, tensor names, and the order of rows that llama.cpp expects."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_ppo.errors import ModelError
from mlx_ppo.exporting.check import Floats
from mlx_ppo.models.gate import translated

NAMES = ("llama", "qwen2", "qwen3")
_DEFAULT_BASE = 10000.0
_DEFAULT_CONTEXT = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp has to know of a model beside its tensors and its vocabulary."""

    name: str
    blocks: int
    heads: int
    key_heads: int
    head_dim: int
    base: float
    scaling: Mapping[str, Any]  # of rotary positions; empty: none
    fields: dict[str, Any]


def architecture_of(path: Path, config: Mapping[str, Any]) -> Architecture:
    """Read a config.json.

    Raises:
        ModelError: llama.cpp has no such model, or one that would compute something else.
    """
    name = config["model_type"]
    if name not in NAMES:
        raise ModelError(f"{path}: {name} models aren't written as GGUF, only {', '.join(NAMES)}; use --format fused")
    config = {**config, **translated(config, str(path))}
    _refuse(path, config)
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    key_heads = int(config.get("num_key_value_heads") or heads)
    base = float(config.get("rope_theta") or _DEFAULT_BASE)
    scaling = _scaling(path, config.get("rope_scaling"))
    blocks = int(config["num_hidden_layers"])
    fields: dict[str, Any] = {
        "block_count": blocks,
        "context_length": int(config.get("max_position_embeddings") or _DEFAULT_CONTEXT[name]),
        "embedding_length": int(config["hidden_size"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": key_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
        "rope.freq_base": base,
    }
    if scaling.get("type") == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    own = {f"{name}.{key}": value for key, value in fields.items()}
    return Architecture(name, blocks, heads, key_heads, head_dim, base, scaling, own)


def _refuse(path: Path, config: Mapping[str, Any]) -> None:
    layers = config.get("layer_types")
    odd = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "rope_traditional": bool(config.get("rope_traditional")),
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0) != 1.0,
        "layer_types": isinstance(layers, list) and "sliding_attention" in layers,
        "use_sliding_window": bool(config.get("use_sliding_window")),
    }
    found = [key for key, wrong in odd.items() if wrong]
    if found:
        raise ModelError(f"{path}: its {found[0]} can't be written as GGUF; use --format fused")


def _scaling(path: Path, scaling: Any) -> dict[str, Any]:
    """How rotary positions are stretched, under "type" and mlx-lm's other names."""
    if not isinstance(scaling, dict):
        return {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {}
    if kind not in ("linear", "llama3"):
        raise ModelError(f"{path}: rope_scaling of type {kind!r} isn't written as GGUF; use --format fused")
    return {**scaling, "type": kind}


def extra_tensors(architecture: Architecture) -> dict[str, Floats]:
    """What llama 3.1's stretched positions divide each rotary frequency by, as llama.cpp wants it.

    Source: mlx_lm.models.rope_utils.Llama3RoPE, the same rule.
    """
    scaling = architecture.scaling
    if scaling.get("type") != "llama3":
        return {}
    factor, low, high = (
        float(scaling.get(key, other))
        for key, other in (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))
    )
    before = float(scaling.get("original_max_position_embeddings", 8192))
    dims = np.arange(0, architecture.head_dim, 2, dtype=np.float64)
    turns = before * architecture.base ** (-dims / architecture.head_dim) / (2 * math.pi)  # within the first context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


def tensor_names(architecture: Architecture, names: Iterable[str]) -> dict[str, str]:
    """GGUF's names of mlx-lm's parameters.

    Raises:
        ModelError: a parameter that the architecture has no name for.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    kind = MODEL_ARCH[architecture.name.upper()]
    known = get_tensor_name_map(kind, architecture.blocks)
    found: dict[str, str] = {}
    for name in names:
        other = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if other is None:
            raise ModelError(f"{name}: GGUF's {architecture.name} models have no such tensor; use --format fused")
        found[name] = other
    return found


def permute(architecture: Architecture, name: str, array: Floats) -> Floats:
    """Rows of llama's queries and keys from rotary halves, as in mlx-lm, to neighbouring pairs; others as they are.

    Within a head of d rows, row i of the first half becomes row 2 i, row i of the second half row 2 i + 1.
    """
    heads = _rotary_heads(architecture, name)
    if not heads:
        return array
    halves = array.reshape(heads, 2, architecture.head_dim // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def unpermute(architecture: Architecture, name: str, array: Floats) -> Floats:
    """The inverse of `permute`."""
    heads = _rotary_heads(architecture, name)
    if not heads:
        return array
    pairs = array.reshape(heads, architecture.head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _rotary_heads(architecture: Architecture, name: str) -> int:
    """Heads of a query or key projection whose rows llama.cpp has in another order; 0: none."""
    side = re.search(r"self_attn\.([qk])_proj\.(weight|bias)$", name)
    if architecture.name != "llama" or side is None:
        return 0
    return architecture.heads if side[1] == "q" else architecture.key_heads
