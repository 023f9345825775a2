"""Is a run what its record says? Before it is resumed, and whenever somebody asks."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ppo.config.sections import Job, TrainConfig
from mlx_ppo.errors import ConfigError, RunError
from mlx_ppo.rewards.judge_answers import ANSWERS, rows
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.folder import (
    CONFIG,
    HEALTH,
    LOGS,
    MEMORY,
    METRICS,
    RECORD,
    RESPONSES,
    RESULTS,
    SAMPLES,
    Run,
    log_row,
    open_config,
    own_digest,
    read_record,
    undisturbed,
)
from mlx_ppo.runs.plan_file import PLAN, read_plan
from mlx_ppo.runs.provenance import (
    Change,
    Moved,
    Record,
    config_changes,
    differences,
    hashes,
    input_changes,
    input_paths,
    reward_file_changes,
    sha256,
)

_ALLOW = "restore it, or give --allow-config-change"
_NOTHING_ALLOWS = {"added": "remove it, or start a new run", "left out": "name it again, or start a new run"}


@dataclass(frozen=True)
class Findings:
    """What `verify` found."""

    files: int  # that were compared
    problems: tuple[str, ...]  # a line for each file that isn't as recorded
    notes: tuple[str, ...]  # what an interruption left; the next resume deals with it


def require_as_recorded(config: Job, run: Run, *, allow_config_change: bool) -> list[str]:
    """Refuse to go on with a run whose last checkpoint, configuration or inputs aren't what they were.

    Changes that are allowed go into the record. Nothing is loaded.

    Returns:
        What a person should know: allowed changes, and other software or another device than at the start.
    Raises:
        RunError: something differs; a changed configuration is shown key by key.
    """
    checkpoint.settle(run.folder)
    checkpoint.require_sound(run.folder)
    record, path = run.record(), run.folder / CONFIG
    content = path.read_bytes()
    text, digest = content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest()
    same = digest == record.get("config")
    lines = [] if same else config_changes(record, text)
    if lines and not allow_config_change:
        raise RunError("\n".join([f"{path}: changed since the run was started; {_ALLOW}", *lines]))
    found = hashes(input_paths(config))
    code = []
    for change in input_changes(record, found):
        since = f"{change.file}: {change.what} since the run was started"
        if not (_is_code(change) and allow_config_change):
            mend = _ALLOW if _is_code(change) else _NOTHING_ALLOWS.get(change.what, "restore it, or start a new run")
            raise RunError(f"{since}; {mend}")
        code.append(since)
    files = {change.file: change for change in reward_file_changes(record, Moved.of(config, run.folder))}
    for change in files.values():
        since = f"{change.file} (read by a reward function): {change.what} since the run was started"
        if not allow_config_change:
            raise RunError(f"{since}; {_ALLOW}")
        code.append(since)
    if code or not same:
        event = {"after_step": max(checkpoint.steps(run.folder), default=0), "configuration": lines, "code": code}
        run.note(
            config=digest,
            configuration=text,
            inputs={name: digest for files in found.values() for name, digest in files.items()},
            reward_files={n: d for n, d in record.get("reward_files", {}).items() if n not in files},
            changes=[*record.get("changes", []), *([event] if code or lines else [])],
        )
    said = [f"warning: {path} has changed since the run was started", *lines] if lines else []
    for file in _gone(run.folder, config):
        lost = (
            "a new plan is made, and results may differ in the last digits"
            if file.name == PLAN
            else "its rows are lost"
        )
        said.append(f"warning: {file}: missing; {lost}")
    said += [f"warning: {line}" for line in code]
    return said + [f"warning: {line} since the run was started; results may differ" for line in differences(record)]


def _is_code(change: Change) -> bool:
    return change.file.endswith(".py") and change.what in ("changed", "left out")


def verify_run(folder: Path) -> Findings:
    """Compare a run's folder and inputs with its record.

    Raises:
        ConfigError: it isn't a run's folder.
        RunError: a process is working in it, or `run.json` can't be read.
    """
    if not (folder / RECORD).is_file():
        open_config(folder)  # says what is wrong
    with undisturbed(folder):
        inquiry = _Inquiry(folder, read_record(folder))
        for line in (
            *inquiry.record_itself(),
            *inquiry.inputs(),
            *inquiry.checkpoints(),
            *inquiry.own_files(),
            *inquiry.gone(),
        ):
            inquiry.problems.append(line)
        for name in LOGS:
            inquiry.problems += inquiry.log(name)
    return Findings(inquiry.files, tuple(inquiry.problems), tuple(inquiry.notes))


class _Inquiry:
    """One run that is looked through."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder = folder
        self.record = record
        self.files = 0
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.config: Job | None = None

    def record_itself(self) -> Iterator[str]:
        """`run.json` by its own digest, `config.toml` by that in the record."""
        self.files += 2
        if self.record.get("record") != own_digest(self.record):
            yield f"{self.folder / RECORD}: damaged (its SHA-256 is not the recorded one)"
        with suppress(ConfigError, RunError):
            self.config = open_config(self.folder)
        path = self.folder / CONFIG
        try:
            content = path.read_bytes()
        except OSError as error:
            yield f"{path}: cannot be read ({error.strerror})"
            return
        if hashlib.sha256(content).hexdigest() != self.record.get("config"):
            yield f"{path}: changed{_keys(self.record, content)}"

    def inputs(self) -> Iterator[str]:
        """Models, data and reward code."""
        recorded = self.record.get("inputs")
        if not isinstance(recorded, dict):
            return
        self.files += len(recorded)
        paths = [Path(name) for name in recorded] if self.config is None else input_paths(self.config)
        try:
            for change in input_changes(self.record, hashes(paths)):
                yield f"{change.file}: {change.what} since the run was started"
        except RunError as error:
            yield str(error)
        self.files += len(self.record.get("reward_files", {}))
        where = Moved(self.folder, self.folder) if self.config is None else Moved.of(self.config, self.folder)
        for change in reward_file_changes(self.record, where):
            yield f"{change.file}: {change.what} since a reward function read it"

    def checkpoints(self) -> Iterator[str]:
        """Every checkpoint, and what lies beside them."""
        place = self.folder / "checkpoints"
        steps = checkpoint.steps(self.folder)
        known = {checkpoint.folder_of(self.folder, step) for step in steps}
        for item in sorted(place.iterdir()) if place.is_dir() else ():
            if item in known:
                self.files += sum(1 for _ in item.iterdir())
                yield from _one_checkpoint(self.folder, item)
            elif item.name.startswith(".") and item.suffix in (".new", ".old", ".gone"):
                self.notes.append(f"{item}: left by a save that was killed; the next resume deals with it")
            else:
                yield f"{item}: doesn't belong here"

    def own_files(self) -> Iterator[str]:
        """The plan, which changes while the run goes on; the finished folder."""
        try:
            self.files += read_plan(self.folder) is not None
        except RunError as error:
            yield str(error)
        answers = self.folder / ANSWERS
        if answers.exists():
            self.files += 1
            yield from (f"{answers}:{number}: damaged" for number, row in rows(answers) if row is None)
        recorded = self.record.get("files", {})
        self.files += len(recorded)
        for name, digest in recorded.items():
            file = self.folder / name
            if not file.is_file():
                yield f"{file}: missing"
            elif sha256(file) != digest:
                yield f"{file}: damaged (its SHA-256 is not the recorded one)"
        for result in (self.folder / name for name in RESULTS):
            inside = sorted(result.iterdir()) if result.is_dir() else []
            if inside and not any(Path(name).parts[0] == result.name for name in recorded):
                self.notes.append(f"{result}: written, but not recorded; the next resume writes it again")
                continue
            for file in inside:
                if str(file.relative_to(self.folder)) not in recorded and not file.name.startswith("."):
                    yield f"{file}: doesn't belong here"

    def gone(self) -> Iterator[str]:
        """Logs and plan that aren't there any more."""
        if self.config is not None:
            yield from (f"{file}: missing" for file in _gone(self.folder, self.config))

    def log(self, name: str) -> Iterator[str]:
        """One of the logs: complete rows in order, no row missing, none beyond what could be logged."""
        path = self.folder / name
        if not path.exists():
            return  # see `gone`
        self.files += 1
        *lines, rest = path.read_bytes().split(b"\n")
        if rest:
            self.notes.append(f"{path}: ends in half a row; the next resume cuts it")
        newest = max(checkpoint.steps(self.folder), default=0)
        most = newest + self.config.run.save_every if self.config is not None else None
        before = 0.0
        for number, line in enumerate(lines, start=1):
            row = log_row(line)
            problem = "not a row" if row is None else _misplaced(row, number, before, name)
            if not problem and row is not None and most is not None and row["step"] > most:
                problem = f"a row of step {row['step']}, but the last checkpoint is of step {newest}"
            if problem:
                yield f"{path}:{number}: {problem}"
                return
            before = row["step"] if row is not None else before
        if isinstance(self.config, TrainConfig) and name == METRICS and before < newest:
            yield f"{path}: ends at step {before:g}, but the last checkpoint is of step {newest}"


