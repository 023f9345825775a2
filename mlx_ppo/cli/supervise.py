"""A run in a child process: this one shows and journals what it reports, and says why it ended."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from mlx_ppo import errors
from mlx_ppo.cli.work import Answers, Order, short, stopped, worth_keeping
from mlx_ppo.errors import RunError
from mlx_ppo.runs.folder import MEMORY, log_row
from mlx_ppo.runtime import ring_lines
from mlx_ppo.runtime.signals import STOPPING, holding_back_interrupts
from mlx_ppo.runtime.system import adopt_orphans, memory_kills, most_held_by_children

if TYPE_CHECKING:
    from mlx_ppo.cli.display import Display

JOURNAL = "journal.jsonl"
_LAST = ("finished", "stopped", "failed", "crashed", "device", "lost")
_GIB = 1 << 30
_END_SECONDS = 5.0
_LAST_WORDS = 1.0  # seconds


class Journal:
    """What happened and when, in the run's `journal.jsonl`; and where the run is now, in words."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written yet: another process may be working in the run."""
        self._file = folder / JOURNAL
        self._begun = False
        self.where = ""
        self.first: float | None = None  # iteration that the present process has finished

    def note(self, **values: Any) -> None:
        """A line, once the run has begun; a full disk is left to the run, which has more to write."""
        if not self._begun:
            return
        row = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), **values}
        with suppress(OSError), open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def follow(self, name: str, values: list[Any]) -> None:
        """Keep up with an event, the first of which says that the child holds the run's lock."""
        if not self._begun:
            self._begun = True
            self.note(event="started", supervisor=os.getpid())
        if name == "phase":
            phase, iteration, _ = values
            self.where = f"in the phase {phase!r} " + (
                f"of iteration {iteration}" if iteration else "before the first iteration"
            )
            self.note(phase=phase, iteration=iteration)
        elif name == "iteration":
            self.where = f"after iteration {int(values[0]['step'])}"
            self.first = values[0]["step"] if self.first is None else self.first
        elif name == "step":
            self.where = f"after step {values[0]} of {values[1]}"


class Relay:
    """Signals to this process: the first asks the child to save and stop, the second ends it at once."""

    def __init__(self) -> None:
        """No signal and no child yet."""
        self.first: int | None = None
        self.second: int | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def handle(self, number: int, _: FrameType | None) -> None:
        """Signal handler."""
        if self.first is None:
            self.first = number
        else:
            self.second = number
        self._pass_on()

    def attach(self, child: "subprocess.Popen[bytes]") -> None:
        """Pass signals to this child from now on, and those that came before."""
        self._child = child
        self._pass_on()

    def _pass_on(self) -> None:
        if self._child is not None and self.first is not None:
            self._child.send_signal(self.first if self.second is None else signal.SIGKILL)


@contextmanager
def _relaying() -> Iterator[Relay]:
    relay = Relay()
    previous = {number: signal.signal(number, relay.handle) for number in STOPPING}
    try:
        yield relay
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


