"""A user's Python reward function, run in a child process of its own.

The child can be timed out and killed, and whatever the user's code does to its process stays there.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mlx_ppo.errors import ConfigError, RunError, printable
from mlx_ppo.rewards.scorer import TextScorer
from mlx_ppo.runtime.child import Child, DiedError, HungError

LOAD_SECONDS = 60.0  # at least this long for loading the user's file: it may import large libraries
_CLOSE_SECONDS = 0.8
_SHOWN_CHARACTERS = 120
_WORKER = Path(__file__).with_name("worker.py")


def parse_reference(text: str) -> tuple[str, str]:
    """Split `path/to/file.py:name` into the file and the function's name.

    Raises:
        ValueError: the text has another form.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{text!r} isn't a reward function; write it as path/to/file.py:name")
    return file, name


class RewardFunction(TextScorer):
    """Scores of a user's function, whose parameters get what their names say.

    Those are `prompts`, `completions`, `records`, and fields of the records: `(completions, answer, **others)`.

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
        self.files: dict[str, str] = {}  # SHA-256 of each other file that the function has read so far
        self._child: Child | None = None
        self._needs: tuple[str, ...] = ()
        self._closed = ""

    @property
    def described(self) -> str:
        """What judges, in words."""
        return printable(f"the function {self.name} of {self.file}")

    @property
    def pid(self) -> int | None:
        """The child's process id, None when there is no child."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """Start the child and load the user's file, unless that is done.

        Raises:
            ConfigError: the file raises, holds no such function, or was changed since it was hashed.
            RunError: this object is closed.
        """
        if self._closed:
            raise RunError(f"{self.file}:{self.name} can't be called again: it was ended by {self._closed}")
        if self._child is not None:
            return
        limit = max(self.timeout, LOAD_SECONDS)
        ready: dict[str, Any] = {}
        try:
            self._child = Child(_WORKER, [os.path.abspath(self.file), self.name])
            ready = self._child.exchange(b"", limit)
            problem = _load_problem(ready, self.sha256)
        except HungError:
            problem = f"the file took longer than {limit:g} s to load"
        except DiedError as death:
            problem = f"the process ended while the file was loading: {death}"
        except BaseException:
            self._end("an interruption while its file was loading")
            raise
        if problem:
            self._end("a failure to load")
            line = f":{ready['line']}" if isinstance(ready.get("line"), int) else ""
            raise ConfigError(f"{self.file}{line}: the reward function can't be loaded: {problem}")
        self._needs = tuple(map(str, ready["needs"]))
        self._note_files(ready)

    def score(self, prompts: list[str], completions: list[str], records: list[dict[str, Any]]) -> list[float]:
        """One finite score per completion.

        Args:
            prompts: the prompt of each completion.
            completions: the texts to score.
            records: the JSONL record of each prompt; a parameter with the name of a field gets that of each.

        Raises:
            RunError: the function raised, hung, died, or returned anything but one finite number per completion.
        """
        if not len(prompts) == len(completions) == len(records):
            raise ValueError(f"{len(prompts)} prompts, {len(completions)} completions, {len(records)} records")
        self.start()
        assert self._child is not None
        if not completions:
            return []
        request = {"prompts": prompts, "completions": completions, "records": records}
        where = f"reward function {self.file}:{self.name}"
        try:
            answer = self._child.exchange(json.dumps(request).encode("ascii") + b"\n", self.timeout)
        except HungError:
            self._end("a timeout")
            mend = "make it faster, or raise the config key 'timeout'"
            batch = f"for a batch of {len(completions)}"
            raise RunError(f"{where} gave no scores {batch} within {self.timeout:g} s and was killed; {mend}") from None
        except DiedError as death:
            self._end("the death of its process")
            raise RunError(f"{where}: its process ended while scoring: {death}") from None
        except BaseException:
            self._end("an interruption")  # the answer to this batch would be taken for the next one's
            raise
        self._note_files(answer)
        if "error" in answer:
            raise RunError(_explain(where, answer, prompts, completions))
        return self._floats(answer.get("scores"), len(completions), where)

    def require_fields(self, records: Iterable[dict[str, Any]]) -> None:
        """Refuse prompts whose records lack a field that the function, which has been started, has a parameter for.

        Raises:
            ConfigError: names the parameter.
        """
        for record in records:
            for field in self._needs:
                if field not in record:
                    has = ", ".join(repr(key) for key in list(record)[:8])
                    raise ConfigError(
                        f"{self.file}:{self.name} has a parameter '{field}', and prompts without a field of that name "
                        f"(their fields: {has}); add it to the prompts, or give the parameter a default"
                    )

    def close(self) -> None:
        """End the child; does nothing the second time."""
        self._end("close()", grace=_CLOSE_SECONDS)

    def _note_files(self, answer: dict[str, Any]) -> None:
        read = answer.get("read")
        for name in read if isinstance(read, list) else ():
            with suppress(OSError, ValueError), open(str(name), "rb") as file:
                self.files[str(name)] = hashlib.file_digest(file, "sha256").hexdigest()

    def _floats(self, scores: Any, count: int, where: str) -> list[float]:
        """Check the answer again on this side: the user's code shares the other side's process."""
        whole = isinstance(scores, list) and len(scores) == count
        if not whole or not all(type(score) is float and math.isfinite(score) for score in scores):
            self._end("a garbled answer")
            raise RunError(f"{where}: its process sent a garbled answer")
        return list(scores)

    def _end(self, reason: str, grace: float = 0.0) -> None:
        """Close for good: let the child finish by itself for `grace` seconds, then kill it and what it started."""
        self._closed = self._closed or reason
        child, self._child = self._child, None
        if child is not None:
            child.end(grace)


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


def _load_problem(ready: dict[str, Any], sha256: str) -> str:
    """Why the child isn't ready to score, "" if it is."""
    if "error" in ready:
        return str(ready["error"])
    if "sha256" not in ready or not isinstance(ready.get("needs"), list):
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
