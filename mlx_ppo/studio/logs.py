"""A run's logs, read while they are written: what is new since the last look, and whether what was read still holds."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlx_ppo.files import open_regular
from mlx_ppo.runs.folder import SAMPLES, log_row

LONGEST = 1 << 24  # bytes of a line that is looked at
_MOST = 1 << 28  # bytes that are read at once; what is left comes with the next look
_START = re.compile(rb'^\{"step": (\d{1,15}), "kind": "(\w+)"', re.MULTILINE)


class New(NamedTuple):
    """Whole lines that have come to a log."""

    start: int  # bytes before them
    content: bytes
    cut: bool  # what was read before is no longer there: `resume` went back to a checkpoint


class Log:
    """Follows a JSONL log. Half a line at its end is left for the next look."""

    def __init__(self, path: Path) -> None:
        """Nothing was read yet; the file needn't be there."""
        self._path = path
        self._file: tuple[int, int] | None = None
        self._offset = 0

    def read(self) -> New:
        """What has come since the last call."""
        try:
            stream = open_regular(self._path)
        except OSError:
            cut, self._file, self._offset = self._file is not None, None, 0
            return New(0, b"", cut)
        with stream:
            status = os.fstat(stream.fileno())
            file = (status.st_dev, status.st_ino)
            cut = self._file is not None and (file != self._file or status.st_size < self._offset)
            start = 0 if cut else self._offset
            stream.seek(start)
            content = stream.read(_MOST)
        content = content[: content.rfind(b"\n") + 1]
        self._file, self._offset = file, start + len(content)
        return New(start, content, cut)


def rows_of(content: bytes) -> Iterator[dict[str, Any]]:
    """The rows among whole lines; what isn't a row is left out."""
    for line in content.split(b"\n"):
        row = log_row(line) if line else None
        if row is not None:
            yield row


class Samples:
    """Where in `samples.jsonl` the texts of each step are; they are read when somebody looks at them."""

    def __init__(self, folder: Path) -> None:
        """Nothing was read yet."""
        self._path = folder / SAMPLES
        self._log = Log(self._path)
        self._evaluations: dict[int, int] = {}  # step -> bytes before its first line
        self._iterations: dict[int, int] = {}

    @property
    def evaluations(self) -> list[int]:
        """Steps with answers to the held-out prompts, in order."""
        return sorted(self._evaluations)

    @property
    def iterations(self) -> list[int]:
        """Steps with responses of their rollout, in order."""
        return sorted(self._iterations)

    @property
    def counts(self) -> tuple[int, int]:
        """How many iterations and evaluations there are."""
        return len(self._iterations), len(self._evaluations)

    def update(self) -> bool:
        """Look for new lines; True where what was there is no longer."""
        new = self._log.read()
        if new.cut:
            self._evaluations.clear()
            self._iterations.clear()
        for found in _START.finditer(new.content):
            step, kind = int(found[1]), found[2]
            if kind != b"summary":
                places = self._evaluations if kind == b"evaluation" else self._iterations
                places.setdefault(step, new.start + found.start())
        return new.cut

    def evaluation(self, step: int, count: int) -> list[Mapping[str, Any]]:
        """The first answers of an evaluation."""
        return self._read(self._evaluations.get(step), step, count)

    def iteration(self, step: int) -> list[Mapping[str, Any]]:
        """The responses of an iteration that were kept: best, worst, of the median score, one by chance."""
        return self._read(self._iterations.get(step), step, 4)

    def _read(self, start: int | None, step: int, count: int) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        if start is None:
            return found
        try:
            stream = open_regular(self._path)
        except OSError:
            return found
        with stream:
            stream.seek(start)
            kind = None
            while len(found) < count:
                row = log_row(stream.readline(LONGEST))
                evaluation = row is not None and row.get("kind") == "evaluation"
                if row is None or row["step"] != step or row.get("kind") == "summary" or kind not in (None, evaluation):
                    break
                kind = evaluation
                found.append(row)
        return found
