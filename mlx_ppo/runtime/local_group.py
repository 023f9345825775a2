"""A group of processes on this machine: started by the one that leads, over mlx's ring on the loopback address.

They meet by pipes before every exchange, asleep; the ring itself would keep a core of each one that waits busy. By the
pipes the leader also learns at once that one has died, and in time that one hangs.
"""

import errno
import json
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

from mlx_ppo.errors import ProcessLost, RunError
from mlx_ppo.runtime.child import Child, DiedError, GarbledError, HungError
from mlx_ppo.runtime.group import Ring

_STARTING = 120.0  # seconds
_LARGEST = 1 << 16  # bytes of a failure's text
_PORTS = range(10_000, 32_000)  # below those that Linux (32768) and macOS (49152) begin to give to whoever connects
_NOT_WORKING = {psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP}
_joined = False  # mlx keeps a process's group until it ends


def may_join() -> bool:
    """Whether this process has had no group yet."""
    return not _joined


def _only_once() -> None:
    if not may_join():
        raise RunError("a process can share its work only once; start another one, or set parallel.processes = 1")


@contextmanager
def local_group(worker: Path, order: dict[str, Any], *, processes: int, patience: float) -> Iterator[Ring]:
    """Start the others, and end them.

    Args:
        worker: the file that they run, see `runtime.child`; it is given the order with `rank`, and `hosts`.
        order: what JSON has.
        processes: with this one.
        patience: seconds that one waits for another.
    Raises:
        ProcessLost: one doesn't start.
        RunError: this process has had a group before.
    """
    if not reaches_itself():
        raise RunError("processes can't meet: there is no loopback address here; set parallel.processes = 1")
    _only_once()
    hosts = [[f"127.0.0.1:{port}"] for port in _free_ports(processes)]
    children: list[Child] = []
    ring: Ring | None = None
    try:
        for rank in range(1, processes):
            given = json.dumps({**order, "rank": rank, "hosts": hosts, "patience": patience})
            children.append(Child(worker, [given]))
        _meet(children, _STARTING)
        meet, suspect = (lambda: _meet(children, patience)), (lambda: _suspect(children))
        ring = Ring(joined(0, hosts, _STARTING), patience, meet, suspect, ["this process", *_names(children)])
        yield ring
    finally:
        for child in children:
            child.end()
        if ring is not None:
            ring.close()


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
    _only_once()
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


def _meet(children: Sequence[Child], limit: float) -> None:
    """Wait until all have arrived, and let them go on."""
    deadline = time.monotonic() + limit
    for child, who in zip(children, _names(children), strict=True):
        try:
            answer = child.exchange(b"", max(0.0, deadline - time.monotonic()), largest=_LARGEST)
        except HungError:
            raise ProcessLost(f"{who} did not come within {limit:g} seconds (parallel.patience): it hangs") from None
        except DiedError as error:
            raise ProcessLost(f"{who} is lost: {error}") from None
        except GarbledError:
            raise ProcessLost(f"{who} sent what nobody understands") from None
        if "arrived" not in answer:
            raise ProcessLost(f"{who} failed: {answer.get('failed', 'without a word')}")
    for child in children:
        child.tell(b"go\n")


def _names(children: Sequence[Child]) -> list[str]:
    return [f"process {at} of {len(children) + 1} (pid {child.pid})" for at, child in enumerate(children, start=2)]


def _suspect(children: Sequence[Child]) -> str:
    """Those that have ended or are stopped; where none is, any of them may be to blame."""
    states = [_state(child.pid) for child in children]
    ended = [name for name, state in zip(_names(children), states, strict=True) if state in _NOT_WORKING]
    return " or ".join(ended or _names(children))


def _state(pid: int) -> str:
    try:
        status: str = psutil.Process(pid).status()
        return status
    except psutil.Error:
        return "dead"


def reaches_itself() -> bool:
    """Whether the loopback address can be used; a network namespace of its own has none at first."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=1.0).close()
    except OSError:
        return False
    return True


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens at just now.

    None of those that systems give to whoever connects: a process that connects to such a port before anybody listens
    there can be given this very port for its own end, and is then connected with itself.
    """
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < count:
            sockets.append(socket.socket())
            try:
                sockets[-1].bind(("127.0.0.1", secrets.choice(_PORTS)))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                sockets.pop().close()
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
