"""What asks a job to stop at the next phase's end: SIGINT, SIGTERM (a second ends the process at once), a watchdog."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """A signal asked the job to stop; everything is saved by the time this is raised to the command line."""

    def __init__(self, number: int) -> None:
        """Keep the signal's number; the exit code is 128 above it."""
        self.exit_code = 128 + number
        super().__init__(signal.Signals(number).name)


class Stopped(Interrupted):
    """Not a signal but a danger made the job stop; everything is saved, as after a signal."""

    def __init__(self, why: str) -> None:
        """Keep the reason, which the command line shows."""
        self.exit_code = 4
        Exception.__init__(self, why)


class Interrupts:
    """Remembers the first signal."""

    def __init__(self) -> None:
        """No signal yet."""
        self.received: int | None = None
        self.danger = ""

    def handle(self, number: int, _: FrameType | None) -> None:
        """Signal handler."""
        if self.received is not None:
            os._exit(128 + number)
        self.received = number

    def stop(self, why: str) -> None:
        """Ask the job to stop because of a danger; called from a thread that watches."""
        self.danger = why

    def check(self) -> None:
        """Raise Interrupted if a signal came or a danger was seen; called between phases."""
        if self.received is not None:
            raise Interrupted(self.received)
        if self.danger:
            raise Stopped(self.danger)


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
