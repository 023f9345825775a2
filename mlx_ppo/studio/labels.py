"""The answers that people gave: one file, only ever appended to, on the drive before the page hears of it."""

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from mlx_ppo.errors import DataError, RunError
from mlx_ppo.runs.folder import sync
from mlx_ppo.runtime.system import flush
from mlx_ppo.studio.lines import Lines, Row, end_torn_line

ANSWERS = "answers.jsonl"
UNDO = "undo"
VERDICTS = ("left", "right", "tie", "bad", "skip")
LOWEST, HIGHEST = -4, 4  # of a rating
_SKIPPED = ("rating", "rewrite")
_TEXTS = ("set", "tab", "left", "right", "completion", "left_by", "right_by")  # of a row
_LONGEST = 100_000  # characters of a rewritten answer


class AnsweredError(RunError):
    """Somebody, maybe this person in another tab, has answered this question already."""


class Answers:
    """A project's answers. Several processes and threads may add to them; each question is answered once.

    A row has `id`, `time`, `question`, `kind`, the `tab` it came from, the texts that were shown and

    - `pair`: `verdict`, one of `VERDICTS`, on `left` and `right`;
    - `rating`: `rating` of `completion`, an integer from -4 to 4;
    - `rewrite`: `better`, typed in place of `completion`.

    Every kind may have the verdict `skip` instead.

    A row of kind `undo` takes back the answer named by `of`, whose question is then open again.
    """

    def __init__(self, folder: Path) -> None:
        """The answers of a folder, which is made with the first one."""
        self._path = folder / ANSWERS
        self._lines = Lines(self._path, _is_kept)
        self._thread = threading.Lock()
        self._standing: dict[str, Row] = {}  # by question, in the order of the answers

    @property
    def damaged(self) -> int:
        """Lines that a kill cut; they count as never given."""
        return self._lines.damaged

    def standing(self) -> dict[str, Row]:
        """The answers that count, by question, oldest first."""
        with self._thread:
            self._catch_up()
            return dict(self._standing)

    def add(self, answer: Row) -> Row:
        """Keep an answer; it is on the drive when this returns.

        Args:
            answer: `question`, `kind`, `tab`, and what the kind asks for.
        Returns:
            The row as it is kept.
        Raises:
            AnsweredError: the question has an answer that stands.
            DataError: the answer isn't one.
            RunError: it can't be written.
        """
        _check(answer)
        with self._locked() as file:
            if answer["question"] in self._standing:
                raise AnsweredError("this one has been answered already, maybe in another tab")
            return self._append(file, answer)

    def undo(self, tab: str) -> Row | None:
        """Take back the last answer that a tab gave and that stands; returns it, None where there is none."""
        with self._locked() as file:
            last = next((row for row in reversed(self._standing.values()) if row.get("tab") == tab), None)
            if last is not None:
                self._append(file, {"kind": UNDO, "of": last["id"], "tab": tab})
            return last

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        with self._thread:
            try:
                new = not self._path.exists()
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with open(self._path, "a+b", opener=_not_elsewhere) as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    if new:
                        sync(self._path.parent)
                    end_torn_line(file)
                    self._catch_up()
                    yield file
            except OSError as error:
                raise RunError(
                    f"{self._path}: cannot be written ({error.strerror or error}); give the answer again"
                ) from None

    def _append(self, file: IO[bytes], row: Row) -> Row:
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        whole = {"id": len(self._lines.rows) + self.damaged + 1, "time": now, **row}
        file.write(json.dumps(whole, ensure_ascii=True).encode("ascii") + b"\n")
        file.flush()
        flush(file.fileno())
        self._catch_up()
        return whole

    def _catch_up(self) -> None:
        new = self._lines.read()
        if len(new) == len(self._lines.rows):  # the file was replaced: count from its start
            self._standing = {}
        for row in new:
            if row.get("kind") == UNDO:
                for question in [name for name, kept in self._standing.items() if kept["id"] == row.get("of")]:
                    del self._standing[question]
            else:
                self._standing.setdefault(str(row["question"]), row)


def _not_elsewhere(path: str, flags: int) -> int:
    """Open the file itself, not what a link in its place leads to, nor a pipe that would wait."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


def _is_kept(row: Row) -> bool:
    """Whether a line is one that `Answers` writes."""
    if row.get("kind") == UNDO:
        return "of" in row
    try:
        _check(row)
    except DataError:
        return False
    seconds = row.get("seconds", 0)
    return (
        "id" in row
        and all(isinstance(row.get(key, ""), str) for key in _TEXTS)
        and isinstance(seconds, int | float)
        and 0 <= seconds < float("inf")
    )


def _check(answer: Row) -> None:
    kind = str(answer.get("kind"))
    if kind in _SKIPPED and answer.get("verdict") == "skip":
        right = not {"rating", "better"} & answer.keys()
    elif kind == "pair":
        right = answer.get("verdict") in VERDICTS
    elif kind == "rating":
        rating = answer.get("rating")
        right = type(rating) is int and LOWEST <= rating <= HIGHEST
    elif kind == "rewrite":
        right = _is_better(answer.get("better"), answer.get("completion"))
    else:
        right = False
    if not right or not isinstance(answer.get("question"), str):
        raise DataError(f"this is no answer of kind {kind[:40]!r}; nothing was kept")


def _is_better(text: Any, old: Any) -> bool:
    if not isinstance(text, str) or not text.strip() or len(text) > _LONGEST:
        raise DataError("write a better answer, with some text in it")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError("the text has half of a character in it; type it again")
    if text == old:
        raise DataError("this is the same answer; change it, or skip")
    return True
