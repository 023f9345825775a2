"""What a run was made from: software, device, and the SHA-256 of its configuration and of every input file."""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

import tomli

from mlx_ppo.config.sections import Job
from mlx_ppo.config.supervised import JOBS
from mlx_ppo.errors import RunError
from mlx_ppo.runtime.system import facts

Record = Mapping[str, Any]


class Moved(NamedTuple):
    """The folder that holds a run's folder: when the run was started, and now."""

    then: Path
    now: Path

    @classmethod
    def of(cls, config: Job, folder: Path) -> Self:
        """From a run's configuration and its folder."""
        assert isinstance(config, tuple(JOBS.values()))
        return cls(config.run.folder, Path(os.path.realpath(folder)).parent)

    def place(self, path: Path) -> Path:
        """Where an input is: where it was or, if it is there no more, at the same place as seen from the run."""
        if path.exists() or self.then == self.now:
            return path
        moved = Path(os.path.normpath(self.now / os.path.relpath(path, self.then)))
        return moved if moved.exists() else path

    def config(self, config: Job) -> Job:
        """The configuration with its inputs where they are."""
        if self.then == self.now:
            return config
        kept = {"run": config.model_dump()["run"]}
        return type(config).model_validate({**self._placed(config.model_dump(exclude={"run"})), **kept})

    def _placed(self, value: Any) -> Any:
        if isinstance(value, Path):
            return self.place(value)
        if isinstance(value, dict):
            placed = {key: self._placed(item) for key, item in value.items()}
            if isinstance(value.get("function"), str):
                file, colon, name = value["function"].rpartition(":")
                placed["function"] = f"{self.place(Path(file))}{colon}{name}"
            return placed
        return [self._placed(item) for item in value] if isinstance(value, list | tuple) else value


class Change(NamedTuple):
    """An input file that isn't what the record says."""

    file: str
    what: str  # "changed", "missing", "added" or "left out", since the run was started


def describe(config: Job, text: str) -> dict[str, Any]:
    """The record of a run that starts now; what `run.json` holds but for the device.

    Args:
        config: its configuration.
        text: the configuration as TOML, every default written out.
    Raises:
        RunError: an input cannot be read.
    """
    return {
        "format": 1,
        "command": config.command,
        **software(),
        "surroundings": surroundings(),
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "configuration": text,
        "inputs": {name: digest for found in hashes(input_paths(config)).values() for name, digest in found.items()},
    }


def software() -> dict[str, Any]:
    """Software and system of this process."""
    return {
        "versions": {name: version(name) for name in ("mlx-ppo", "mlx", "mlx-lm", "numpy")},
        **facts(),
    }


def surroundings() -> dict[str, str]:
    """What of this process's surroundings reaches a run: threads the sums of products, the rest reward functions."""
    return {
        "threads": os.environ.get("OPENBLAS_NUM_THREADS") or str(os.cpu_count()),
        "working folder": os.getcwd(),
        "locale": os.environ.get("LC_ALL") or os.environ.get("LANG") or "C",
        "timezone": " ".join(time.tzname),
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }


def device() -> str:
    """What computes here; asking loads mlx, so it is noted by the process that computes."""
    from mlx_ppo.compute.device import kind, name

    return f"{kind()}: {name()}"


def engine() -> str:
    """Which engine computes here, and why."""
    from mlx_ppo.compute.choose import chosen_engine

    chosen = chosen_engine()
    return f"{chosen.name}: {chosen.why}"


def differences(record: Record) -> list[str]:
    """What computes now that isn't what the run was started with, such as "mlx 0.32.4 -> 0.32.5"."""
    now = {**software(), "device": device(), "engine": engine()}
    pairs = [(name, record.get("versions", {}).get(name), found) for name, found in now["versions"].items()]
    pairs += [(name, record.get(name), now[name]) for name in ("python", "machine", "device", "engine")]
    has_functions = any(name.endswith(".py") for name in record.get("inputs", {}))
    earlier = record.get("surroundings", {})
    pairs += [(name, earlier.get(name), v) for name, v in surroundings().items() if name == "threads" or has_functions]
    return [f"{name} {before} -> {found}" for name, before, found in pairs if before is not None and before != found]