class Trainer:
    """The process that trains. It ends with this one: its standard input then does."""

    def __init__(self, order: Order, relay: Relay) -> None:
        """Start it; the relay gets to know it."""
        reading, writing = os.pipe()
        # this process's own temporary folder: the child makes itself a private one for mlx
        environment = {**os.environ, "TMPDIR": tempfile.gettempdir()}
        with holding_back_interrupts():
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "mlx_ppo.cli.work", str(writing)],
                    stdin=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    pass_fds=(writing,),
                    env=environment,
                )
            finally:
                os.close(writing)
            self._events = open(reading, "rb")  # noqa: SIM115  closed by `end`
            relay.attach(self._process)
        assert self._process.stdin is not None and self._process.stderr is not None
        self._errors = ring_lines.Relay(self._process.stderr, 2)
        with suppress(BrokenPipeError):  # it is dead already: `end` will tell
            self._process.stdin.write(json.dumps(order._asdict()).encode() + b"\n")
            self._process.stdin.flush()

    def events(self) -> Iterator[tuple[str, list[Any]]]:
        """What it reports, until it ends."""
        for line in self._events:
            with suppress(ValueError):  # a line that a kill cut
                name, *values = json.loads(line)
                yield name, values

    def end(self) -> int:
        """Wait for it, having asked it to stop where it still works; its exit status."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._events.close()
        status = self._process.wait()
        self._errors.end(_LAST_WORDS)
        return status


def supervise(order: Order, *, retries: int, planned: bool) -> list[str]:
    """Do a run's work in a child process; the lines to print at its end.

    Args:
        order: what is to be done.
        retries: how many times a run that is killed goes on by itself, or one of whose processes is lost.
        planned: it has a plan, which is made smaller after a kill.
    Raises:
        UserError: as the job's.
        RunError: the child was killed.
        SystemExit: it was stopped by a signal, or its code is broken; what is to say has been said.
    """
    folder = Path(order.folder)
    journal = Journal(folder)
    adopt_orphans()
    with _relaying() as relay:
        now = order
        for attempt in range(retries + 1):
            kills = memory_kills()
            journal.where, journal.first = "while it started", None
            last, status = _attend(now._replace(supervisor=os.getpid()), relay, journal)
            if relay.second is not None:
                _end_what_is_left()
                journal.note(event="ended", by=signal.Signals(relay.second).name)
                raise SystemExit(128 + relay.second)
            refused = last is not None and last[0] in ("device", "lost")
            if last is not None and not refused:
                return _outcome(last, folder, journal)
            _end_what_is_left()
            starved = kills is not None and memory_kills() != kills
            said = (
                f"{journal.where}, {last[1][0]}"
                if last is not None
                else _death(status, journal, folder, starved=starved)
            )
            journal.note(event="died", status=status, why=said)
            if not (refused or status == -signal.SIGKILL) or relay.first is not None or attempt == retries:
                break
            killed = starved or last is None or last[0] != "lost"
            now = Order(str(folder), smaller=killed and planned)
            how = "new processes" if not killed else "a smaller plan" if planned else "the last checkpoint"
            click.echo(f"warning: {said}; going on with {how} ({attempt + 1} of {retries})", err=True)
    remedy = f" {last[1][1]}." if last is not None and last[1][1] else ""
    raise RunError(f"{said}.{remedy} {_mend(folder)}")


def _attend(order: Order, relay: Relay, journal: Journal) -> tuple[tuple[str, Any] | None, int]:
    """Show a child's events until it ends; its last word, if it had one, and its exit status."""
    child = Trainer(order, relay)
    last = None
    try:
        from mlx_ppo.cli.display import Display  # here, while the child starts

        with Display() as display:
            for name, values in child.events():
                if name in _LAST:
                    last = (name, values)
                else:
                    journal.follow(name, values)
                    _show(display, name, values)
    finally:
        status = child.end()
    return last, status


def _show(display: "Display", name: str, values: list[Any]) -> None:
    if name == "before_and_after":
        values = [*(Answers(*answers) for answers in values[:2]), values[2]]
    getattr(display, name)(*values)


def _outcome(last: tuple[str, list[Any]], folder: Path, journal: Journal) -> list[str]:
    name, values = last
    if name == "finished":
        journal.note(event="finished")
        return [str(line) for line in values[0]]
    if name == "stopped":
        journal.note(event="stopped", by=values[0])
        raise stopped(values[0], values[1], folder)
    if name == "failed":
        kind, text = values
        journal.note(event="failed", why=text)
        raise getattr(errors, kind)(text)
    journal.note(event="crashed", where=journal.where)
    click.echo(values[0], err=True, nl=False)
    raise SystemExit(1)


def _death(status: int, journal: Journal, folder: Path, *, starved: bool) -> str:
    """Why a child that said nothing ended, in one line."""
    where = journal.where
    if status >= 0:
        return f"the training process ended {where} with status {status} and without a word"
    if status != -signal.SIGKILL:
        known = -status in set(signal.Signals)
        name = signal.Signals(-status).name if known else f"signal {-status}"
        return f"the training process was ended {where} by {name}: a fault in a library, or a signal from outside"
    held = max(most_held_by_children(), _measured(folder, journal.first))
    memory = f"it had held up to {held / _GIB:.2f} GiB" + _expected(folder)
    cause = "the system was out of memory" if starved else "probably the system was out of memory"
    return f"the training process was killed from outside {where} (signal 9); {cause} ({memory})"


def _measured(folder: Path, first: float | None) -> int:
    """Bytes of the largest phase logged from an iteration on: a GPU's arrays aren't in a process's resident size."""
    with suppress(OSError):
        rows = (log_row(line) for line in (folder / MEMORY).read_bytes().splitlines())
        own = (row for row in rows if row is not None and first is not None and row["step"] >= first)
        sizes = (size for row in own for name, size in row.items() if name != "step")
        return max((size for size in sizes if isinstance(size, int)), default=0)
    return 0


def _expected(folder: Path) -> str:
    try:
        phases = json.loads((folder / "plan.json").read_text("utf-8"))["phases"].values()
        most = max(phase["mlx_bytes"] + phase["numpy_bytes"] for phase in phases)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f", the plan expected up to {most / _GIB:.2f} GiB of arrays"


def _mend(folder: Path) -> str:
    if not worth_keeping(folder):
        return "Nothing had been saved yet; start again, with a smaller memory.budget_gb if memory was short"
    return f"Go on with: mlx-ppo resume {short(folder)}"


def _end_what_is_left() -> None:
    """End what a killed child had started; where orphans aren't adopted, its workers notice by themselves."""
    import psutil

    left = psutil.Process().children(recursive=True)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=_END_SECONDS)
