"""A Hugging Face or mlx-lm folder into a normalised copy."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ppo.data.model_files import quoted, read_arrays, wrong
from mlx_ppo.importing.shards import ShardWriter
from mlx_ppo.models.folder import ModelFolder, check_model_folder
from mlx_ppo.models.gate import translated

_CARRIED = (".json", ".model", ".jinja", ".txt")
_INDEX = "model.safetensors.index.json"
_QUANTIZATION = ("quantization", "quantization_config")
_FLOATING = {"F32", "F16", "BF16"}


def copy_folder(source: Path, folder: Path, dtype: mx.Dtype | None) -> tuple[str, int, int, str]:
    """Copy a checked folder into `folder`, its rope where mlx-lm looks for it, its weights in another type if wanted.

    Returns:
        the kind of model, how many tensors, their bytes, and how they are stored.

    Raises:
        ModelError: the source isn't a sound model folder, or is quantised in a way that can't be undone here.
    """
    checked = check_model_folder(source)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name.endswith(_CARRIED) and file.name not in (_INDEX, "config.json"):
            shutil.copyfile(file, folder / file.name)
    config = {**checked.config, **translated(checked.config, str(source))}
    if dtype is None:
        for file in checked.weight_files:
            shutil.copyfile(file, folder / file.name)
        if (source / _INDEX).exists():
            shutil.copyfile(source / _INDEX, folder / _INDEX)
        size, stored = sum(file.stat().st_size for file in checked.weight_files), "as they were"
    else:
        size, stored = _convert(checked, folder, dtype), str(dtype).removeprefix("mlx.core.")
        config = {key: value for key, value in config.items() if key not in (*_QUANTIZATION, "dtype")}
        config["torch_dtype"] = stored
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return str(config["model_type"]), len(checked.tensors), size, stored


def _convert(checked: ModelFolder, folder: Path, dtype: mx.Dtype) -> int:
    """Every floating tensor into one type, one at a time; quantised ones dequantised."""
    scales = {name.removesuffix(".scales") for name in checked.tensors if name.endswith(".scales")}
    foreign = checked.config.get("quantization_config", {})
    if isinstance(foreign, dict) and "quant_method" in foreign:
        raise wrong(checked.path, f"quantised by {quoted(foreign['quant_method'])}; import it without --dtype")
    writer = ShardWriter(folder)
    arrays = {name: array for file in checked.weight_files for name, array in read_arrays(file).items()}
    for name in sorted(arrays):
        layer, _, part = name.rpartition(".")
        if layer in scales and part in ("scales", "biases"):
            continue
        array = _dequantised(checked, arrays, layer) if layer in scales else arrays[name]
        if layer in scales or checked.tensors[name][0] in _FLOATING:
            array = array.astype(dtype)
        mx.eval(array)
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            raise wrong(checked.path, f"tensor {quoted(name)} holds NaN or infinity as {dtype}")
        writer.add({name: array})
        arrays[name] = mx.array(0)  # so that its memory can go once its shard is written
    writer.finish()
    return writer.bytes


def _dequantised(checked: ModelFolder, arrays: dict[str, mx.array], layer: str) -> mx.array:
    described: Any = checked.config.get("quantization", checked.config.get("quantization_config"))
    own = described.get(layer, described) if isinstance(described, dict) else None
    biases = arrays.get(f"{layer}.biases")
    if not isinstance(own, dict) or own.get("mode", "affine") != "affine" or biases is None:
        raise wrong(checked.path, f"tensor {quoted(layer)} is quantised in a way that can't be undone here")
    try:
        parts = (arrays[f"{layer}.weight"], arrays[f"{layer}.scales"].astype(mx.float32), biases.astype(mx.float32))
        return mx.dequantize(*parts, group_size=own.get("group_size", 64), bits=own.get("bits", 4))
    except (KeyError, ValueError, TypeError) as error:
        raise wrong(checked.path, f"tensor {quoted(layer)} can't be dequantised: {error}") from None
