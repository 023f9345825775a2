"""A run's folder: its lock, its resolved configuration, its record of what it was made from, its logs."""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from mlx_ppo.config import Job
from mlx_ppo.config_file import nearest, read_config
from mlx_ppo.config_supervised import JOBS
from mlx_ppo.errors import ConfigError, RunError

J = TypeVar("J", bound=Job)

CONFIG, RECORD, METRICS, SAMPLES, LOCK = "config.toml", "run.json", "metrics.jsonl", "samples.jsonl", "lock"
MEMORY = "memory.jsonl"
_ENDING_SECONDS = 60.0


class Run:
    """An open run folder, locked for this process. Use it as a context manager."""

    def __init__(self, folder: Path, *, supervisor: int | None = None) -> None:
        """Lock the folder.

        Args:
            folder: the run's.
            supervisor: the process that a user knows, where this one works for another.
        Raises:
            RunError: another process works in it (named), or it cannot be written.
        """
        self.folder = folder
        try:
            self._lock = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  held until __exit__
        except OSError as error:
            raise RunError(f"{folder}: cannot be written ({error.strerror})") from None
        holder = self._taken()
        if holder is not None:
            self._lock.close()
            raise RunError(f"{folder}: another process (pid {holder}) is working in this run")
        self._lock.truncate(0)
        self._lock.write("".join(f"{pid}\n" for pid in (supervisor, os.getpid()) if pid is not None))
        self._lock.flush()

    def _taken(self) -> str | None:
        """Take the lock, or say who has it; a process whose supervisor was killed gets time to save and end."""
        deadline = time.monotonic() + _ENDING_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
            except OSError:
                self._lock.seek(0)
                holders = self._lock.read().split()
            alive = [pid for pid in holders if _alive(pid)]
            if len(holders) < 2 or holders[0] in alive or time.monotonic() > deadline:
                return next(iter(alive or holders), "unknown")
            time.sleep(0.1)

    def __enter__(self) -> "Run":
        """The run itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lock back."""
        self._lock.truncate(0)
        self._lock.close()

    def record(self) -> dict[str, Any]:
        """What `run.json` says."""
        return _read_json(self.folder / RECORD)

    def log(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to one of the JSONL logs.

        Raises:
            RunError: the disk is full, or the file cannot be written.
        """
        try:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise RunError(f"{self.folder / name}: cannot be written ({error.strerror})") from None

    def has(self, name: str, **values: Any) -> bool:
        """Whether one of the logs has a row with these values."""
        path = self.folder / name
        rows = map(json.loads, path.read_text("utf-8").split("\n")[:-1]) if path.exists() else []
        return any(all(row.get(key) == value for key, value in values.items()) for row in rows)

    def cut_logs(self, step: int) -> None:
        """Remove what was logged after the checkpoint of a step, and a line that a kill left unfinished."""
        for name in (METRICS, SAMPLES, MEMORY):
            path = self.folder / name
            if not path.exists():
                continue
            # Bytes, and "\n" only: a kill may cut a character, and a completion may hold U+2028 or another line end.
            *lines, _ = path.read_bytes().split(b"\n")
            replace_file(path, "".join(f"{line.decode()}\n" for line in lines if _logged_step(line) <= step))


def _logged_step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def create_run(config: Job, base: Path, name: str) -> Path:
    """Make a private folder `base/name` (or `name-2`, ...) with the resolved configuration and the record.

    Raises:
        RunError: the place cannot be written; found before any model is loaded.
    """
    folder: Path | None = None
    try:
        text = to_toml(config).encode()
        base.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            candidate = base / (name if number == 1 else f"{name}-{number}")
            try:
                candidate.mkdir(mode=0o700)
                break
            except FileExistsError:
                number += 1
        folder = candidate
        (folder / CONFIG).write_bytes(text)
        record = {
            "format": 1,
            "command": config.command,
            "versions": {name: version(name) for name in ("mlx-ppo", "mlx", "mlx-lm", "numpy")},
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "config": hashlib.sha256(text).hexdigest(),
            "inputs": _hashes(config),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    except (OSError, UnicodeEncodeError) as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise RunError(f"{base}: a run folder cannot be written here ({error})") from None
    return folder


def open_config(folder: Path) -> Job:
    """The configuration that a run was started with.

    Raises:
        ConfigError: the folder isn't a run.
    """
    if not (folder / RECORD).is_file() or not (folder / CONFIG).is_file():
        parent = folder.parent
        names = [item.name for item in parent.iterdir() if (item / RECORD).is_file()] if parent.is_dir() else []
        near = nearest(folder.name, names)
        raise ConfigError(f"{folder}: not a run folder" + (f". Did you mean '{parent / near}'?" if near else ""))
    command = str(_read_json(folder / RECORD).get("command"))
    if command not in JOBS:
        raise ConfigError(f"{folder / RECORD}: unknown command {command!r}")
    return read_config(JOBS[command], folder / CONFIG)


def config_edited(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether the run's configuration is no longer what it was started with."""
    return bool(sha256(folder / CONFIG) != record.get("config"))


def changed_inputs(config: Job, record: Mapping[str, Any]) -> list[str]:
    """Input files whose content is no longer what the run recorded."""
    now = _hashes(config)
    before = record.get("inputs", {})
    return [name for name in before if now.get(name) != before[name]]


def _hashes(config: Job) -> dict[str, str]:
    """SHA-256 of every file that an input path of the configuration names, and of those right inside a folder."""
    found: dict[str, str] = {}
    for path in _input_paths(config.model_dump(exclude={"run"})):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and str(file) not in found:
                found[str(file)] = sha256(file)
    return found


def _input_paths(value: Any) -> Iterable[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, dict):
        if isinstance(value.get("function"), str):
            yield Path(value["function"].rpartition(":")[0])
        for item in value.values():
            yield from _input_paths(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _input_paths(item)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_toml(config: Job) -> str:
    """A configuration as TOML, every default written out."""
    blocks: list[str] = []
    for name, value in config.model_dump().items():
        rows = value if isinstance(value, list | tuple) else [value]
        header = f"[[{name}]]" if isinstance(value, list | tuple) else f"[{name}]"
        for row in rows:
            lines = [f"{key} = {_toml_value(item)}" for key, item in row.items() if item is not None]
            blocks.append("\n".join([header, *lines]))
    return "\n\n".join(blocks) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, int | float):
        return repr(value)
    # JSON's escapes are TOML's, but for DEL and for the surrogate pairs that ensure_ascii would write
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def replace_file(path: Path, text: str) -> None:
    """Replace a file's content in one step; a kill leaves the old or the new content.

    Raises:
        RunError: the disk is full, or the file cannot be written; the old content stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({error.strerror})") from None


def _alive(pid: str) -> bool:
    """Whether there is such a process, or may be."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        pass
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: cannot be read (not a JSON object)")
    return content
