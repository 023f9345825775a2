"""Processes that work on one run together, each on its share of the rows; by `mx.distributed`.

Every process does the same in the same order, so that all of them meet at each exchange. What is exchanged is reduced
on the CPU after it was evaluated, by a thread of its own: a collective can't be called off, and one that never ends
must not keep the process from saving. No object travels but arrays and JSON: nothing that is received is run.
"""

import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ppo.errors import ProcessLost

Arrays = Sequence["np.ndarray[Any, Any]"]
_ENDING = 5.0  # seconds in which an exchange ends after a process that it waits for
_BUCKET = 1 << 21  # elements that are summed by one collective; larger arrays go by themselves
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


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


class Ring(Group):
    """Several processes over one of mlx's backends."""

    def __init__(
        self,
        group: mx.distributed.Group,
        patience: float,
        meet: Callable[[], None] = lambda: None,
        suspect: Callable[[], str] = lambda: "another process",
        names: Sequence[str] = (),
    ) -> None:
        """Join.

        Args:
            group: of `mx.distributed.init`.
            patience: seconds that this process waits for another at most.
            meet: returns when all have come; it sleeps, where a collective would keep a core busy until then.
            suspect: names the process that probably is why an exchange failed.
            names: of the processes, by rank.
        """
        self.names = names or [f"process {rank + 1}" for rank in range(group.size())]
        self.rank, self.size = group.rank(), group.size()
        self._group, self._patience, self._meet, self._suspect = group, patience, meet, suspect
        self._asked: queue.SimpleQueue[Callable[[mx.Stream], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="collectives", daemon=True)
        self._thread.start()

    def total(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Bucket by bucket, so that little is needed beside the arrays."""
        order = list(arrays)
        mx.eval(arrays)
        self._come()
        found: dict[str, mx.array] = {}
        for names in list(_buckets(arrays)):
            parts = [arrays.pop(name) for name in names]
            if len(parts) == 1:
                found[names[0]] = self._all_sum(parts[0])
                continue
            flat = mx.concatenate([part.reshape(-1) for part in parts], stream=mx.cpu)
            ends = np.cumsum([part.size for part in parts])[:-1].tolist()
            pieces = mx.split(self._all_sum(flat), ends, stream=mx.cpu)
            for name, part, piece in zip(names, parts, pieces, strict=True):
                found[name] = mx.contiguous(piece.reshape(part.shape), stream=mx.cpu)
            mx.eval(found)
        return {name: found[name] for name in order}

    def gather(self, arrays: Arrays) -> list[list["np.ndarray[Any, Any]"]]:
        """As bytes, of which those of the process that has most decide the length."""
        head = json.dumps([[array.dtype.str, array.shape] for array in arrays]).encode()
        body = b"".join([len(head).to_bytes(8, "little"), head, *(array.tobytes() for array in arrays)])
        return [_unpacked(part) for part in self._all_bytes(body)]

    def rows(self, array: mx.array, counts: Sequence[int]) -> mx.array:
        """By a gathering of as many rows from each as the one with most has."""
        most = max(counts)
        mx.eval(array)
        self._come()
        width, kind = math.prod(array.shape[1:]), _UNSIGNED[array.dtype.size]
        bits = array.reshape(len(array), width).view(kind) if array.size else mx.zeros((0, width), kind)
        if len(array) < most:
            bits = mx.pad(bits, [(0, most - len(array)), (0, 0)], stream=mx.cpu)
        found = self._all_gather(bits[None])
        whole = [found[rank, :count] for rank, count in enumerate(counts)]
        joined = mx.concatenate(whole, stream=mx.cpu).view(array.dtype).reshape(sum(counts), *array.shape[1:])
        mx.eval(joined)
        return joined

    def told(self, document: Any = None) -> Any:
        """By a gathering to which only the leader brings anything."""
        return json.loads(self._all_bytes(json.dumps(document).encode() if self.leads else b"")[0])

    def given(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The sum of the leader's bits and nothing."""
        mx.eval(dict(arrays))
        self._come()
        found = {}
        for name, array in arrays.items():
            bits = array.reshape(-1).view(_UNSIGNED[array.dtype.size]) if array.size else array
            if array.size:
                bits = self._all_sum(bits if self.leads else mx.zeros(bits.shape, bits.dtype))
            found[name] = bits.view(array.dtype).reshape(array.shape)
        mx.eval(found)
        return found

    def close(self) -> None:
        """The thread ends, once no exchange waits any more for a process that is lost.

        Mlx may raise the error of such an exchange in the main thread, at whatever it is called for next.
        """
        self._asked.put(None)
        self._thread.join(_ENDING)

    def _all_sum(self, array: mx.array) -> mx.array:
        mx.eval(array)
        return self._within(lambda stream: mx.distributed.all_sum(array, group=self._group, stream=stream))

    def _all_gather(self, array: mx.array) -> mx.array:
        mx.eval(array)
        return self._within(lambda stream: mx.distributed.all_gather(array, group=self._group, stream=stream))

    def _all_bytes(self, body: bytes) -> list[bytes]:
        self._come()
        counts = np.array(self._all_gather(mx.array([len(body)]))).tolist()
        row = np.zeros((1, max(*counts, 1)), np.uint8)
        row[0, : len(body)] = np.frombuffer(body, np.uint8)
        rows = np.asarray(self._all_gather(mx.array(row)))
        return [values[:count].tobytes() for values, count in zip(rows, counts, strict=True)]

    def _come(self) -> None:
        started = time.monotonic()
        self._meet()
        self.waited += time.monotonic() - started

    def _within(self, collective: Callable[[mx.Stream], mx.array]) -> mx.array:
        """Evaluate a collective in the other thread, and wait for it as long as is allowed."""
        done, result = threading.Event(), list[mx.array | Exception]()

        def evaluate(stream: mx.Stream) -> None:
            try:
                found = collective(stream)
                mx.eval(found)
                result.append(found)
            except Exception as error:
                result.append(error)
            done.set()

        started = time.monotonic()
        self._asked.put(evaluate)
        if not done.wait(self._patience):
            limit = f"{self._patience:g} seconds (parallel.patience)"
            raise ProcessLost(f"{self._suspect()} hangs: an exchange with it did not end within {limit}")
        self.waited += time.monotonic() - started
        if isinstance(result[0], Exception):
            raise ProcessLost(f"{self._suspect()} is lost: {result[0]}")
        return result[0]

    def _serve(self) -> None:
        stream = mx.new_stream(mx.cpu)
        while (asked := self._asked.get()) is not None:
            asked(stream)
            del asked  # and with it what was exchanged, until the next exchange


def _buckets(arrays: Mapping[str, mx.array]) -> Iterator[list[str]]:
    names: list[str] = []
    count = 0
    for name, array in arrays.items():
        if names and count + array.size > _BUCKET:
            yield names
            names, count = [], 0
        names.append(name)
        count += array.size
    if names:
        yield names


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
