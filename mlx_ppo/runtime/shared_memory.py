"""What processes of one machine exchange, in memory that all of them map and no other user can open.

Each process has two places of its own there, used in turn: it writes a piece into one, meets the others, and reads
their pieces. Whoever writes to a place again has met all others after they had read it.
"""

import _posixshmem
import fcntl
import math
import mmap
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.runtime.group import UNSIGNED, Several

_PLACE = 1 << 20  # bytes; what is larger goes piece by piece
_LENGTH = 8  # bytes before them, which say how many there are in all
_TURNS = 2
_FLOAT = 4  # bytes
_STREAMS = 3  # descriptors that a child process has otherwise

Numbers = np.ndarray[Any, Any]


def new_memory(processes: int) -> int:
    """The descriptor of memory for so many processes; who inherits it can map it."""
    if sys.platform == "linux" and hasattr(os, "memfd_create"):  # which some builds of Python lack
        found = os.memfd_create("mlx-ppo")
    else:
        name = f"/mlx-ppo-{secrets.token_hex(8)}"
        found = _posixshmem.shm_open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        _posixshmem.shm_unlink(name)
    try:
        os.ftruncate(found, _bytes(processes))
        return fcntl.fcntl(found, fcntl.F_DUPFD_CLOEXEC, _STREAMS)
    finally:
        os.close(found)


def _bytes(processes: int) -> int:
    return _TURNS * processes * (_LENGTH + _PLACE)


class SharedMemory(Several):
    """Several processes of one machine."""

    def __init__(
        self, descriptor: int, rank: int, size: int, meet: Callable[[], None], names: Sequence[str] = ()
    ) -> None:
        """Map the memory.

        Args:
            descriptor: of `new_memory`, which can be closed afterwards.
            rank: of this process.
            size: how many there are.
            meet: returns when all have come.
            names: of the processes, by rank, for the one that leads.
        """
        self.rank, self.size, self.names, self._meet = rank, size, names, meet
        shape = (_TURNS, size, _LENGTH + _PLACE)
        self._places: Numbers = np.frombuffer(mmap.mmap(descriptor, _bytes(size)), np.uint8).reshape(shape)
        self._turn = 0

    def total(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Added by each process for itself, in the order of the ranks; piece by piece."""
        mx.eval(arrays)
        shapes = {name: array.shape for name, array in arrays.items()}
        left = {name: array.size for name, array in arrays.items()}
        assert all(array.dtype == mx.float32 for array in arrays.values())
        found = {name: arrays.pop(name) for name, size in left.items() if not size}
        own, sums = dict[str, Numbers](), dict[str, Numbers]()
        for pieces in _together(left, _PLACE // _FLOAT):
            mine = self._next().view(np.float32)
            for piece in pieces:
                if piece.name in arrays:
                    own[piece.name] = np.asarray(arrays.pop(piece.name)).reshape(-1)
                mine[piece.place] = own[piece.name][piece.of]
                left[piece.name] -= piece.numbers
                if not left[piece.name]:
                    del own[piece.name]
            theirs = self._come().view(np.float32)
            for piece in pieces:
                if piece.name not in sums:
                    sums[piece.name] = np.empty(math.prod(shapes[piece.name]), np.float32)
                _add(theirs[:, piece.place], sums[piece.name][piece.of])
                if not left[piece.name]:
                    found[piece.name] = mx.array(sums.pop(piece.name)).reshape(shapes[piece.name])
        mx.eval(found)
        return {name: found[name] for name in shapes}

    def rows(self, array: mx.array, counts: Sequence[int]) -> mx.array:
        """By their bits."""
        joined, _ = self._joined(_bits(array))
        found = mx.array(joined).view(array.dtype).reshape(sum(counts), *array.shape[1:])
        mx.eval(found)
        return found

    def given(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The leader's bits, array by array."""
        found = dict(arrays)
        for name, array in arrays.items():
            if array.size:
                leading, _ = self._joined(_bits(array) if self.leads else np.empty(0, np.uint8))
                if not self.leads:
                    found[name] = mx.array(leading).view(array.dtype).reshape(array.shape)
        mx.eval(found)
        return found

    def _all_bytes(self, body: bytes) -> list[bytes]:
        joined, ends = self._joined(np.frombuffer(body, np.uint8))
        return [part.tobytes() for part in np.split(joined, ends[:-1])]

    def _joined(self, own: Numbers) -> tuple[Numbers, list[int]]:
        """The bytes that the processes have brought, as many as each likes, behind each other; where each one's end."""
        parts: list[Numbers] = []
        joined, ends, start = np.empty(0, np.uint8), list[int](), 0
        while not parts or start < max(map(len, parts)):
            piece = own[start : start + _PLACE]
            self._next(len(own))[: len(piece)] = piece
            theirs = self._come()
            if not parts:
                sizes = self._places[self._turn, :, :_LENGTH].copy().view(np.uint64)[:, 0]
                ends = np.cumsum(sizes).tolist()
                joined = np.empty(ends[-1], np.uint8)
                parts = np.split(joined, ends[:-1])
            for part, place in zip(parts, theirs, strict=True):
                piece = part[start : start + _PLACE]
                piece[:] = place[: len(piece)]
            start += _PLACE
        return joined, ends

    def _next(self, length: int = 0) -> Numbers:
        """This process's place for the next piece, of so many bytes in all."""
        self._turn = (self._turn + 1) % _TURNS
        own: Numbers = self._places[self._turn, self.rank]
        own[:_LENGTH] = np.frombuffer(length.to_bytes(_LENGTH, sys.byteorder), np.uint8)
        return own[_LENGTH:]

    def _come(self) -> Numbers:
        """Meet the others: their places [processes, bytes], with this one's."""
        started = time.monotonic()
        self._meet()
        self.waited += time.monotonic() - started
        places: Numbers = self._places[self._turn, :, _LENGTH:]
        return places


def _bits(array: mx.array) -> Numbers:
    """The bytes of an array, in the order of its rows."""
    mx.eval(array)
    if not array.size:
        return np.empty(0, np.uint8)
    return np.ascontiguousarray(np.asarray(array.view(UNSIGNED[array.dtype.size]))).reshape(-1).view(np.uint8)


def _add(parts: Numbers, out: Numbers) -> None:
    """The sum of rows [processes, numbers], in their order."""
    np.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        np.add(out, part, out=out)


class _Piece(NamedTuple):
    """A part of an array that fits into a place."""

    name: str
    numbers: int
    of: slice  # the array
    place: slice


def _together(sizes: Mapping[str, int], room: int) -> Iterator[list[_Piece]]:
    """Arrays of such sizes, in pieces that fill a place of so many numbers together."""
    pieces: list[_Piece] = []
    used = 0
    for name, size in list(sizes.items()):
        start = 0
        while start < size:
            count = min(size - start, room - used)
            pieces.append(_Piece(name, count, slice(start, start + count), slice(used, used + count)))
            start, used = start + count, used + count
            if used == room:
                yield pieces
                pieces, used = [], 0
    if pieces:
        yield pieces
