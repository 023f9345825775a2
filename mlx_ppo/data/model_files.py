"""One safetensors or JSON file of a model folder, checked to the byte before any library reads it."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_ppo.errors import ModelError
from mlx_ppo.files import open_regular, read_regular

if TYPE_CHECKING:
    import mlx.core as mx

Tensors = dict[str, tuple[str, tuple[int, ...]]]

_ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4},
    **{"U64": 8, "I64": 8, "C64": 8},
}  # the types that mlx reads
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_LARGEST_RANK = 32
_LARGEST_JSON = 1 << 27  # bytes; the largest tokenizers in use have 35 MB
_SAMPLE, _SAMPLES = 1 << 12, 16  # bytes of a place in a tensor, and places
_POINTER = b"version https://git-lfs"


def wrong(where: Path, what: str) -> ModelError:
    """An error about a file or folder."""
    return ModelError(f"{where}: {what}")


def quoted(name: object) -> str:
    """A name from a file, cut: it may be as long as the file."""
    text = str(name)
    return f"'{text if len(text) <= 100 else text[:100] + '…'}'"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Parsers differ in which of two equal keys they take."""
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"the key {quoted(twice[0])} appears twice")
    return dict(pairs)


def _parsed(file: Path, content: bytes, *, header: bool = False) -> dict[str, Any]:
    what = "header: " if header else ""
    if content.startswith(b"\xef\xbb\xbf"):
        raise wrong(file, f"{what}starts with a byte-order mark; save it as UTF-8 without one")
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique if header else None)
    except UnicodeDecodeError as error:
        raise wrong(file, f"{what}not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:  # besides syntax: a repeated key, thousands of digits, deep nesting
        raise wrong(file, f"{what}malformed JSON: {error}") from None
    if not isinstance(value, dict):
        raise wrong(file, f"{what}not a JSON object")
    return value


def json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError when there is none."""
    check_regular(file)
    try:
        return _parsed(file, read_regular(file, _LARGEST_JSON))
    except OSError as error:
        raise wrong(file, f"can't be read: {error.strerror or error}") from None


def check_regular(file: Path) -> None:
    """ModelError unless this is a file with content of its own."""
    try:
        with open_regular(file) as stream:
            start = stream.read(len(_POINTER))
    except OSError as error:
        raise wrong(file, f"can't be read: {error.strerror or error}") from None
    if not start:
        raise wrong(file, "an empty file; copy it again")
    if start == _POINTER:
        raise wrong(file, "a Git LFS pointer, not the file itself; fetch it with git lfs pull")


def check_safetensors(file: Path) -> Tensors:
    """The tensors of one file whose header tells the truth about every byte."""
    header, _ = _header(file)
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def fingerprint(files: Iterable[Path]) -> str:
    """Tells weights from others: SHA-256 of each tensor's name, type, shape and up to 64 KiB of its bytes.

    It doesn't depend on how they are spread over files.

    Raises:
        ModelError: a file is missing or damaged.
    """
    parts: dict[str, str] = {}
    for file in files:
        header, start = _header(file)
        with open_regular(file) as stream:
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
                for place in range(begin, end, max(_SAMPLE, -(-(end - begin) // _SAMPLES))):
                    stream.seek(start + place)
                    digest.update(stream.read(min(_SAMPLE, end - place)))
                parts[name] = digest.hexdigest()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """A checked file's entries, and where its data begin."""
    check_regular(file)
    size = file.stat().st_size
    with open_regular(file) as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise wrong(file, f"truncated, or not safetensors: its header should have {length} bytes; copy it again")
        if length > _LARGEST_HEADER:
            raise wrong(file, f"a header of {length} bytes; safetensors allows {_LARGEST_HEADER}")
        content = stream.read(length)
    if not content.startswith(b"{"):
        raise wrong(file, "header: doesn't begin with {; not safetensors, or damaged")
    header = _parsed(file, content, header=True)
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # as mlx writes where it has nothing to say
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise wrong(file, "header: '__metadata__' must hold strings only")
    if not header:
        raise wrong(file, "holds no tensors")
    ranges = sorted((*_range(file, name, entry), name) for name, entry in header.items())
    _check_ranges(file, ranges, size - 8 - length)
    _check_with_library(file, set(header))
    return header, 8 + length


def _range(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end; as many as its type and shape need."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end], **rest}:
            whole = not rest and len(shape) <= _LARGEST_RANK
        case _:
            whole = False
    if not whole or not all(type(count) is int and 0 <= count < 2**63 for count in (*shape, begin, end)):
        raise wrong(file, f"header: tensor {quoted(name)} is malformed")
    if dtype not in _ITEM_BYTES:
        raise wrong(file, f"tensor {quoted(name)} has the type {quoted(dtype)}, which mlx doesn't read")
    needed = math.prod(shape) * _ITEM_BYTES[dtype]
    if needed != end - begin:
        raise wrong(file, f"tensor {quoted(name)}: {dtype} {shape} needs {needed} bytes, its range has {end - begin}")
    return begin, end


def _check_ranges(file: Path, ranges: list[tuple[int, int, str]], size: int) -> None:
    """The ranges follow one another from the first byte to the last."""
    last = max(end for _, end, _ in ranges)
    if last > size:
        raise wrong(file, f"truncated: its tensors need {last} bytes, {size} are there; copy it again")
    position = 0
    for begin, end, name in ranges:
        if begin != position:
            what = (
                "overlaps the one before" if begin < position else f"leaves {begin - position} bytes before it unused"
            )
            raise wrong(file, f"the range of tensor {quoted(name)} {what}; the file is damaged or forged")
        position = end
    if position < size:
        raise wrong(file, f"{size - position} bytes after the last tensor; the file is damaged or forged")


def _check_with_library(file: Path, names: set[str]) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            same = set(opened.keys()) == names
    except SafetensorError as error:
        raise wrong(file, f"safetensors refuses it: {error}") from None
    if not same:
        raise wrong(file, "safetensors finds other tensors in it than its header names")


def read_arrays(file: Path) -> "dict[str, mx.array]":
    """The arrays of a checked safetensors file, lazily read.

    Raises:
        ModelError: the file is missing or damaged.
    """
    import mlx.core as mx  # the checks before a library sees a file need none

    if not file.is_file():
        raise wrong(file, "missing")
    check_safetensors(file)
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    return arrays
