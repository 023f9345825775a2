"""Servers that end with the test, and one browser for all tests."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, end_jobs, open_browser


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Start servers that end with the test."""
    started: list[Served] = []

    def start(folder: Path, *arguments: str) -> Served:
        started.append(Served(folder, *arguments))
        return started[-1]

    yield start
    for served in started:
        served.end(signal.SIGKILL)
        end_jobs(served.folder)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, headless; skipped where it isn't installed."""
    made = open_browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.quit()
