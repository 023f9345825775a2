"""Importing mlx-lm without its effect on the process: it lowers the limit of open files."""

import contextlib
import resource
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def open_files_limit_kept() -> Iterator[None]:
    """`import mlx_lm` sets the limit of open files, or fails where it may not: meanwhile nothing sets it."""
    setting = resource.setrlimit

    def ignoring(which: int, limits: Any) -> None:
        if which != resource.RLIMIT_NOFILE:
            setting(which, limits)

    resource.setrlimit = ignoring
    try:
        yield
    finally:
        resource.setrlimit = setting
