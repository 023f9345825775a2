"""What other programs take of this machine's processors."""

import os
import time
from typing import NamedTuple

import psutil

from mlx_ppo.runtime.system import cores

_LOOK = 0.3  # seconds
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
        now = self._now()
        spent = now.at - self._before.at
        busy = now.all - self._before.all - (now.own - self._before.own)
        return min(float(cores()), max(0.0, busy / spent)) if spent else 0.0

    def left_for(self, processes: int) -> int:
        """Threads for each of so many processes, at least 1."""
        return max(1, round(cores() - self.others) // processes)

    def _now(self) -> "_Seconds":
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        each = psutil.cpu_times(percpu=True)
        chosen = [times for number, times in enumerate(each) if usable is None or number in usable]
        busy = sum(sum(times) - times.idle - getattr(times, "iowait", 0.0) - _counted_twice(times) for times in chosen)
        return _Seconds(time.monotonic(), busy, sum(map(_seconds, [self._own, *_family(self._own)])))


def looked() -> Load:
    """The load of this moment, measured for a fraction of a second."""
    load = Load()
    time.sleep(_LOOK)
    return load


class _Seconds(NamedTuple):
    """Seconds by the clock, and of the processors."""

    at: float
    all: float
    own: float


def _counted_twice(times: "psutil._ntuples.scputimes") -> float:
    """Linux counts what guests use as the host's own, too."""
    return getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)


def _family(process: psutil.Process) -> list[psutil.Process]:
    """What this process and the one that supervises it have started."""
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
