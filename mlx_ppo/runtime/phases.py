"""What the phases of a run really need, and mlx's limit while each lasts."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import mlx.core as mx
import psutil

from mlx_ppo.runtime.allocator import give_back

_active: ContextVar["Meter | None"] = ContextVar("meter", default=None)

ASKING = "score judge"  # the phase in which this process waits for a judge in another one
_SPARE = 64  # a limit is this share of itself higher: at the limit itself decoding would take several times as long


class Limit(NamedTuple):
    """Bytes that a phase was predicted to need."""

    peak: int  # in all
    transient: int  # of it, on top of what was there before

    def now(self) -> int:
        """From where on mlx is to wait; a little more may be there than was thought."""
        most = max(self.peak, mx.get_active_memory() + self.transient)
        return most + most // _SPARE


class Meter:
    """The highest peak of each phase in bytes, without mlx's cache of freed buffers; and what lies beside arrays."""

    def __init__(self, limits: Mapping[str, Limit], *, clearing: bool) -> None:
        """Nothing is seen yet.

        Args:
            limits: above which mlx waits for what it has begun before it begins more, by phase.
            clearing: give the cache of freed buffers back where another phase begins, which won't fit into them.
        """
        self.limits = limits
        self.clearing = clearing
        self.peaks: dict[str, int] = {}
        self._there = 0  # bytes, as the phase began
        self.seconds: dict[str, float] = {}  # spent in each phase
        self._process = psutil.Process()
        self._last = ""
        self.began = 0.0  # when the last phase began, as `time.monotonic` has it

    def take(self) -> dict[str, int]:
        """The peaks since the last call; seconds begin anew too."""
        taken, self.peaks, self.seconds = self.peaks, {}, {}
        return taken

    def overhead(self) -> int:
        """Resident bytes of the process beside mlx's arrays; what is only kept for later is given back first."""
        give_back()
        return int(self._process.memory_info().rss) - mx.get_active_memory()

    def begin(self, name: str) -> None:
        """A phase begins."""
        if self.clearing and name != self._last:
            give_back()
        self._last = name
        self.began = time.monotonic()
        mx.reset_peak_memory()
        self._there = mx.get_active_memory()  # mlx's peak is 0 until something more is needed

    def end(self, name: str) -> None:
        """A phase has ended."""
        self.peaks[name] = max(self.peaks.get(name, 0), self._there, mx.get_peak_memory())
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - self.began
        mx.reset_peak_memory()


@contextmanager
def metering(limits: Mapping[str, Limit] | None = None, *, clearing: bool = False) -> Iterator[Meter]:
    """Let `phase` measure within a `with` block."""
    meter = Meter(limits or {}, clearing=clearing)
    before = _active.set(meter)
    try:
        yield meter
    finally:
        _active.reset(before)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase of the run; phases don't nest. Nothing happens where nobody measures."""
    meter = _active.get()
    if meter is None:
        yield
        return
    limit = meter.limits.get(name)
    before = mx.set_memory_limit(limit.now()) if limit is not None else None
    meter.begin(name)
    try:
        yield
    finally:
        meter.end(name)
        if before is not None:
            mx.set_memory_limit(before)
