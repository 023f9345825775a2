"""A child process that answers in JSON lines: it can be timed out and killed, and leaves nothing behind."""

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

_START = Path(__file__).with_name("child_start.py")
_POLL_SECONDS = 0.25
_WATCH_SECONDS = 0.02  # a gigabyte is written in some tenths of a second
_CLOSE_SECONDS = 0.8


class HungError(Exception):
    """No whole answer came in time."""


class DiedError(Exception):
    """The child ended, or closed its connection, before a whole answer; the text says how."""

    def __init__(self, how: str, status: int | None = None) -> None:
        """Keep the exit status: minus the signal's number after a signal, None while it runs."""
        super().__init__(how)
        self.status = status


class GarbledError(Exception):
    """The child sent more than an answer may have."""


class OversizeError(Exception):
    """The child has more resident memory than it may."""


class Child:
    """A process that runs `serve` of one of the worker files beside this one.

    It has a session of its own: Ctrl-C in a terminal reaches its parent only. It ends with `end`, and when the parent
    dies in whatever way. One thread at a time.
    """

    def __init__(self, worker: Path, arguments: Sequence[str], *, descriptors: Sequence[int] = ()) -> None:
        """Start it; what it prints goes to standard error. It inherits the descriptors, under the same numbers."""
        self._answers, descriptor = os.pipe()
        # The death signal comes when the thread that started the child ends; only the main thread lasts long enough.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-P", str(_START), str(worker), str(descriptor), str(parent), *arguments],
                stdin=subprocess.PIPE,
                stdout=2,
                bufsize=0,
                pass_fds=(descriptor, *descriptors),
                start_new_session=True,
                # the order of a set is the same in every process
                env={**os.environ, "PYTHONHASHSEED": "0"},
            )
        except BaseException:
            os.close(self._answers)
            raise
        finally:
            os.close(descriptor)
        assert self._process.stdin is not None
        self._requests = self._process.stdin
        os.set_blocking(self._requests.fileno(), False)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def exchange(
        self, request: bytes, limit: float, *, largest: int | None = None, memory: int | None = None
    ) -> dict[str, Any]:
        """Send a request and wait for one line; neither a full pipe nor a silent child lasts beyond the limit.

        Args:
            request: a line, or nothing where the child speaks first.
            limit: seconds.
            largest: bytes that the answer may have.
            memory: bytes that may be resident, for systems that refuse a process a limit of its own (macOS).

        Returns:
            The answer; what isn't a JSON object comes out as an empty one, which the callers refuse.
        Raises:
            HungError, DiedError, GarbledError, OversizeError: there is none; the child has to be ended.
        """
        deadline = time.monotonic() + limit
        unsent = memoryview(request)
        received, whole = bytearray(), False
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            if unsent:
                selector.register(self._requests, selectors.EVENT_WRITE)
            while not whole:
                remaining = deadline - time.monotonic()
                exited = self._process.poll() is not None  # asked before reading: what it wrote last still counts
                poll = _POLL_SECONDS if memory is None else _WATCH_SECONDS
                ready = {key.fd for key, _ in selector.select(max(0.0, min(remaining, poll)))}
                if self._requests.fileno() in ready:
                    unsent = unsent[_write(self._requests.fileno(), unsent) :]
                    if not unsent:
                        selector.unregister(self._requests)
                chunk = os.read(self._answers, 65536) if self._answers in ready else b""
                received += chunk
                whole = b"\n" in chunk
                if not chunk and (exited or self._answers in ready):
                    raise self._death()
                if remaining <= 0 and not whole:
                    raise HungError
                if largest is not None and len(received) > largest:
                    raise GarbledError
                if memory is not None and not ready and self._resident() > memory:
                    raise OversizeError
        return _parsed(bytes(received))

    def tell(self, line: bytes) -> None:
        """Send a short line to which no answer is awaited; a child that has ended is found by the next exchange."""
        _write(self._requests.fileno(), memoryview(line))

    def end(self, grace: float = 0.0) -> None:
        """Let the child finish by itself for `grace` seconds, then kill it and what it started; call it once."""
        os.close(self._answers)
        self._requests.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        finally:
            with suppress(ProcessLookupError, PermissionError):  # the whole group is gone, or is a zombie (macOS)
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _resident(self) -> int:
        """Bytes; 0 where the process has ended."""
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def _death(self) -> DiedError:
        try:
            status = self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return DiedError("it closed its connection to the trainer")
        if status >= 0:
            return DiedError(f"it exited with status {status} (os._exit, or a crash in a library?)", status)
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        return DiedError(f"killed by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else ""), status)


def _write(descriptor: int, unsent: memoryview) -> int:
    """How many bytes the pipe took; a child that closed its end is found by reading."""
    try:
        return os.write(descriptor, unsent[:65536])
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return len(unsent)


def _parsed(received: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(received.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}
