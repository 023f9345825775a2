"""A stranger's Python program, run where it can harm nothing: a script of the standard library only, for Linux.

Namespaces of its own: no network, no processes but itself, and as files only the system's and Python's, read-only, and
16 MB to write into. It can start no process or thread, and has bounds on memory, processor time and file sizes.

A request on standard input, JSON: `program`, `input`, `memory` in bytes, `seconds`. What the program prints is this
script's standard output. Where one of these walls can't be built nothing is run: exit status 125, and why on standard
error. Whoever started it bounds output and time, and may kill it at any moment.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import sys
from typing import Any

FAILED = 125
_NEW = 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # mounts, processes, network, IPC, names
_NEW_USER = 0x10000000
_NOBODY = 65534
_INSIDE = 1000  # no root inside either: the program starts without capabilities
_MS_NOSUID_NODEV, _MS_BIND_ALL, _MS_PRIVATE_ALL, _DETACH = 2 | 4, 4096 | 16384, (1 << 18) | 16384, 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442  # Linux 5.12
_NEW_ROOT = "/mnt"
_FILES = 16 << 20  # bytes
_PYTHON = os.path.realpath(sys.executable)  # looked up while its links are in sight


def main() -> None:
    """Build the walls, run the program behind them, and end as it ended."""
    request = json.loads(sys.stdin.buffer.read())
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        _enter(libc)
        child = os.fork()  # the first process of the new namespace: all others end with it
        if child == 0:
            _build(libc)
            _run(libc, request)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    except (OSError, KeyError, AttributeError) as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(FAILED)


def _enter(libc: Any) -> None:
    """New namespaces; one of users too where this isn't root, who needs none to build the walls."""
    _die_with_parent(libc)
    user, group = os.geteuid(), os.getegid()
    _do(libc.unshare(_NEW | (_NEW_USER if user else 0)), "namespaces")
    if user:
        mapped = (("setgroups", "deny"), ("uid_map", f"{_INSIDE} {user} 1"), ("gid_map", f"{_INSIDE} {group} 1"))
        for name, text in mapped:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _drop(libc: Any) -> None:
    """Be nobody, where this is root; others lose what they may when the program starts, by not being root inside."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        _die_with_parent(libc)  # which a change of user undoes
    _do(libc.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")


def _die_with_parent(libc: Any) -> None:
    _do(libc.prctl(1, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")


def _build(libc: Any) -> None:
    """A root of its own that holds the system and Python, and nothing of anybody's."""
    _die_with_parent(libc)
    os.umask(0o022)
    _do(libc.mount(b"none", b"/", None, _MS_PRIVATE_ALL, None), "private mounts")
    limits = f"size={_FILES},nr_inodes=1000,mode=777".encode()
    _do(libc.mount(b"tmpfs", _NEW_ROOT.encode(), b"tmpfs", _MS_NOSUID_NODEV, limits), "tmpfs")
    for path in ("/usr", "/lib", "/lib64", "/bin", os.path.realpath(sys.base_prefix)):
        inside = _NEW_ROOT + path
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
        elif os.path.isdir(path) and not os.path.exists(inside):
            os.makedirs(inside)
            _do(libc.mount(path.encode(), inside.encode(), None, _MS_BIND_ALL, None), f"bind {path}")
            attributes = (ctypes.c_uint64 * 4)(1 | 2, 0, 0, 0)  # read-only, nosuid
            done = libc.syscall(_MOUNT_SETATTR, -100, inside.encode(), 0x8000, attributes, 32)
            _do(done, f"read-only {path}")
    os.chdir(_NEW_ROOT)
    _do(libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    _do(libc.umount2(b".", _DETACH), "umount")
    os.chdir("/")


def _run(libc: Any, request: dict[str, Any]) -> None:
    """Become the program; a status of FAILED is the program's own from here on, as nothing was said before."""
    for name, text in (("program.py", request["program"]), ("input", request["input"])):
        with open(name, "wb") as file:
            file.write(text.encode("utf-8", "replace"))
    given = os.open("input", os.O_RDONLY)
    os.dup2(given, 0)
    os.setsid()
    os.closerange(3, 1 << 16)
    _drop(libc)
    seconds = int(request["seconds"]) + 1
    for kind, most in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, request["memory"]), (resource.RLIMIT_FSIZE, _FILES),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 1),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))
    os.dup2(os.open("errors", os.O_WRONLY | os.O_CREAT), 2)  # what goes wrong from here on is the program's affair
    os.execve(_PYTHON, [_PYTHON, "-I", "-S", "/program.py"], {"PYTHONHASHSEED": "0"})


def _do(result: int, what: str) -> None:
    if result != 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
