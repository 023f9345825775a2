"""What a child process of `child.py` runs first, as a script: the standard library only, no mlx, no BLAS.

Requests come on standard input, answers go to a descriptor of their own; both are moved away before the worker's code
runs, which sees an empty standard input and, as standard output, standard error.
"""

import ctypes
import importlib.util
import os
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1
_GUARD = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "runtime", "offline.py")


def main(arguments: list[str]) -> None:
    """Call `serve(requests, answers, arguments)` of a worker: given are its FILE, ANSWERS_FD, PARENT and arguments."""
    file, descriptor, parent, *rest = arguments
    os.set_inheritable(int(descriptor), False)
    requests = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    die_with_parent(int(parent))
    _module("offline", _GUARD).refuse_connections()
    _module("worker", file).serve(requests, int(descriptor), rest)


def die_with_parent(parent: int) -> None:
    """On Linux, be killed at once when the parent ends, even in C code that never lets a thread run; 0 leaves it."""
    if parent == 0 or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _module(name: str, file: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(sys.argv[1:])
