"""SIGINT and SIGTERM: the first asks the job to stop at the next phase's end, the second ends the process at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """A signal asked the job to stop; everything is saved by the time this is raised to the command line."""

    def __init__(self, number: int) -> None:
        """Keep the signal's number; the exit code is 128 above it."""
        self.number = number
        super().__init__(signal.Signals(number).name)


class Interrupts:
    """Remembers the first signal."""

    def __init__(self) -> None:
        """No signal yet."""
        self.received: int | None = None

    def handle(self, number: int, _: FrameType | None) -> None:
        """Signal handler."""
        if self.received is not None:
            os._exit(128 + number)
        self.received = number

    def check(self) -> None:
        """Raise Interrupted if a signal came; called between phases."""
        if self.received is not None:
            raise Interrupted(self.received)


@contextmanager
def catching_interrupts() -> Iterator[Interrupts]:
    """Install the handlers for the length of a `with` block (main thread only), and put the old ones back."""
    interrupts = Interrupts()
    previous = {number: signal.signal(number, interrupts.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
