"""A run's folder as a page shows it: figures, health, plan, texts. Reads runs that are still going, and older ones."""

import os
import secrets
import time
import tomllib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.errors import ConfigError, UserError, printable
from mlx_ppo.files import read_json, read_regular
from mlx_ppo.runs.folder import CONFIG, HEALTH, LOCK, MEMORY, METRICS, RECORD, open_config, read_record
from mlx_ppo.runs.health import Monitor, collapsed, facts_of
from mlx_ppo.runs.health_rules import LONG, Facts
from mlx_ppo.runs.metrics import by_present_names
from mlx_ppo.runs.plan_file import PLAN
from mlx_ppo.studio.figures import PLANNED, SHARE, Column, figures, frontier, frontier_point, rounded, thinned
from mlx_ppo.studio.frontier import kept
from mlx_ppo.studio.logs import Log, Samples, rows_of
from mlx_ppo.studio.texts import LONGEST, answers, completions, shown, spread

BUCKETS = 300  # points of a line: twice as many
MOST_NEW = 300  # rows that are sent to a page that has the others
TEXTS = 400  # steps whose completions a page may have with it
_GIB = 1 << 30
_LARGEST = 1 << 24  # bytes of config.toml, plan.json, lock
_KEPT = 200  # findings of the health rules that are shown
_FINDING = {"rule": 60, "sentence": 300, "key": 60, "level": 60}  # characters of its texts, at most
_LONGEST_NAME = 100  # characters of a column's name
_TOTALS = {
    "train": ("run", "iterations"), "sft": ("sft", "epochs"), "reward": ("reward_training", "epochs"),
    "dpo": ("dpo", "epochs"),
}  # fmt: skip


class RunReader:
    """Follows a run's logs. Every `update` reads what is new; `document` is what a page needs to draw all of it."""

    def __init__(self, folder: Path) -> None:
        """Begin with a run's folder.

        Raises:
            ConfigError: the folder isn't a run.
            RunError: its record can't be read.
        """
        if not (folder / RECORD).is_file():
            open_config(folder)  # says what is missing, and what may have been meant
        self.folder = folder
        self.record = read_record(folder)
        self.command = shown(self.record.get("command"), _LONGEST_NAME)
        self.x: list[float] = []
        self.columns: dict[str, Column] = {}
        self.times: list[float] = []
        self.health: list[dict[str, Any]] = []
        self.samples = Samples(folder)
        self.planned = _planned(folder)
        self._facts: Facts | None = None
        self._begin()

    def _begin(self) -> None:
        self.generation = secrets.token_hex(4)  # changes where what was read doesn't hold any more
        self._logs = {name: Log(self.folder / name) for name in (METRICS, MEMORY, HEALTH)}
        self._memory: dict[float, Mapping[str, Any]] = {}
        self.x.clear()
        self.times.clear()
        self.columns.clear()
        self.health.clear()

    @property
    def place(self) -> str:
        """How far the logs were read; what `since` takes."""
        return ".".join(map(str, (self.generation, len(self.x), len(self.health), *self.samples.counts)))

    def since(self, place: str) -> dict[str, Any] | None:
        """What has come since an earlier `place`; None where only all of it, anew, tells what is there now.

        Rows have their place on the axis, their values, and their point of the frontier.
        """
        generation, *counts = place.split(".")
        if (
            generation != self.generation
            or len(counts) != 4
            or not all(len(count) < 16 and count.isdecimal() for count in counts)
        ):
            return None
        rows, health, iterations, evaluations = map(int, counts)
        if len(self.x) - rows > MOST_NEW:
            return None
        return {
            **self.state(),
            "rows": self.rows(rows),
            "health": self.health[health:],
            "collapsed": self.has_collapsed(),
            "iterations": self.samples.iterations[iterations:],
            "answers": answers(self.samples) if self.samples.counts[1] != evaluations else None,
        }

    def update(self) -> None:
        """Read what has come; all anew where the logs were cut."""
        new = {name: log.read() for name, log in self._logs.items()}
        cut = self.samples.update()
        if cut or any(part.cut for part in new.values()):
            self._begin()
            new = {name: log.read() for name, log in self._logs.items()}
        if not self.planned:
            self.planned = _planned(self.folder)
        self._memory |= {row["step"]: row for row in rows_of(new[MEMORY].content)}
        for row in map(by_present_names, rows_of(new[METRICS].content)):
            self._append(row)
        for row in rows_of(new[HEALTH].content):
            texts = {key: shown(row.get(key, ""), most) for key, most in _FINDING.items()}
            self.health.append({"step": row["step"], **texts})

    def _append(self, row: Mapping[str, Any]) -> None:
        supervised = self.command != "train"
        self.x.append(float(row["epoch"] if supervised and _number(row.get("epoch")) is not None else row["step"]))
        if (at := _number(row.get("time"))) is not None:
            self.times.append(at)
        values = {_name(key): _number(value) for key, value in row.items() if key not in ("step", "epoch", "time")}
        for phase, peak in self._memory.pop(row["step"], {}).items():
            planned, number = self.planned.get(phase), _number(peak)
            if planned and number is not None:
                values[f"{SHARE}{phase}"] = number / planned
        if self.planned and "memory" in values:
            values[PLANNED] = max(self.planned.values()) / _GIB
        for key, value in values.items():
            if value is not None and key not in self.columns:
                self.columns[key] = [None] * (len(self.x) - 1)
        for key, column in self.columns.items():
            column.append(values.get(key))

    def rows(self, start: int) -> list[dict[str, Any]]:
        """Rows from one on."""
        found = []
        for row in range(start, len(self.x)):
            values = {key: rounded(column[row]) for key, column in self.columns.items()}
            point = frontier_point(values.get("kl"), values.get("score"), self.x[row])
            found.append({"x": self.x[row], "values": values, "frontier": point})
        return found

    def state(self) -> dict[str, Any]:
        """Where the run is: `state` is running, finished, stopped or waiting; the others may be None."""
        done, total = self.x[-1] if self.x else 0, _total(self.folder, self.command)
        if _is_alive(self.folder):
            state = "running"
        elif total is not None and done >= total:
            state = "finished"
        else:
            state = "stopped" if self.x else "empty"
        return {
            "state": state,
            "done": done,
            "total": total,
            "started": self.times[0] if self.times else None,
            "last": self.times[-1] if self.times else None,
        }

    def has_collapsed(self) -> bool:
        """Whether the health rules together say so of the newest rows, as above the closing table of `train`."""
        if not self.health:
            return False
        if self._facts is None:
            try:
                config = open_config(self.folder)
            except UserError:  # another version's
                return False
            assert isinstance(config, TrainConfig), "only train has health rules"
            self._facts = facts_of(config, ())
        monitor, end = Monitor(self._facts), len(self.x)
        first = min(self._facts.warmup + 1, end)
        for row in (*range(first), *range(max(first, end - 2 * LONG), end)):
            known = {key: column[row] for key, column in self.columns.items()}
            monitor.follow({"step": self.x[row], **{key: value for key, value in known.items() if value is not None}})
        return collapsed(monitor.current)

    def document(self, *, buckets: int = BUCKETS, texts: int = 0, longest: int = LONGEST) -> dict[str, Any]:
        """All that a page draws of the run, as JSON has it.

        Args:
            buckets: points of a line are twice as many, see `thinned`.
            texts: iterations whose completions come with it.
            longest: characters of a completion or a prompt, which says it where it is cut.
        """
        every, x, columns = thinned(self.columns, self.x, buckets)
        empty: Column = [None] * len(self.x)
        kl, score = self.columns.get("kl", empty), self.columns.get("score", empty)
        steps = self.samples.iterations
        return {
            "name": printable(Path(os.path.realpath(self.folder)).name),
            "command": self.command,
            "version": shown(self.record.get("versions", {}).get("mlx-ppo", "unknown"), _LONGEST_NAME),
            "rules": self._has_rules(),
            **self.state(),
            "count": len(self.x),
            "every": every,
            "x": x,
            "columns": columns,
            "frontier": frontier(kl, score, self.x, 2 * buckets),
            "optimum": kept(self.folder),
            "health": self.health[-_KEPT:],
            "collapsed": self.has_collapsed(),
            "answers": answers(self.samples, longest=longest),
            "iterations": steps if not texts else spread(steps, texts),
            "iterations_logged": len(steps),
            "completions": {str(step): completions(self.samples, step, longest) for step in spread(steps, texts)},
        }

    def _has_rules(self) -> bool:
        return "health" in _settings(self.folder)


