"""A judge's answers, kept by what was asked, so that nothing is asked twice: in a run's folder, over its interruptions.

A row a question: `key` is the SHA-256 of the judge's name and the whole question, which has rubric, prompt and
completions in it; `value` what was read of its answer, null where no attempt gave a usable one; `check` the beginning
of the SHA-256 of both, so that a flipped bit isn't taken for an answer.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_ppo.errors import RunError
from mlx_ppo.files import parse_json

if TYPE_CHECKING:
    from mlx_ppo.rewards.judge_questions import Question, Value

ANSWERS = "judge.jsonl"  # in the folder of a run


def key_of(model: str, question: "Question") -> str:
    """By what an answer is found again."""
    return hashlib.sha256(json.dumps([model, question.messages]).encode()).hexdigest()


class Answers:
    """Answers by key, in memory and, where there is a folder, in a file of it. One thread at a time."""

    def __init__(self, folder: Path | None) -> None:
        """Read what is there; half a row at the end, which a kill left, goes.

        Raises:
            RunError: the file can't be read.
        """
        self._path = folder / ANSWERS if folder is not None else None
        self._known: dict[str, Value | None] = {}
        self.damaged: list[int] = []  # numbers of the lines that aren't what was written
        if self._path is not None and self._path.exists():
            _end_with_a_row(self._path)
            for number, row in rows(self._path):
                if row is None:
                    self.damaged.append(number)
                else:
                    value = row["value"]
                    self._known[row["key"]] = tuple(value) if isinstance(value, list) else value

    def __len__(self) -> int:
        """How many there are."""
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        """Whether a question has an answer, or is known to have none."""
        return key in self._known

    def __getitem__(self, key: str) -> "Value | None":
        """The answer."""
        return self._known[key]

    def keep(self, key: str, value: "Value | None") -> None:
        """Add an answer.

        Raises:
            RunError: the file can't be written.
        """
        if self._path is not None:
            row = {"key": key, "value": value, "check": _check(key, value)}
            try:
                with open(self._path, "ab") as file:
                    file.write(json.dumps(row).encode("ascii") + b"\n")
            except OSError as error:
                raise RunError(f"{self._path}: cannot be written ({error.strerror})") from None
        self._known[key] = value


def _end_with_a_row(path: Path) -> None:
    try:
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    except OSError as error:
        raise RunError(f"{path}: cannot be read or repaired ({error.strerror})") from None


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Numbers and rows of a file of answers, None for a row that isn't as it was written; half a last row is no row.

    Raises:
        RunError: the file can't be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            whole = row["check"] == _check(row["key"], row["value"])
        except (ValueError, LookupError, TypeError):
            whole = False
        yield number, row if whole else None


def _check(key: str, value: Any) -> str:
    return hashlib.sha256(json.dumps([key, value]).encode()).hexdigest()[:16]
