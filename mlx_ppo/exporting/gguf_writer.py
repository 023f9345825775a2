"""One GGUF file that llama.cpp loads: written tensor by tensor, and read back by the `gguf` package's own reader."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ModelError, RunError
from mlx_ppo.exporting.architectures import (
    Architecture,
    architecture_of,
    extra_tensors,
    permute,
    tensor_names,
    unpermute,
)
from mlx_ppo.exporting.check import Floats
from mlx_ppo.exporting.vocabulary import Fields, vocabulary
from mlx_ppo.models.folder import ModelFolder

_FILE_TYPES = {"f16": 1, "q8_0": 7}  # llama.cpp's LLAMA_FTYPE_MOSTLY_F16 and _Q8_0
_QUANTISATION_VERSION = 2
_BLOCK = 32  # weights of a Q8_0 block


@dataclass(frozen=True)
class Content:
    """What a GGUF file is to say."""

    architecture: Architecture
    fields: Fields  # metadata by key
    tensors: Mapping[str, tuple[str, mx.array]]  # GGUF name -> mlx name, float32 array as in mlx
    extra: Mapping[str, Floats]  # tensors that mlx computes instead
    dtype: str


def gguf_content(
    source: ModelFolder, tokenizer: Tokenizer, arrays: Mapping[str, mx.array], *, name: str, dtype: str
) -> Content:
    """Metadata and tensors of a model.

    Args:
        source: the folder whose configuration and tokenizer the model has.
        tokenizer: as loaded from it.
        arrays: every parameter, float32.
        name: for `general.name`.
        dtype: "f16" or "q8_0" for matrices; vectors stay float32.
    Raises:
        ModelError: an architecture, a position encoding or a tokenizer that isn't written.
    """
    architecture = architecture_of(source.path, source.config)
    names = tensor_names(architecture, arrays)
    rows = arrays["model.embed_tokens.weight"].shape[0]
    fields: Fields = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": _QUANTISATION_VERSION,
        **architecture.fields,
        f"{architecture.name}.vocab_size": rows,
        **vocabulary(source.path, tokenizer, rows),
    }
    tensors = {names[own]: (own, array) for own, array in arrays.items()}
    return Content(architecture, fields, tensors, extra_tensors(architecture), dtype)


def write_gguf(file: Path, content: Content) -> None:
    """Write the file; no more than one tensor is held twice.

    Raises:
        ModelError: a weight doesn't fit into float16.
    """
    import gguf

    writer = gguf.GGUFWriter(file, content.architecture.name)
    try:
        for key, value in content.fields.items():
            _add(writer, key, value)
        shapes = {name: tuple(array.shape) for name, (_, array) in content.tensors.items()}
        shapes |= {name: array.shape for name, array in content.extra.items()}
        for name, shape in shapes.items():
            kind = _kind(shape, content.dtype)
            stored = gguf.quants.quant_shape_to_byte_shape(shape, kind) if kind.name == "Q8_0" else shape
            size = int(np.prod(stored)) * {"Q8_0": 1, "F16": 2, "F32": 4}[kind.name]
            item = {"Q8_0": np.uint8, "F16": np.float16, "F32": np.float32}[kind.name]
            writer.add_tensor_info(name, stored, np.dtype(item), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in shapes:
            array = meant(content, name)
            writer.write_tensor_data(_stored(name, array, _kind(array.shape, content.dtype)))
    finally:
        writer.close()


def meant(content: Content, name: str) -> Floats:
    """A tensor of the file in float32, rows of queries and keys in llama.cpp's order."""
    if name in content.extra:
        return content.extra[name]
    own, array = content.tensors[name]
    return permute(content.architecture, own, np.array(array))


def _stored(name: str, array: Floats, kind: Any) -> np.ndarray[Any, Any]:
    import gguf

    with np.errstate(over="ignore"):
        stored: np.ndarray[Any, Any] = gguf.quants.quantize(array, kind)
    if kind.name != "F32" and not np.isfinite(gguf.quants.dequantize(stored, kind)).all():
        raise ModelError(f"{name}: its values don't fit into float16, which GGUF's {kind.name} needs; export fused")
    return np.ascontiguousarray(stored)


def _kind(shape: tuple[int, ...], dtype: str) -> Any:
    """float32 for vectors; float16 for rows that no whole number of blocks fills, as llama.cpp does."""
    from gguf import GGMLQuantizationType as Kind

    if len(shape) < 2:
        return Kind.F32
    return Kind.Q8_0 if dtype == "q8_0" and shape[-1] % _BLOCK == 0 else Kind.F16


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def read_back(file: Path, content: Content) -> tuple[dict[str, mx.array], float]:
    """Read a file by the `gguf` package and compare metadata and every tensor with what was meant.

    Returns:
        The tensors under their mlx names, in float32 and mlx's order of rows, and the largest difference of a weight.
    Raises:
        RunError: something is missing, or differs by more than its type explains.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    for key, value in content.fields.items():
        field = reader.fields.get(key)
        if field is None or not _same(field.contents(), value):
            raise RunError(f"{file.name}: {key} was not read back as written")
    names = {tensor.name for tensor in reader.tensors}
    if names != content.tensors.keys() | content.extra.keys():
        raise RunError(f"{file.name}: other tensors were read back than were written")
    found: dict[str, mx.array] = {}
    largest = 0.0
    for tensor in reader.tensors:
        wanted = meant(content, tensor.name)
        array = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        error = _error(wanted, array.reshape(wanted.shape), tensor.tensor_type.name)
        if not error < np.inf:
            raise RunError(f"{file.name}: {tensor.name} differs by more than {tensor.tensor_type.name} explains")
        largest = max(largest, error)
        if tensor.name in content.tensors:
            own = content.tensors[tensor.name][0]
            found[own] = mx.array(unpermute(content.architecture, own, array.reshape(wanted.shape)))
    return found, largest


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, list) and wanted and isinstance(wanted[0], float):
        return np.array_equal(np.array(found, np.float32), np.array(wanted, np.float32))
    if isinstance(wanted, float):
        return bool(np.float32(found) == np.float32(wanted))
    return bool(found == wanted)


def _error(wanted: Floats, found: Floats, kind: str) -> float:
    """The largest difference; infinite where one is larger than the type's own rounding.

    float16 keeps 11 bits. Q8_0 has 32 weights of a block share a step of a 127th of the largest, itself in float16.
    """
    gap = np.abs(wanted - found)
    if kind == "Q8_0":
        largest = np.abs(wanted).reshape(*wanted.shape[:-1], -1, _BLOCK).max(axis=-1)
        allowed = np.repeat(largest * (0.5 / 127 + 2**-11) + 127 * 2**-25, _BLOCK, axis=-1) * 1.01
    elif kind == "F16":
        allowed = np.abs(wanted) * 2**-11 + 2**-25
    else:
        allowed = np.zeros_like(wanted)
    return float(gap.max()) if (gap <= allowed).all() else float("inf")
