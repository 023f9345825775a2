"""A GGUF file's header, read with bounds: every count, length and offset is held against the file before it is used.

    magic, version | tensor count, metadata count | metadata | tensor directory | padding | tensor data

The file is read, not mapped: one that is cut short while it is being read ends in an error, not in a signal.
Source: the GGUF specification of ggml (docs/gguf.md), versions 2 and 3.
"""

import itertools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mlx_ppo.data.model_files import check_regular, quoted, wrong
from mlx_ppo.errors import ModelError

Array = np.ndarray[Any, np.dtype[Any]]
Kind = GGMLQuantizationType

READ = frozenset(
    {Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.IQ4_NL}
    | {Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K}
)
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_LARGEST_HEADER = 1 << 28  # bytes; the largest vocabularies in use need some 20 MB
_LARGEST_NAME = 1 << 10
_MOST_ENTRIES = 1 << 16  # metadata entries, and tensors
_MOST_STRINGS = 1 << 22  # in one list
_LARGEST_ALIGNMENT = 1 << 20
_HIGHEST_RANK = 4


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in the file."""

    kind: Kind
    shape: tuple[int, ...]  # as numpy and mlx count: the last dimension is contiguous
    offset: int  # bytes from the start of the file
    size: int  # bytes


@dataclass(frozen=True)
class GGUFFile:
    """A file whose header tells the truth about every byte."""

    path: Path
    metadata: dict[str, Any]  # strings, numbers, booleans; lists of strings; numpy arrays of numbers
    tensors: dict[str, StoredTensor]

    def rows(self, name: str, first: int, last: int) -> Array:
        """Raw bytes [last - first, bytes a row] of some rows of a tensor; a vector is one row.

        Raises:
            ModelError: the file has become shorter.
        """
        tensor = self.tensors[name]
        width = tensor.size // math.prod(tensor.shape[:-1])
        count = (last - first) * width
        found = np.fromfile(self.path, np.uint8, count, offset=tensor.offset + first * width)
        if found.size != count:
            raise wrong(self.path, f"has become shorter: the data of tensor {quoted(name)} is cut off")
        return found.reshape(last - first, width)


def read_gguf(path: Path) -> GGUFFile:
    """Read and check a header; no tensor data is read.

    Raises:
        ModelError: the first thing found wrong, in one line.
    """
    try:
        check_regular(path)
        with path.open("rb") as stream:
            return _Header(path, stream).read()
    except OSError as error:
        raise wrong(path, f"can't be read: {error.strerror or error}") from None


class _Header:
    """One pass over a header."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path, self._stream = path, stream
        self._size = path.stat().st_size
        self._position = 0

    def read(self) -> GGUFFile:
        tensors, entries = self._opening()
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string("a metadata key", _LARGEST_NAME)
            if key in metadata:
                raise self._wrong(f"the metadata key {quoted(key)} appears twice")
            metadata[key] = self._value(f"metadata {quoted(key)}")
        directory: dict[str, tuple[Kind, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self._string("a tensor's name", _LARGEST_NAME)
            if name in directory:
                raise self._wrong(f"tensor {quoted(name)} appears twice")
            directory[name] = self._entry(name)
        return GGUFFile(self._path, metadata, self._places(directory, self._alignment(metadata)))

    def _wrong(self, what: str) -> ModelError:
        return wrong(self._path, what)

    def _take(self, count: int, what: str) -> bytes:
        if count > self._size - self._position:
            raise self._wrong(
                f"truncated or forged: {what} needs {count} bytes, {self._size - self._position} are left"
            )
        if count > _LARGEST_HEADER - self._position:
            raise self._wrong(f"forged: a header of more than {_LARGEST_HEADER} bytes")
        content = self._stream.read(count)
        if len(content) != count:
            raise self._wrong(f"truncated: {what} is cut off")
        self._position += count
        return content

    def _number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form), what))[0]

    def _string(self, what: str, longest: int = _LARGEST_HEADER) -> str:
        length = self._number("<Q", f"the length of {what}")
        if length > longest:
            raise self._wrong(f"forged: {what} of {length} bytes")
        content = self._take(length, what)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._wrong(f"{what} isn't UTF-8 at its byte {error.start}") from None

    def _opening(self) -> tuple[int, int]:
        if self._take(4, "the magic") != b"GGUF":
            raise self._wrong("not a GGUF file: it doesn't begin with GGUF")
        version = self._number("<I", "the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            why = " in big-endian order" if swapped in (2, 3) else ""
            raise self._wrong(
                f"GGUF version {swapped if why else version}{why}; versions 2 and 3, little-endian, are read"
            )
        tensors, entries = self._number("<Q", "the tensor count"), self._number("<Q", "the metadata count")
        for count, what in ((tensors, "tensors"), (entries, "metadata entries")):
            if count > _MOST_ENTRIES:
                raise self._wrong(f"forged: {count} {what}; at most {_MOST_ENTRIES} are read")
        if not tensors:
            raise self._wrong("holds no tensors; a vocabulary without weights isn't a model")
        return tensors, entries

    def _value(self, what: str) -> Any:
        kind = self._number("<I", f"the type of {what}")
        if kind == _STRING:
            return self._string(what)
        if kind == _ARRAY:
            return self._array(what)
        if kind not in _NUMBERS:
            raise self._wrong(f"{what} has the unknown type {kind}")
        return np.frombuffer(self._take(np.dtype(_NUMBERS[kind]).itemsize, what), _NUMBERS[kind])[0].item()

    def _array(self, what: str) -> Any:
        kind, count = self._number("<I", f"the type of {what}"), self._number("<Q", f"the length of {what}")
        if kind == _STRING:
            if count > min(_MOST_STRINGS, (self._size - self._position) // 8):
                raise self._wrong(f"truncated or forged: {what} is a list of {count} strings")
            return [self._string(what) for _ in range(count)]
        if kind not in _NUMBERS:
            raise self._wrong(f"{what} is a list of the unknown type {kind}")
        return np.frombuffer(self._take(count * np.dtype(_NUMBERS[kind]).itemsize, what), _NUMBERS[kind])

    def _entry(self, name: str) -> tuple[Kind, tuple[int, ...], int]:
        what = f"the entry of tensor {quoted(name)}"
        rank = self._number("<I", what)
        if not 1 <= rank <= _HIGHEST_RANK:
            raise self._wrong(f"tensor {quoted(name)} has {rank} dimensions; 1 to {_HIGHEST_RANK} are read")
        shape = tuple(self._number("<Q", what) for _ in range(rank))[::-1]
        kind, offset = self._number("<I", what), self._number("<Q", what)
        if not all(shape) or math.prod(shape) >= 1 << 62:
            raise self._wrong(f"forged: tensor {quoted(name)} has the shape {list(shape)}")
        if kind not in READ:
            known = next((known.name for known in Kind if known == kind), str(kind))
            raise self._wrong(
                f"tensor {quoted(name)} has the type {known}; read are {', '.join(t.name for t in sorted(READ))}"
            )
        return Kind(kind), shape, offset

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        whole = type(alignment) is int and 8 <= alignment <= _LARGEST_ALIGNMENT and alignment.bit_count() == 1
        if not whole:
            raise self._wrong(f"general.alignment is {quoted(alignment)}; a power of two from 8 is needed")
        return int(alignment)

    def _places(
        self, directory: dict[str, tuple[Kind, tuple[int, ...], int]], alignment: int
    ) -> dict[str, StoredTensor]:
        start = -(-self._position // alignment) * alignment
        found: dict[str, StoredTensor] = {}
        for name, (kind, shape, offset) in directory.items():
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise self._wrong(
                    f"tensor {quoted(name)}: rows of {shape[-1]} don't divide into {kind.name} blocks of {block}"
                )
            size = math.prod(shape) // block * block_bytes
            if offset % alignment:
                raise self._wrong(f"tensor {quoted(name)} begins at {offset}, no multiple of the alignment {alignment}")
            if start + offset + size > self._size:
                raise self._wrong(
                    f"truncated or forged: tensor {quoted(name)} ends at byte {start + offset + size} of {self._size}"
                )
            found[name] = StoredTensor(kind, shape, start + offset, size)
        order = sorted(found, key=lambda name: found[name].offset)
        for before, after in itertools.pairwise(order):
            if found[before].offset + found[before].size > found[after].offset:
                raise self._wrong(
                    f"tensors {quoted(before)} and {quoted(after)} overlap; the file is damaged or forged"
                )
        return found


def metadata_value(
    file: GGUFFile, key: str, kind: type, default: Any = None, *, test: Callable[[Any], bool] | None = None
) -> Any:
    """A metadata value of the wanted type, or the default where it is absent.

    Raises:
        ModelError: it is absent without a default, of another type, or fails the test.
    """
    value = file.metadata.get(key, default)
    if value is None:
        raise wrong(file.path, f"the metadata {quoted(key)} is missing")
    if type(value) is not kind or (test is not None and not test(value)):
        raise wrong(file.path, f"the metadata {quoted(key)} is {quoted(value)}, which can't be")
    return value
