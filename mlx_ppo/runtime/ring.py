"""Machines that work on one run together over mlx's ring, by `mx.distributed`.

What is exchanged is reduced on the CPU after it was evaluated, by a thread of its own: a collective can't be called
off, and one that never ends must not keep the process from saving.
"""

import json
import math
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_ppo.errors import ProcessLost, RunError
from mlx_ppo.runtime.group import UNSIGNED, Several

_ENDING = 5.0  # seconds in which an exchange ends after a process that it waits for
_BUCKET = 1 << 21  # elements that are summed by one collective; larger arrays go by themselves
_joined = False  # mlx keeps a process's group until it ends


class Ring(Several):
    """Machines over one of mlx's backends."""

    def __init__(
        self,
        group: mx.distributed.Group,
        patience: float,
        suspect: Callable[[], str] = lambda: "another process",
        names: Sequence[str] = (),
    ) -> None:
        """Join.

        Args:
            group: of `mx.distributed.init`.
            patience: seconds that this process waits for another at most.
            suspect: names the process that probably is why an exchange failed.
            names: of the processes, by rank.
        """
        self.rank, self.size, self.names = group.rank(), group.size(), names
        self._group, self._patience, self._suspect = group, patience, suspect
        self._asked: queue.SimpleQueue[Callable[[mx.Stream], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="collectives", daemon=True)
        self._thread.start()

    def total(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Bucket by bucket, so that little is needed beside the arrays."""
        order = list(arrays)
        mx.eval(arrays)
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

    def rows(self, array: mx.array, counts: Sequence[int]) -> mx.array:
        """By a gathering of as many rows from each as the one with most has."""
        most = max(counts)
        mx.eval(array)
        width, kind = math.prod(array.shape[1:]), UNSIGNED[array.dtype.size]
        bits = array.reshape(len(array), width).view(kind) if array.size else mx.zeros((0, width), kind)
        if len(array) < most:
            bits = mx.pad(bits, [(0, most - len(array)), (0, 0)], stream=mx.cpu)
        found = self._all_gather(bits[None])
        whole = [found[rank, :count] for rank, count in enumerate(counts)]
        joined = mx.concatenate(whole, stream=mx.cpu).view(array.dtype).reshape(sum(counts), *array.shape[1:])
        mx.eval(joined)
        return joined

    def given(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The sum of the leader's bits and nothing."""
        mx.eval(dict(arrays))
        found = {}
        for name, array in arrays.items():
            bits = array.reshape(-1).view(UNSIGNED[array.dtype.size]) if array.size else array
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
        """As many from each as the process with most has."""
        counts = np.array(self._all_gather(mx.array([len(body)]))).tolist()
        row = np.zeros((1, max(*counts, 1)), np.uint8)
        row[0, : len(body)] = np.frombuffer(body, np.uint8)
        rows = np.asarray(self._all_gather(mx.array(row)))
        return [values[:count].tobytes() for values, count in zip(rows, counts, strict=True)]

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


def joined(rank: int, hosts: Sequence[Sequence[str]], limit: float) -> mx.distributed.Group:
    """Join mlx's ring.

    Args:
        rank: of this process.
        hosts: addresses with ports, by rank.
        limit: seconds in which the others have to come.
    Raises:
        ProcessLost: they don't.
        RunError: this process has had a group before; mlx would give that one again, whatever the hosts.
    """
    global _joined
    if _joined:
        raise RunError("a process can join other machines only once; start another one")
    _joined = True
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "hosts.json")
        file.write_text(json.dumps(hosts), "utf-8")
        before = {name: os.environ.get(name) for name in ("MLX_RANK", "MLX_HOSTFILE")}
        os.environ.update(MLX_RANK=str(rank), MLX_HOSTFILE=str(file))
        try:
            with _interrupted_after(limit):
                return _join(time.monotonic() + limit)
        except RuntimeError as error:
            raise ProcessLost(f"the other processes could not be reached within {limit:g} seconds: {error}") from None
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _join(deadline: float) -> mx.distributed.Group:
    """Mlx tries to connect for half a minute; another machine may begin later than that."""
    while True:
        try:
            return mx.distributed.init(strict=True, backend="ring")
        except RuntimeError as error:
            if "connect" not in str(error) or time.monotonic() > deadline:
                raise


@contextmanager
def _interrupted_after(limit: float) -> Iterator[None]:
    """Have a system call that waits end with an error after so many seconds; in the main thread only.

    Mlx waits for the others without letting another thread of Python run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
