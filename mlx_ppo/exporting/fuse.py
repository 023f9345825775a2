"""A whole model folder: adapters merged into the base weights, or all weights as trained."""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ppo.compute.adapted import parameters_of
from mlx_ppo.compute.portable import DTYPES
from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import HEAD, Weights
from mlx_ppo.models.folder import ModelFolder
from mlx_ppo.models.gate import translated
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.models.write import carry

_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_GROUPS = (64, 32)  # mlx-lm's own size, and one for narrow models


def fused_arrays(trunk: Trunk, weights: Weights) -> dict[str, mx.array]:
    """Every parameter of the policy, in float32.

        W' = W + scale * (A B)^T

    Args:
        trunk: in float32, its quantised layers dequantised.
        weights: adapters, or parameters that replace the trunk's.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """
    arrays = dict(trunk.base)
    for name, array in weights.arrays.items():
        if name.startswith(HEAD) or name.endswith(".lora_b"):
            continue
        if name.endswith(".lora_a"):
            layer = name.removesuffix(".lora_a")
            update = weights.scale * (array @ weights.arrays[f"{layer}.lora_b"])
            arrays[f"{layer}.weight"] = arrays[f"{layer}.weight"] + update.T
        else:
            arrays[name] = array.astype(mx.float32)
    mx.eval(arrays)
    return arrays


def stored_dtype(folder: ModelFolder) -> str:
    """The floating type of most of a model folder's tensors (of a quantised one: of its scales)."""
    counted = Counter(_STORED[dtype] for dtype, _ in folder.tensors.values() if dtype in _STORED)
    return counted.most_common(1)[0][0] if counted else "float32"


def fused_config(config: Mapping[str, Any], arrays: Mapping[str, mx.array], dtype: str) -> dict[str, Any]:
    """The source's config.json with what the fused folder changes, readable by mlx-lm and by transformers.

    Whether the output layer is the embedding is written out, since the two libraries have different defaults.
    """
    changed = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    changed |= translated(changed, "config.json")
    changed["torch_dtype"] = dtype
    if "dtype" in changed:
        changed["dtype"] = dtype
    if "text_config" not in changed:
        changed["tie_word_embeddings"] = not any(name.split(".")[-2:] == ["lm_head", "weight"] for name in arrays)
    return changed


def write_fused(
    folder: Path, source: ModelFolder, arrays: Mapping[str, mx.array], *, dtype: str, bits: int | None
) -> None:
    """Fill a folder with weights, configuration, tokenizer and chat template.

    Args:
        folder: empty.
        source: where configuration and tokenizer come from.
        arrays: every parameter, float32.
        dtype: type to store; of a quantised model, that of its scales and of what isn't quantised.
        bits: quantise to 4 or 8 bits, by mlx-lm's own function.
    Raises:
        ModelError: a weight is too large for the type, or no layer can be quantised.
    """
    carry(source.path, folder)
    config = fused_config(source.config, arrays, dtype)
    _write_json(folder / "config.json", config)
    cast = {name: array.astype(DTYPES[dtype]) for name, array in arrays.items()}
    for name, array in cast.items():
        if not mx.isfinite(array).all().item():
            raise ModelError(f"{name}: its values don't fit into {dtype}; export with --dtype bfloat16 or float32")
    mx.save_safetensors(str(folder / "model.safetensors"), cast, metadata={"format": "mlx"})
    if bits is not None:
        _quantise(folder, config, bits)


def _quantise(folder: Path, config: dict[str, Any], bits: int) -> None:
    from mlx_lm.utils import load_model, quantize_model

    model, _ = load_model(folder, lazy=False, strict=True, trust_remote_code=False)
    width = config.get("hidden_size", 0)
    group = next((size for size in _GROUPS if width % size == 0), _GROUPS[-1])
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(model, config, group, bits)
    arrays = parameters_of(model)
    if not any(name.endswith(".scales") for name in arrays):
        raise ModelError(f"no layer's width is a multiple of {group}, so that none can be quantised")
    mx.eval(arrays)  # before their file is replaced
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    _write_json(folder / "config.json", config)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
