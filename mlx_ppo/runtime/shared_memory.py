"""What processes of one machine exchange, in memory that all of them map: nobody else can open it.

Each process has two places of its own there, used in turn: it writes a piece into one, meets the others, and reads
their pieces. Whoever writes to a place again has met all others after they had read it.
"""

import math
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.runtime.group import UNSIGNED, Several

_PLACE = 1 << 21  # bytes; what is larger goes piece by piece
_TURNS = 2
_LENGTH = 8  # bytes that say how many follow
_FLOAT = 4  # bytes

Numbers = np.ndarray[Any, Any]


def new_memory(processes: int) -> int:
    """The descriptor of memory for so many processes; who inherits it can map it."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("mlx-ppo")
    else:
        with tempfile.TemporaryFile() as file:  # which has no name any more
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, _TURNS * processes * _PLACE)
    return descriptor


class SharedMemory(Several):
    """Several processes of one machine."""

    def __init__(self, descriptor: int, rank: int, names: Sequence[str], meet: Callable[[], None]) -> None:
        """Map the memory.

        Args:
            descriptor: of `new_memory`, which can be closed afterwards.
            rank: of this process.
            names: of the processes, by rank.
            meet: returns when all have come.
        """
        self.rank, self.size, self.names, self._meet = rank, len(names), names, meet
        memory = mmap.mmap(descriptor, _TURNS * self.size * _PLACE)
        self._places: Numbers = np.frombuffer(memory, np.uint8).reshape(_TURNS, self.size, _PLACE)
        self._turn = 0

    def total(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Added by each process for itself, in the order of the ranks."""
        mx.eval(arrays)
        sums: dict[str, Numbers] = {}
        found = {name: array for name, array in arrays.items() if not array.size}
        order, own = list(arrays), {name: np.asarray(array).reshape(-1) for name, array in arrays.items()}
        left = {name: array.size for name, array in own.items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        arrays.clear()
        for pieces in _together(left, _PLACE // _FLOAT):
            mine = self._next()[self.rank].view(np.float32)
            for piece in pieces:
                mine[piece.place] = own[piece.name][piece.of]
                left[piece.name] -= piece.numbers
                if not left[piece.name]:
                    del own[piece.name]
            self._come()
            theirs = self._places[self._turn].view(np.float32)
            for piece in pieces:
                if piece.name not in sums:
                    sums[piece.name] = np.empty(math.prod(shapes[piece.name]), np.float32)
                place = sums[piece.name][piece.of]
                np.add(theirs[0, piece.place], theirs[1, piece.place], out=place)
                for rank in range(2, self.size):
                    np.add(place, theirs[rank, piece.place], out=place)
                if piece.name not in own:
                    found[piece.name] = mx.array(sums.pop(piece.name)).reshape(shapes[piece.name])
        mx.eval(found)
        return {name: found[name] for name in order}

    def rows(self, array: mx.array, counts: Sequence[int]) -> mx.array:
        """By their bits."""
        mx.eval(array)
        kind = UNSIGNED[array.dtype.size]
        bits = np.asarray(array.reshape(-1).view(kind)) if array.size else np.zeros(0, np.uint8)
        parts = [np.frombuffer(part, np.uint8) for part in self._all_bytes(bits.tobytes())]
        joined = mx.array(np.concatenate(parts)).view(array.dtype).reshape(sum(counts), *array.shape[1:])
        mx.eval(joined)
        return joined

    def given(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The leader's bits, array by array."""
        mx.eval(dict(arrays))
        found = {}
        for name, array in arrays.items():
            found[name] = array
            if array.size:
                kind = UNSIGNED[array.dtype.size]
                own = np.asarray(array.reshape(-1).view(kind)).tobytes() if self.leads else b""
                leading = np.frombuffer(self._all_bytes(own)[0], np.uint8)
                found[name] = mx.array(leading).view(array.dtype).reshape(array.shape)
        mx.eval(found)
        return found

    def _all_bytes(self, body: bytes) -> list[bytes]:
        own = np.frombuffer(len(body).to_bytes(_LENGTH, "little") + body, np.uint8)
        found: list[Numbers] = []
        start = 0
        while not start or start < max(array.size for array in found):
            part = own[start : start + _PLACE]
            self._next()[self.rank, : len(part)] = part
            self._come()
            places = self._places[self._turn]
            if not start:
                sizes = [int(place[:_LENGTH].view(np.uint64)[0]) for place in places]
                found = [np.empty(_LENGTH + size, np.uint8) for size in sizes]
            for array, place in zip(found, places, strict=True):
                piece = array[start : start + _PLACE]
                piece[:] = place[: len(piece)]
            start += _PLACE
        return [array[_LENGTH:].tobytes() for array in found]

    def _next(self) -> Numbers:
        """The places of the next turn [processes, bytes]."""
        self._turn = (self._turn + 1) % _TURNS
        places: Numbers = self._places[self._turn]
        return places

    def _come(self) -> None:
        started = time.monotonic()
        self._meet()
        self.waited += time.monotonic() - started


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
