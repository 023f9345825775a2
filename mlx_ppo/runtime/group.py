"""Processes that work on one run together, each on its share of the rows.

Every process does the same in the same order, so that all of them meet at each exchange: those of one machine in memory
that they share (`runtime.shared_memory`), machines over mlx's ring (`runtime.ring`). No object travels but arrays and
JSON: nothing that is received is run.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

Arrays = Sequence["np.ndarray[Any, Any]"]
UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}  # by bytes: in which bits travel


class Group:
    """A process by itself; what several would exchange stays with it."""

    rank = 0
    size = 1
    waited = 0.0  # seconds spent on the others so far
    names: Sequence[str] = ("this process",)  # by rank

    @property
    def leads(self) -> bool:
        """Whether this is the process that logs, saves and asks what a function must be asked once."""
        return self.rank == 0

    def part(self, count: int, *, rank: int | None = None) -> range:
        """The rows of so many that a process, by default this one, works on; those of all follow each other."""
        own = self.rank if rank is None else rank
        return range(math.ceil(count * own / self.size), math.ceil(count * (own + 1) / self.size))

    def deal(self, sizes: Sequence[int]) -> list[list[int]]:
        """Rows of such sizes as parts of about the same size in all, one for each process; each part in order."""
        largest = sorted(range(len(sizes)), key=lambda row: -sizes[row])
        turns = [*range(self.size), *reversed(range(self.size))]
        parts: list[list[int]] = [[] for _ in range(self.size)]
        for at, row in enumerate(largest):
            parts[turns[at % len(turns)]].append(row)
        return [sorted(part) for part in parts]

    def total(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Sums over the processes, to the bit the same in each. Float32 arrays; they are taken out of what is given."""
        return arrays

    def gather(self, arrays: Arrays) -> list[list["np.ndarray[Any, Any]"]]:
        """What every process has given, by rank; their shapes may differ."""
        return [list(arrays)]

    def divided(
        self, sizes: Sequence[int], work: Callable[[int], "np.ndarray[Any, Any]"]
    ) -> list["np.ndarray[Any, Any]"]:
        """The results of pieces of work of about these sizes, each done by one process; all get all of them."""
        parts = self.deal(sizes)
        given = self.gather([work(at) for at in parts[self.rank]])
        found = [
            (at, array)
            for part, arrays in zip(parts, given, strict=True)
            for at, array in zip(part, arrays, strict=True)
        ]
        return [array for _, array in sorted(found, key=lambda one: one[0])]

    def rows(self, array: mx.array, counts: Sequence[int]) -> mx.array:
        """The processes' rows below each other, as many as is said from each."""
        return array

    def told(self, document: Any = None) -> Any:
        """The leader's document, which is made of what JSON has."""
        return document

    def given(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The leader's arrays to the bit; the others give arrays of the same names, shapes and types."""
        return dict(arrays)

    def close(self) -> None:
        """Leave the others."""


ALONE = Group()


class Several(Group, ABC):
    """Processes that can bring their bytes to each other; how, a subclass says."""

    def gather(self, arrays: Arrays) -> list[list["np.ndarray[Any, Any]"]]:
        """As bytes."""
        head = json.dumps([[array.dtype.str, array.shape] for array in arrays]).encode()
        body = b"".join([len(head).to_bytes(8, "little"), head, *(array.tobytes() for array in arrays)])
        return [_unpacked(part) for part in self._all_bytes(body)]

    def told(self, document: Any = None) -> Any:
        """By a gathering to which only the leader brings anything."""
        return json.loads(self._all_bytes(json.dumps(document).encode() if self.leads else b"")[0])

    @abstractmethod
    def total(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """As a group says it; how depends on what lies between."""

    @abstractmethod
    def rows(self, array: mx.array, counts: Sequence[int]) -> mx.array:
        """As a group says it; how depends on what lies between."""

    @abstractmethod
    def given(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """As a group says it; how depends on what lies between."""

    @abstractmethod
    def _all_bytes(self, body: bytes) -> list[bytes]:
        """What each process has brought, by rank."""


def _unpacked(body: bytes) -> list["np.ndarray[Any, Any]"]:
    size = int.from_bytes(body[:8], "little")
    at = 8 + size
    found = []
    for kind, shape in json.loads(body[8:at]):
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(body, np.dtype(kind), count, at).reshape(shape)
        at += array.nbytes
        found.append(array)
    return found