def _gone(folder: Path, config: Job) -> list[Path]:
    """Files that a run of `train` writes in its first iteration, and that aren't there after it."""
    if not isinstance(config, TrainConfig) or not max(checkpoint.steps(folder), default=0):
        return []
    return [folder / name for name in (METRICS, SAMPLES, MEMORY, RESPONSES, PLAN) if not (folder / name).exists()]


def _keys(record: Record, content: bytes) -> str:
    """The keys that a changed configuration changes, in brackets, where both can be read."""
    try:
        keys = dict.fromkeys(line.split()[1] for line in config_changes(record, content.decode("utf-8-sig")))
    except (RunError, UnicodeDecodeError):
        return ""
    return f" ({', '.join(keys)})" if keys else ""


def _one_checkpoint(run: Path, folder: Path) -> Iterator[str]:
    found = list(checkpoint.damage(folder))
    if not found:
        try:
            checkpoint.read_state(run, int(folder.name))
        except RunError as error:
            found = [str(error)]
    yield from found
    for item in checkpoint.strangers(folder):
        yield f"{item}: doesn't belong to the checkpoint"


def _misplaced(row: dict[str, Any], number: int, before: float, name: str) -> str:
    """Why a row can't be where it is; samples have several rows a step, health few, the others one a step or epoch."""
    if name in (SAMPLES, HEALTH):
        return "" if row["step"] >= before else f"step {row['step']} after step {before:g}"
    key = "epoch" if "epoch" in row else "step"
    return "" if row[key] == number else f"{key} {json.dumps(row[key])} where {number} belongs"
