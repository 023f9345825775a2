"""A JSONL file that grows while it is read, and may be cut by a kill at any byte."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from mlx_ppo.files import open_regular, parse_json

Row = dict[str, Any]
_LARGEST = 1 << 30  # bytes that are read at once


class Lines:
    """The rows of a file, read on from where the last reading ended. One thread at a time."""

    def __init__(self, path: Path, right: Callable[[Row], bool] | None = None) -> None:
        """Nothing is read yet; the file may be missing. `right` tells rows from what only looks like one."""
        self.path = path
        self._right = right
        self.rows: list[Row] = []
        self.damaged = 0  # whole lines that aren't rows: what a kill cut, with what came after it
        self._offset = 0
        self._file = 0  # its number in the file system

    def read(self) -> list[Row]:
        """Rows that are new; all of them again where the file was replaced or cut (`rows` then starts anew).

        A last line without its end isn't read yet.

        Raises:
            OSError: it can't be read, is no file, or is larger than any such file.
        """
        try:
            with open_regular(self.path) as file:
                return self._read(file)
        except FileNotFoundError:
            self.rows, self.damaged, self._offset = [], 0, 0
            return []

    def _read(self, file: IO[bytes]) -> list[Row]:
        found = os.fstat(file.fileno())
        if found.st_ino != self._file or found.st_size < self._offset:
            self.rows, self.damaged, self._offset, self._file = [], 0, 0, found.st_ino
        if found.st_size - self._offset > _LARGEST:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(self.path))
        file.seek(self._offset)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        new = []
        for line in whole.split(b"\n")[:-1]:
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and (self._right is None or self._right(row)):
                new.append(row)
            elif line.strip():
                self.damaged += 1
        self.rows += new
        return new


def end_torn_line(file: IO[bytes]) -> None:
    """What a kill left without a line's end must not join the next line; the file is open for appending and reading."""
    if file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n":
        file.write(b"\n")
        file.flush()
