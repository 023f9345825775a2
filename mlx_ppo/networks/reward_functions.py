"""A user's Python reward function, run in a child process of its own.

The child can be timed out and killed, and whatever the user's code does to its process stays there.
"""

import hashlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlx_ppo.errors import ConfigError, RunError

LOAD_SECONDS = 60.0  # at least this long for loading the user's file: it may import large libraries
_CLOSE_SECONDS = 0.8
_POLL_SECONDS = 0.25
_SHOWN_CHARACTERS = 120
_WORKER = Path(__file__).with_name("reward_worker.py")


def parse_reference(text: str) -> tuple[str, str]:
    """Split `path/to/file.py:name` into the file and the function's name.

    Raises:
        ValueError: the text has another form.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{text!r} isn't a reward function; write it as path/to/file.py:name")
    return file, name


class _HungError(Exception):
    """No whole answer came in time."""


class _DiedError(Exception):
    """The child ended, or closed its connection, before a whole answer; the text says how."""


class RewardFunction:
    """Scores of a user's function `def name(prompts, completions)` or `(prompts, completions, records)`.

    Use it as a context manager: the user's file is then loaded at once, so that its mistakes come before training.
    The child runs in a session of its own: Ctrl-C in a terminal reaches the trainer only, which then closes the child.
    It ends with `close`, after a timeout, and when this process dies in whatever way. One thread at a time.
    """

    def __init__(self, file: Path, name: str, *, timeout: float) -> None:
        """Read the file for its SHA-256; nothing is run yet.

        Args:
            file: the user's Python file.
            name: the function in it.
            timeout: seconds that scoring one batch may take.

        Raises:
            ConfigError: the file is missing or can't be read.
        """
        if not (math.isfinite(timeout) and timeout > 0):
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout}")
        self.file = file
        self.name = name
        self.timeout = timeout
        self.sha256 = hashlib.sha256(_read(file)).hexdigest()
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = -1
        self._wants_records = False
        self._closed = ""

    def __enter__(self) -> Self:
        """Start the child and load the user's file."""
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the child."""
        self.close()

    @property
    def pid(self) -> int | None:
        """The child's process id, None when there is no child."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the child and load the user's file, unless that is done.

        Raises:
            ConfigError: the file raises, holds no such function, or was changed since it was hashed.
            RunError: this object is closed.
        """
        if self._closed:
            raise RunError(f"{self.file}:{self.name} can't be called again: it was ended by {self._closed}")
        if self._process is not None:
            return
        limit = max(self.timeout, LOAD_SECONDS)
        ready: dict[str, Any] = {}
        try:
            self._spawn()
            ready = self._exchange(b"", limit)
            problem = _load_problem(ready, self.sha256)
        except _HungError:
            problem = f"the file took longer than {limit:g} s to load"
        except _DiedError as death:
            problem = f"the process ended while the file was loading: {death}"
        except BaseException:
            self._end("an interruption while its file was loading")
            raise
        if problem:
            self._end("a failure to load")
            line = f":{ready['line']}" if isinstance(ready.get("line"), int) else ""
            raise ConfigError(f"{self.file}{line}: the reward function can't be loaded: {problem}")
        self._wants_records = ready["records"] is True

    def score(self, prompts: list[str], completions: list[str], records: list[dict[str, Any]]) -> list[float]:
        """One finite score per completion.

        Args:
            prompts: the prompt of each completion.
            completions: the texts to score.
            records: the JSONL record of each prompt; passed on if the user's function has a parameter `records`.

        Raises:
            RunError: the function raised, hung, died, or returned anything but one finite number per completion.
        """
        if not len(prompts) == len(completions) == len(records):
            raise ValueError(f"{len(prompts)} prompts, {len(completions)} completions, {len(records)} records")
        self.start()
        if not completions:
            return []
        request: dict[str, Any] = {"prompts": prompts, "completions": completions}
        if self._wants_records:
            request["records"] = records
        where = f"reward function {self.file}:{self.name}"
        try:
            answer = self._exchange(json.dumps(request).encode("ascii") + b"\n", self.timeout)
        except _HungError:
            self._end("a timeout")
            mend = "make it faster, or raise the config key 'timeout'"
            batch = f"for a batch of {len(completions)}"
            raise RunError(f"{where} gave no scores {batch} within {self.timeout:g} s and was killed; {mend}") from None
        except _DiedError as death:
            self._end("the death of its process")
            raise RunError(f"{where}: its process ended while scoring: {death}") from None
        except BaseException:
            self._end("an interruption")  # the answer to this batch would be taken for the next one's
            raise
        if "error" in answer:
            raise RunError(_explain(where, answer, prompts, completions))
        return self._floats(answer.get("scores"), len(completions), where)

    def close(self) -> None:
        """End the child; does nothing the second time."""
        self._end("close()", grace=_CLOSE_SECONDS)

    def _floats(self, scores: Any, count: int, where: str) -> list[float]:
        """Check the answer again on this side: the user's code shares the other side's process."""
        whole = isinstance(scores, list) and len(scores) == count
        if not whole or not all(type(score) is float and math.isfinite(score) for score in scores):
            self._end("a garbled answer")
            raise RunError(f"{where}: its process sent a garbled answer")
        return list(scores)

    def _spawn(self) -> None:
        self._answers, descriptor = os.pipe()
        # The death signal comes when the thread that started the child ends; only the main thread lasts long enough.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        arguments = [os.path.abspath(self.file), self.name, str(descriptor), str(parent)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-P", str(_WORKER), *arguments],
                stdin=subprocess.PIPE,
                stdout=2,
                bufsize=0,
                pass_fds=(descriptor,),
                start_new_session=True,
            )
        finally:
            os.close(descriptor)
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def _exchange(self, request: bytes, limit: float) -> dict[str, Any]:
        """Send a request and wait for one line; neither a full pipe nor a silent child lasts beyond the limit."""
        process = self._process
        assert process is not None and process.stdin is not None
        deadline = time.monotonic() + limit
        unsent = memoryview(request)
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            if unsent:
                selector.register(process.stdin, selectors.EVENT_WRITE)
            while b"\n" not in received:
                remaining = deadline - time.monotonic()
                exited = process.poll() is not None  # asked before reading: what it wrote last still counts
                ready = {key.fd for key, _ in selector.select(max(0.0, min(remaining, _POLL_SECONDS)))}
                if process.stdin.fileno() in ready:
                    unsent = unsent[_write(process.stdin.fileno(), unsent) :]
                    if not unsent:
                        selector.unregister(process.stdin)
                chunk = os.read(self._answers, 65536) if self._answers in ready else b""
                received += chunk
                if not chunk and (exited or self._answers in ready):
                    raise _DiedError(_how_it_ended(process))
                if remaining <= 0 and b"\n" not in received:
                    raise _HungError
        return _parsed(bytes(received))

    def _end(self, reason: str, grace: float = 0.0) -> None:
        """Close for good: let the child finish by itself for `grace` seconds, then kill it and what it started."""
        self._closed = self._closed or reason
        process, self._process = self._process, None
        answers, self._answers = self._answers, -1
        if answers >= 0:
            os.close(answers)
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            with suppress(ProcessLookupError, PermissionError):  # the whole group is gone, or is a zombie (macOS)
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read(file: Path) -> bytes:
    """The file's bytes; ConfigError where there are none to be had."""
    if file.is_file():
        try:
            return file.read_bytes()
        except OSError as error:
            raise ConfigError(f"{file}: the reward function's file can't be read: {error.strerror}") from None
    if file.exists():
        raise ConfigError(f"{file}: not a file; a reward function is written as path/to/file.py:name")
    near = get_close_matches(file.name, [path.name for path in file.parent.glob("*.py")], n=1)
    mend = f"Did you mean '{file.with_name(near[0])}'?" if near else "The path counts from the current folder."
    raise ConfigError(f"{file}: no such file for the reward function. {mend}")


