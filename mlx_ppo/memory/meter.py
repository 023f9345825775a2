"""What the phases of a run really need: mlx's peak in each, and the process's resident memory."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

_active: ContextVar["Meter | None"] = ContextVar("meter", default=None)


class Meter:
    """The highest peak of each phase, in bytes; mlx's cache of freed buffers isn't in it."""

    def __init__(self) -> None:
        """Nothing seen."""
        self.peaks: dict[str, int] = {}
        self.cached = 0  # largest size of mlx's cache at the end of a phase

    def take(self) -> dict[str, int]:
        """The peaks since the last call."""
        taken, self.peaks = self.peaks, {}
        return taken

    def note(self, name: str) -> None:
        """A phase has ended."""
        self.peaks[name] = max(self.peaks.get(name, 0), mx.get_peak_memory())
        self.cached = max(self.cached, mx.get_cache_memory())


@contextmanager
def metering() -> Iterator[Meter]:
    """Let `phase` measure within a `with` block."""
    meter = Meter()
    before = _active.set(meter)
    try:
        yield meter
    finally:
        _active.reset(before)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase of the run; nothing happens where nobody measures. A phase inside another one ends that one's part."""
    meter = _active.get()
    if meter is None:
        yield
        return
    mx.reset_peak_memory()
    try:
        yield
    finally:
        meter.note(name)
        mx.reset_peak_memory()


def resident_peak() -> int:
    """The process's largest resident memory so far, in bytes, by the system's account."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024
