"""Files that somebody named, read with bounds: a pipe blocks whoever opens it, /dev/zero never ends; room on disks."""

import errno
import json
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

_LARGEST_JSON = 1 << 26  # bytes


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, without ever waiting for somebody to write it.

    Raises:
        OSError: there is none, it can't be read, or it is a folder, a pipe, a device; `strerror` says which.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise OSError(errno.EINVAL, "the path has a null character", str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def read_regular(path: Path, largest: int) -> bytes:
    """The content of a file of at most `largest` bytes.

    Raises:
        OSError: as `open_regular`, or the file is larger.
    """
    with open_regular(path) as stream:
        content = stream.read(largest + 1)
    if len(content) > largest:
        raise OSError(errno.EFBIG, f"larger than {largest / 1e6:g} MB, which no such file is", str(path))
    return content


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text that somebody else wrote.

    Raises:
        ValueError: it isn't JSON, or its brackets are nested so deeply that no reader follows.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: as `read_regular`.
        ValueError: as `parse_json`.
    """
    return parse_json(read_regular(path, _LARGEST_JSON))


def room(folder: Path) -> str:
    """How much the disk of a folder has left, in words: mlx doesn't say why a file can't be written."""
    with suppress(OSError):
        return f"the disk has {shutil.disk_usage(folder).free / 1e6:.1f} MB free"
    return "the disk can't be asked how much is free"