def page_document(
    readers: Sequence[RunReader], *, buckets: int = BUCKETS, texts: int = 0, longest: int = LONGEST
) -> dict[str, Any]:
    """What the panels of one or several runs draw.

    Args:
        readers: the runs, up to date.
        buckets: for each run, see `RunReader.document`.
        texts: for each run.
        longest: characters of a completion or a prompt.
    Raises:
        ConfigError: runs of `train` are mixed with others.
    """
    supervised = {reader.command != "train" for reader in readers}
    if len(supervised) > 1:
        raise ConfigError("runs of train and of sft, reward or dpo have no figure in common; name those of one kind")
    runs = [reader.document(buckets=buckets, texts=texts, longest=longest) for reader in readers]
    present = {key for reader in readers for key in reader.columns}
    for run, name in zip(runs, names([reader.folder for reader in readers]), strict=True):
        run["name"] = name
    return {
        "made": time.time(),
        "supervised": supervised == {True},
        "runs": runs,
        "figures": figures(present, supervised=supervised == {True}),
    }


def names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, with as much of their paths as tells them apart."""
    paths = [Path(os.path.realpath(folder)) for folder in folders]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [printable(name) for name in names]


@lru_cache(1 << 12)
def _name(column: str) -> str:
    """A column's name, which may be that of somebody's folder."""
    return shown(column, _LONGEST_NAME)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None


def _settings(folder: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_regular(folder / CONFIG, _LARGEST).decode())
    except (OSError, ValueError, RecursionError):
        return {}


def _total(folder: Path, command: str) -> float | None:
    section, key = _TOTALS.get(command, ("", ""))
    found = _settings(folder).get(section, {})
    if not isinstance(found, dict):
        return None
    total, members = _number(found.get(key)), _number(found.get("members", 1))
    return total * members if total is not None and members is not None else None


def _planned(folder: Path) -> dict[str, float]:
    """Bytes that the plan expects of mlx in each phase; empty where there is no plan."""
    try:
        phases = read_json(folder / PLAN)["phases"]
        return {str(name): float(phase["mlx_bytes"]) for name, phase in phases.items() if phase["mlx_bytes"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_alive(folder: Path) -> bool:
    """Whether a process works in the run. The lock itself isn't touched: who tries it keeps a run from starting."""
    try:
        holders = read_regular(folder / LOCK, _LARGEST).split()
    except OSError:
        return False
    for holder in holders:
        try:
            os.kill(int(holder), 0)
        except (ValueError, OverflowError, ProcessLookupError):
            continue
        except OSError:
            pass
        return True
    return False
