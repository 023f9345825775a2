"""The parent's side of a comparison: sides take turns, and what they measured becomes JSON and a Markdown table."""

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from environments import machine, versions

DISTURBED = 0.15  # cores kept busy by other processes during a round
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Side:
    """One of those that are compared: a process that waits for its turns."""

    name: str
    python: Path
    worker: str  # a script beside this one
    order: dict[str, Any]
    lacks: str = ""  # what the others have and it hasn't
    rounds: list[dict[str, Any]] = field(default_factory=list)
    warm: int = 1  # first rounds that don't count
    limit: int = 1 << 30  # rounds at most, those included
    tasks: tuple[str, ...] | None = None  # of the comparison's; None: all
    process: Any = None

    def start(self, threads: int, log: IO[bytes]) -> None:
        """Start the process; returns when everything is loaded."""
        script = Path(__file__).parent / self.worker
        environment = os.environ | dict.fromkeys(THREADS, str(threads)) | {"HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [self.python, script, json.dumps(self.order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
        self._answer("ready")

    def turn(self, task: str) -> dict[str, Any]:
        """Do one round."""
        busy, own = cpu_seconds("/proc/stat"), cpu_seconds(f"/proc/{self.process.pid}/stat")
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()
        answer = self._answer("seconds") | {"task": task}
        busy, own = cpu_seconds("/proc/stat") - busy, cpu_seconds(f"/proc/{self.process.pid}/stat") - own
        answer["others"] = max(0.0, busy - own) / answer["seconds"]  # cores that other processes kept busy
        self.rounds.append(answer)
        self._answer("ready")
        return answer

    def end(self) -> None:
        """No more turns."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    @property
    def disturbed(self) -> int:
        """Rounds in which other processes kept the machine busy, too."""
        return sum(row["others"] >= DISTURBED for row in self.rounds)

    def _answer(self, key: str) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended (exit code {self.process.wait()}); see the log beside the results")
        answer: dict[str, Any] = json.loads(line)
        if key not in answer:
            raise SystemExit(f"{self.name}: expected {key!r}, got {line.strip()}")
        return answer

    def counted(self, task: str = "") -> list[dict[str, Any]]:
        """The rounds after the warm-up; without disturbed ones, where there are others."""
        found = [row for row in self.rounds if row["task"] == task][self.warm :]
        return [row for row in found if row["others"] < DISTURBED] or found


def cpu_seconds(file: str) -> float:
    """CPU seconds of the machine (`/proc/stat`) or of a process and its ended children; 0 where there is no /proc."""
    if not Path(file).exists():
        return 0.0
    text = Path(file).read_text("utf-8")
    if file == "/proc/stat":
        user, nice, system, _, _, *interrupts = text.splitlines()[0].split()[1:8]
        ticks = [user, nice, system, *interrupts[:2]]
    else:
        ticks = text.rpartition(")")[2].split()[11:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def parser(text: str, *, rounds: int) -> argparse.ArgumentParser:
    """What every comparison can be asked."""
    options = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, help="environments, model and results; kept (default: temporary)")
    options.add_argument("--model", type=Path, help="SmolLM2-135M-Instruct in float32, where it is there already")
    options.add_argument("--rounds", type=int, default=rounds, help="measured rounds")
    options.add_argument("--warm", type=int, default=1, help="rounds before them, which don't count")
    options.add_argument("--threads", type=int, default=2, help="threads of every side")
    options.add_argument("--only", default="", help="comma-separated sides to run, by their names' beginnings")
    options.add_argument(
        "--lock", type=Path, help="hold this file's lock (flock) in each round: machines shared by several"
    )
    return options


@contextmanager
def working_folder(given: Path | None) -> Iterator[Path]:
    """The given folder, or a temporary one."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        yield Path(name)


@contextmanager
def holding(lock: Path | None) -> Iterator[None]:
    """A round undisturbed by others who hold the same lock."""
    if lock is None:
        yield
        return
    with open(lock, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def alternate(
    sides: Sequence[Side], options: argparse.Namespace, folder: Path, name: str, tasks: Sequence[str] = ("",)
) -> list[Side]:
    """A B A B ...: in every round, each side does each task, in turn."""
    if options.only:
        sides = [side for side in sides if side.name.startswith(tuple(options.only.split(",")))]
    with open(folder / f"{name}.log", "wb") as log:
        for side in sides:
            side.warm = min(side.warm, options.warm)
            with holding(options.lock):
                side.start(options.threads, log)
        for number in range(options.rounds + max(side.warm for side in sides)):
            for task in tasks:
                with holding(options.lock):
                    for side in sides:
                        if number < side.limit and (side.tasks is None or task in side.tasks):
                            answer = side.turn(task)
                            told = {
                                key: round(answer[key], 3)
                                for key in ("seconds", "score", "tokens", "others")
                                if key in answer
                            }
                            print(f"round {number} {task}: {side.name}: {told}", file=sys.stderr, flush=True)
        for side in sides:
            side.end()
    return list(sides)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def said(values: Sequence[float], digits: int = 2) -> str:
    """Median and range in a table's cell."""
    found = spread(values)
    return f"{found['median']:.{digits}f} ({found['least']:.{digits}f} to {found['most']:.{digits}f})"


def phases(side: Side, task: str = "") -> str:
    """Median seconds of each phase."""
    names = dict.fromkeys(name for row in side.counted(task) for name in row["phases"])
    return ", ".join(
        f"{name} {statistics.median(row['phases'].get(name, 0.0) for row in side.counted(task)):.2f}" for name in names
    )


def report(
    title: str, sides: Sequence[Side], table: Sequence[Sequence[str]], folder: Path, name: str, **more: Any
) -> None:
    """Print the table and keep it, with everything that was measured, as `name.json` and `name.md`."""
    found = machine()
    by_side = {side.name: versions(side.python) for side in sides}
    lines = [
        f"## {title}",
        "",
        f"{found['cores']} cores, {found['cpu']}, {found['memory_gib']} GiB, Python {found['python']}.",
    ]
    lines += [
        f"- {name}: " + ", ".join(f"{key} {value}" for key, value in own.items()) for name, own in by_side.items()
    ]
    lines += ["", *markdown(table), ""]
    lines += [f"- {side.name} lacks: {side.lacks}" for side in sides if side.lacks]
    lines += [
        f"- {side.name}: {count} rounds disturbed by other processes" for side in sides if (count := side.disturbed)
    ]
    text = "\n".join(lines).rstrip() + "\n"
    document: Mapping[str, Any] = {
        "title": title,
        "machine": found,
        "versions": by_side,
        "rounds": {side.name: side.rounds for side in sides},
        **more,
    }
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    (folder / f"{name}.md").write_text(text, "utf-8")
    print(text)


def markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows, of which the first is the head."""
    rows = ["| " + " | ".join(row) + " |" for row in table]
    return [rows[0], "|" + "---|" * len(table[0]), *rows[1:]]
