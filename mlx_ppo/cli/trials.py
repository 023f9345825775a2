"""Commands as a user gives them, in a folder of their own and within a bounded time: what `acceptance` is made of."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mlx_ppo.bundle import lora_example
from mlx_ppo.errors import RunError
from mlx_ppo.runs.folder import METRICS

_COMMAND = "import sys; from mlx_ppo.cli.main import main; main()"
# A command whose controlling terminal is its standard input; what nohup has ignored counts again.
IN_TERMINAL = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)
_QUICK = ("data.eval_count=4", "rollout.prompts=8", "rollout.max_tokens=12", "ppo.epochs=1", "ppo.minibatches=2")
_FULL = 10  # minutes from which on the example's own sizes are used
_SHORTEST, _LONGEST = 20.0, 60.0  # minutes that all may take together; in between, four times the long run


class Place:
    """A folder for the runs, how large they are, and how long they may take."""

    def __init__(self, folder: Path, minutes: float) -> None:
        """Nothing runs yet; `minutes`: of the long run, by which all else is measured."""
        self.folder, self.minutes = folder, minutes
        self.sizes: Sequence[str] = () if minutes >= _FULL else _QUICK
        self.limit = 60 * min(_LONGEST, max(_SHORTEST, 4 * minutes))  # seconds of all that is tried
        self.share, self._end = self.limit, time.monotonic() + self.limit

    def begin(self, share: float) -> None:
        """Something begins that has this share of the limit."""
        self.share = self.limit * share
        self._end = time.monotonic() + self.share

    def left(self) -> float:
        """Seconds of what has begun; TimeoutExpired where none is left."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise subprocess.TimeoutExpired("", self.share)
        return left

    def command(self, *arguments: str) -> list[str]:
        """One of this program."""
        return [sys.executable, "-P", "-c", _COMMAND, *arguments]

    def train(self, name: str, *settings: str, config: Sequence[str] = ()) -> list[str]:
        """A run of a name, of the sizes chosen, changed by `settings`; the example with LoRA where no file is given."""
        given = (f"run.folder={self.folder}", f"run.name={name}", *self.sizes, *settings)
        options = [part for setting in given for part in ("--set", setting)]
        return self.command("train", *(config or [str(lora_example())]), *options)

    def run(self, command: list[str]) -> "subprocess.CompletedProcess[str]":
        """Run to its end; TimeoutExpired where there isn't the time."""
        return subprocess.run(command, capture_output=True, text=True, timeout=self.left(), cwd=self.folder)

    @contextmanager
    def started(self, command: list[str], terminal: int = subprocess.DEVNULL) -> Iterator["subprocess.Popen[bytes]"]:
        """A process in a session of its own, which doesn't outlast the `with` block."""
        process = subprocess.Popen(
            command, stdin=terminal, stdout=terminal, stderr=terminal, cwd=self.folder, start_new_session=True
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError, PermissionError):  # the whole group is gone, or is a zombie (macOS)
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def rows(self, name: str, file: str = METRICS) -> list[dict[str, Any]]:
        """A run's log; empty where it has none yet."""
        with suppress(OSError, ValueError):
            return [json.loads(line) for line in (self.folder / name / file).read_bytes().splitlines()]
        return []

    def shown(self, text: str) -> str:
        """Words without the names of this machine's folders."""
        text = text.replace(str(self.folder), ".").replace(str(Path.home()), "~")
        return text.replace(str(Path(__file__).parents[1]), "mlx_ppo").strip()

    def until(
        self, name: str, iterations: int, process: "subprocess.Popen[bytes]", screen: BinaryIO | None = None
    ) -> None:
        """Wait until a run has done so many; what it writes on a screen, which mustn't block, is read.

        Raises:
            RunError: it has ended before.
        """
        while len(self.rows(name)) < iterations:
            if process.poll() is not None:
                raise RunError(f"the run ended with {process.poll()} before iteration {iterations}")
            if screen is not None:
                with suppress(OSError):  # the run has closed it
                    screen.read(1 << 16)
            time.sleep(min(0.05, self.left()))


def last_line(text: str) -> str:
    """Of what a command has written."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no word"
