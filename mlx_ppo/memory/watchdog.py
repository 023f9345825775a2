"""Watches the machine's memory while a run lasts, and has the run saved and stopped before the machine freezes."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from mlx_ppo.memory.budget import cgroup_room
from mlx_ppo.runtime.system import CRITICAL, is_mac, pressure_level

_EVERY = 1.0  # seconds
_LEFT = 0.02  # of the machine's memory; less than this available is a danger
_SWAPPED = 1 << 30  # bytes of swap taken since the start, with little memory left, are one too
_LITTLE = 0.1  # of the machine's memory
_ROOM = 64 << 20  # bytes that a control group may have left
_STALLED = 40.0  # percent of the last ten seconds in which every process waited for memory
_PRESSURE = Path("/proc/pressure/memory")
_TURNS = 3  # observations in a row


def danger(swap_at_start: int) -> str:
    """What is wrong with the machine's memory at this moment, "" where nothing is.

    On macOS the kernel's own judgement alone counts: it swaps idle programs while nothing is short.

    Args:
        swap_at_start: bytes of swap in use when the run began.
    """
    if is_mac():
        return "the system reports critical memory pressure" if pressure_level() >= CRITICAL else ""
    memory = psutil.virtual_memory()
    if memory.available < _LEFT * memory.total:
        return f"only {memory.available >> 20} MB of the machine's memory are left"
    swapped = psutil.swap_memory().used - swap_at_start
    if swapped > _SWAPPED and memory.available < _LITTLE * memory.total:
        return f"the machine has begun to swap ({swapped >> 20} MB)"
    room = cgroup_room()
    if room is not None and room < _ROOM:
        return f"the control group of this process has {room >> 20} MB left"
    if _stalled() > _STALLED:
        return "processes wait for memory most of the time"
    return ""


@contextmanager
def watching(stop: Callable[[str], None], *, every: float = _EVERY) -> Iterator[None]:
    """Look from a thread for the length of a `with` block; call `stop` once when the danger stays."""
    over = threading.Event()
    swap = psutil.swap_memory().used

    def watch() -> None:
        seen = 0
        while not over.wait(every):
            found = danger(swap)
            seen = seen + 1 if found else 0
            if seen == _TURNS:
                stop(f"short memory: {found}")
                return

    thread = threading.Thread(target=watch, name="memory watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _stalled() -> float:
    """Percent of the last ten seconds; 0 where the system doesn't say. Source: Linux, Documentation/accounting/psi."""
    try:
        found = re.search(r"^full avg10=([\d.]+)", _PRESSURE.read_text("ascii"), re.MULTILINE)
    except OSError:
        return 0.0
    return float(found[1]) if found else 0.0
