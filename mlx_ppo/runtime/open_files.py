"""Importing mlx-lm without its effect on the process: it lowers the limit of open files."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def open_files_limit_kept() -> Iterator[None]:
    """`import mlx_lm` lowers the process's limit of open files; put the soft limit back as far as allowed."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        yield
    finally:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            hard = before[1]
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], hard), hard))