def _write(descriptor: int, unsent: memoryview) -> int:
    """How many bytes the pipe took; a child that closed its end is found by reading."""
    try:
        return os.write(descriptor, unsent[:65536])
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return len(unsent)


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        status = process.wait(_CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        return "it closed its connection to the trainer"
    if status >= 0:
        return f"it exited with status {status} (os._exit, or a crash in a library?)"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"killed by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")


def _parsed(received: bytes) -> dict[str, Any]:
    """The answer; what isn't one comes out as an empty answer, which the callers refuse."""
    try:
        answer = json.loads(received.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _load_problem(ready: dict[str, Any], sha256: str) -> str:
    """Why the child isn't ready to score, "" if it is."""
    if "error" in ready:
        return str(ready["error"])
    if "sha256" not in ready or "records" not in ready:
        return "its process sent a garbled answer"
    return "" if ready["sha256"] == sha256 else "the file was changed after its SHA-256 was taken; start again"


def _explain(where: str, answer: dict[str, Any], prompts: list[str], completions: list[str]) -> str:
    """The first line says what and at which sample; the user's traceback and the sample follow."""
    index, line, details = answer.get("sample"), answer.get("line"), str(answer.get("details") or "")
    count = len(completions)
    place, sample = f"in a batch of {count}", []
    if isinstance(index, int) and 0 <= index < count:
        place = f"{'most likely at ' if details and count > 1 else ''}sample {index + 1} of {count}"
        sample = [f"prompt: {_shown(prompts[index])}", f"completion: {_shown(completions[index])}"]
    at = f"line {line}, " if isinstance(line, int) else ""
    first = f"{where} {answer['error']} ({at}{place})"
    return "\n".join([first, details, *sample]) if details else "; ".join([first, *sample])


def _shown(text: str) -> str:
    """A text on one line, without control characters, cut where it is long."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…")
