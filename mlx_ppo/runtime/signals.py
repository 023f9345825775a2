"""What asks a job to stop at the next phase's end: SIGINT, SIGTERM (a second ends the process at once), a watchdog."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)


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

    def ask(self, number: int, _: FrameType | None = None) -> None:
        """Signal handler of a supervised process, which may get one signal twice: only the first counts."""
        if self.received is None:
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
def catching_interrupts(*, supervised: bool = False) -> Iterator[Interrupts]:
    """Install the handlers for the length of a `with` block (main thread only), and put the old ones back.

    Args:
        supervised: another process counts the signals, and ends this one at the second.
    """
    interrupts = Interrupts()
    handler = interrupts.ask if supervised else interrupts.handle
    previous = {number: signal.signal(number, handler) for number in STOPPING}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    try:
        yield interrupts
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def holding_back_interrupts() -> Iterator[None]:
    """Let signals wait for the length of a `with` block; a process started in it begins with them waiting."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
