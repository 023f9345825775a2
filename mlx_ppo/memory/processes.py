"""How many processes a run is worth, and how many threads each of them, beside what else the machine does."""

import os
import time
from typing import NamedTuple

import psutil

from mlx_ppo.compute.adapted import count_of
from mlx_ppo.compute.cpu import threads
from mlx_ppo.compute.device import kind
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.phases import Accountant
from mlx_ppo.runtime.local_group import may_join, reaches_itself
from mlx_ppo.runtime.system import cores

_MOST = 8  # processes; more were never measured
_WORTH = 2e12  # multiplications of a run; below it takes some 20 seconds, of which the start of a process takes two
_LOOK = 0.3  # seconds
BUSY = 0.25  # of the processors, kept so by others, slow what is measured
LONG = 5.0  # seconds after which a load is no passing one


def parameters_of(accountant: Accountant) -> int:
    """Numbers in the policy's model."""
    return count_of(accountant.roles.trunk.base.values())


def most_processes(config: TrainConfig, accountant: Accountant) -> int:
    """As many as have a core and a prompt of their own, where the run is worth them."""
    section, shapes = config.rollout, accountant.shapes
    tokens = section.prompts * section.samples_per_prompt * (shapes.prompt + shapes.response) * config.run.iterations
    return worthwhile(tokens * parameters_of(accountant) * (4 + 6 * config.ppo.epochs), section.prompts)


def worthwhile(multiplications: float, pieces: int) -> int:
    """Processes for a work of so many multiplications, which comes in so many pieces; 1 where a GPU computes.

    Also in a process that has shared a work before, which it can do only once, and where there is no loopback address.
    """
    if multiplications < _WORTH or kind() != "CPU" or not may_join() or not reaches_itself():
        return 1
    return max(1, min(cores(), psutil.cpu_count(logical=False) or cores(), pieces, _MOST))


def first_threads(parameters: int, processes: int) -> int:
    """Threads for each process of a run that begins; 0 where a GPU computes. What other programs keep busy is left."""
    if kind() != "CPU":
        return 0
    most = threads.gaining(parameters, processes)
    if most == 1 or threads.given() is not None:
        return most
    return min(most, looked().left_for(processes))


class Load:
    """What other programs take of this machine's processors since this was made."""

    def __init__(self) -> None:
        """Begin to count."""
        self._own = psutil.Process()
        self._before = self._now()

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return self._now().at - self._before.at

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
