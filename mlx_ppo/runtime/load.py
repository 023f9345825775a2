"""What other programs take of this machine's processors."""

import os
import time
from typing import NamedTuple

import psutil

from mlx_ppo.runtime.system import cores

_LOOK = 0.3  # seconds
_CLEARLY = 0.25  # of a processor, taken by others, still leaves it free
BUSY = 0.25  # of the processors, kept so by others, slow what is measured


class Load:
    """What other programs take of this machine's processors since this was made."""

    def __init__(self) -> None:
        """Begin to count."""
        self._own = psutil.Process()
        self._before = self._now()

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.monotonic() - self._before.at

    @property
    def others(self) -> float:
        """Processors that they kept busy, on average."""
        now, before = self._now(), self._before
        spent = now.at - before.at
        own = sum(max(0.0, seconds - before.own.get(process, 0.0)) for process, seconds in now.own.items())
        busy = now.all - before.all - own
        return min(float(cores()), max(0.0, busy / spent)) if spent else 0.0

    def _now(self) -> "_Seconds":
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        each = psutil.cpu_times(percpu=True)
        chosen = [times for number, times in enumerate(each) if usable is None or number in usable]
        busy = sum(sum(times) - times.idle - getattr(times, "iowait", 0.0) - _counted_twice(times) for times in chosen)
        return _Seconds(time.monotonic(), busy, {each: _seconds(each) for each in (self._own, *_family(self._own))})


def left_by(others: float, processes: int, *, now: int = 0) -> int:
    """Threads for each of so many processes, at least 1; more than now only where they are clearly free."""
    free = cores() - others
    count = max(1, round(free) // processes)
    return max(now, int(free + _CLEARLY) // processes) if 0 < now < count else count


def looked() -> Load:
    """The load of this moment, measured for a fraction of a second."""
    load = Load()
    time.sleep(_LOOK)
    return load


class _Seconds(NamedTuple):
    """Seconds by the clock, and of the processors."""

    at: float
    all: float
    own: dict[psutil.Process, float]  # of this process and of those that it has started


def _counted_twice(times: "psutil._ntuples.scputimes") -> float:
    """Linux counts what guests use as the host's own, too."""
    return getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)


def _family(process: psutil.Process) -> list[psutil.Process]:
    """What a process and those that it has started have started."""
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
