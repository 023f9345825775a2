"""What a run was made from: software, device, and the SHA-256 of its configuration and of every input file."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import tomli

from mlx_ppo.config.sections import Job
from mlx_ppo.errors import RunError
from mlx_ppo.runtime.system import facts

Record = Mapping[str, Any]


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
    """Input files that are no longer as recorded.

    Args:
        record: from `run.json`.
        found: `hashes` of what the configuration names now.
    """
    before: Mapping[str, str] = record.get("inputs", {})
    now = {name: digest for files in found.values() for name, digest in files.items()}
    changes = []
    for name, digest in before.items():
        if name not in now:
            changes.append(Change(name, "left out" if Path(name).is_file() else "missing"))
        elif now[name] != digest:
            changes.append(Change(name, "changed"))
    for path, files in found.items():
        if before.keys() & files.keys() and path.is_dir():  # otherwise a changed configuration names it first
            changes += [Change(name, "added") for name in files if name not in before]
    return changes


def reward_file_changes(record: Record) -> list[Change]:
    """Files that reward functions read, beside their own, and that are no longer what they were then."""
    changes = []
    for name, digest in record.get("reward_files", {}).items():
        try:
            if sha256(Path(name)) != digest:
                changes.append(Change(name, "changed"))
        except OSError:
            changes.append(Change(name, "missing"))
    return changes


def input_paths(config: Job) -> list[Path]:
    """Every file and folder that a configuration reads: models, adapters, data, reward models, reward code."""
    return list(dict.fromkeys(_paths(config.model_dump(exclude={"run"}))))


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


def hashes(paths: Iterable[Path]) -> dict[Path, dict[str, str]]:
    """SHA-256 of each path that is a file, and of the files right inside each that is a folder (not hidden ones).

    Raises:
        RunError: a file cannot be read.
    """
    known: dict[str, str] = {}
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
