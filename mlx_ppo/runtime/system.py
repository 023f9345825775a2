"""What differs between operating systems, for whoever has no file of its own for it."""

import ctypes
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # Linux, prctl(2)
_F_FULLFSYNC = 51  # macOS, fcntl(2): fsync alone leaves the data in the drive's cache
_PRESSURE_LEVEL = b"kern.memorystatus_vm_pressure_level"
CRITICAL = 4  # of `pressure_level`


def is_mac() -> bool:
    """Whether this is macOS."""
    return sys.platform == "darwin"


def has_screen() -> bool:
    """Whether a browser can be opened; elsewhere Python would look for one of the terminal."""
    return is_mac() or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def is_linux() -> bool:
    """Whether this is Linux."""
    return sys.platform.startswith("linux")


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts() -> dict[str, str]:
    """Python, machine and system, for the record of a run."""
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "system": platform.platform(),
    }


def most_held_by_children() -> int:
    """The largest resident size that any ended child had, in bytes."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if is_mac() else 1024)


def adopt_orphans() -> None:
    """On Linux, let what a killed child had started become this process's, so that it can be found."""
    if is_linux():
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def memory_kills() -> int | None:
    """How many processes Linux has ended for want of memory since it was started; None where it doesn't say."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text("ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def pressure_level() -> int:
    """1 normal, 2 warning, 4 critical on macOS; 0 elsewhere. Source: xnu, kern.memorystatus_vm_pressure_level."""
    if not is_mac():
        return 0
    level, size = ctypes.c_int(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    failed = ctypes.CDLL(None).sysctlbyname(_PRESSURE_LEVEL, ctypes.byref(level), ctypes.byref(size), None, 0)
    return 0 if failed else level.value


def flush(descriptor: int) -> None:
    """Have a file or folder on the drive itself, not in its cache only.

    Raises:
        OSError: it can't be written.
    """
    if is_mac():
        import fcntl

        with suppress(OSError):  # file systems that don't know it: fsync is what is left
            fcntl.fcntl(descriptor, _F_FULLFSYNC)
            return
    os.fsync(descriptor)


@contextmanager
def staying_awake(wanted: bool) -> Iterator[str]:
    """Keep a Mac from sleeping while it is idle, for the length of a `with` block; gives a line where that can't be.

    `caffeinate` ends with this process, whatever happens to it. Source: caffeinate(8), options -i and -w.
    """
    if not wanted or not is_mac():
        yield "run.stay_awake: only macOS is kept awake; here the system's own settings hold" if wanted else ""
        return
    try:
        holder = subprocess.Popen(["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())])
    except OSError as error:
        yield f"run.stay_awake: caffeinate can't be started ({error.strerror}); the Mac may go to sleep"
        return
    try:
        yield ""
    finally:
        holder.terminate()
        holder.wait()