def config_changes(record: Record, text: str) -> list[str]:
    """The keys of `config.toml` that are no longer what the run was started with: "-" its values, "+" those of now.

    Comments, order and spelling don't count; a removed key takes its default and is shown.

    Raises:
        RunError: the record has no configuration to compare with.
    """
    try:
        before, now = (_rows(tomli.loads(each)) for each in (record["configuration"], text))
    except (KeyError, TypeError, ValueError):
        raise RunError("run.json: the configuration that the run was started with is missing or damaged") from None
    lines = []
    for key in dict.fromkeys((*before, *now)):
        if before.get(key) != now.get(key):
            lines += [f"{sign} {key} = {rows[key]}" for sign, rows in (("-", before), ("+", now)) if key in rows]
    return lines


def _rows(value: Any, key: str = "") -> dict[str, str]:
    """Values by dotted key, as `--set` takes them."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {key: repr(value)}
    rows: dict[str, str] = {}
    for part, item in items:
        rows |= _rows(item, f"{key}.{part}" if key else str(part))
    return rows


def input_changes(record: Record, found: Mapping[Path, Mapping[str, str]]) -> list[Change]:
    """Input files that are no longer as recorded; one of the same name and content at another place is.

    Args:
        record: from `run.json`.
        found: `hashes` of what the configuration names now.
    """
    before: Mapping[str, str] = record.get("inputs", {})
    now = {name: digest for files in found.values() for name, digest in files.items()}
    known, there = ({(Path(name).name, digest) for name, digest in files.items()} for files in (before, now))
    changes = []
    for name, digest in before.items():
        if name not in now:
            if (Path(name).name, digest) in there:
                continue
            changes.append(Change(name, "left out" if Path(name).is_file() else "missing"))
        elif now[name] != digest:
            changes.append(Change(name, "changed"))
    for path, files in found.items():
        new = [name for name, digest in files.items() if name not in before and (Path(name).name, digest) not in known]
        if len(new) < len(files) and path.is_dir():  # otherwise a changed configuration names it first
            changes += [Change(name, "added") for name in new]
    return changes


def reward_file_changes(record: Record, moved: Moved) -> list[Change]:
    """Files that reward functions read, beside their own, and that are no longer what they were then."""
    changes = []
    for name, digest in record.get("reward_files", {}).items():
        try:
            if sha256(moved.place(Path(name))) != digest:
                changes.append(Change(name, "changed"))
        except OSError:
            changes.append(Change(name, "missing"))
    return changes


def input_paths(config: Job) -> list[Path]:
    """Every file and folder that a configuration reads: models, adapters, data, reward models, reward code."""
    return list(dict.fromkeys(_paths(config.model_dump(exclude={"run", "parallel"}))))


def identity(config: Job, known: Mapping[str, str]) -> dict[str, Any]:
    """Every key of a configuration but where runs are kept and who shares them; instead of a path what is there.

    Args:
        config: whose.
        known: SHA-256 of files that needn't be read again.
    Raises:
        RunError: an input cannot be read.
    """
    found: dict[str, Any] = {}
    read = dict(known)

    def add(key: str, value: Any) -> None:
        if isinstance(value, Path):
            there = hashes([value], read)
            for files in there.values():
                read.update(files)
            found[key] = sorted(there.get(value, {}).values())
        elif isinstance(value, dict):
            for name, item in value.items():
                add(f"{key}.{name}" if key else name, item)
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                add(f"{key}.{number}", item)
        else:
            found[key] = value

    add("", config.model_dump(exclude={"parallel": True, "memory": True, "run": {"folder", "name"}}))
    versions: dict[str, Any] = software()["versions"]
    return {key: value for key, value in found.items() if not key.endswith(".function")} | versions


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, dict):
        if isinstance(value.get("function"), str):
            yield Path(value["function"].rpartition(":")[0])
        for item in value.values():
            yield from _paths(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths(item)


def hashes(paths: Iterable[Path], read: Mapping[str, str] | None = None) -> dict[Path, dict[str, str]]:
    """SHA-256 of each path that is a file, and of the files right inside each that is a folder (not hidden ones).

    Args:
        paths: of files and folders.
        read: what is known of some files, by name.
    Raises:
        RunError: a file cannot be read.
    """
    known = dict(read or {})
    found: dict[Path, dict[str, str]] = {}
    for path in paths:
        try:
            inside = path.is_dir()
            files = [file for file in sorted(path.iterdir()) if file.name[0] != "."] if inside else [path]
            for name in [str(file) for file in files if file.is_file()]:
                known[name] = known.get(name) or sha256(Path(name))
                found.setdefault(path, {})[name] = known[name]
        except OSError as error:
            raise RunError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    return found


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
