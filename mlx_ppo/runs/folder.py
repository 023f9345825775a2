"""A run's folder: its lock, its resolved configuration, its record of what it was made from, its logs."""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mlx_ppo.config.file import nearest, read_config
from mlx_ppo.config.sections import Job
from mlx_ppo.config.supervised import JOBS
from mlx_ppo.errors import ConfigError, RunError
from mlx_ppo.files import parse_json, read_json
from mlx_ppo.runs.provenance import Moved, describe, hashes
from mlx_ppo.runs.toml import to_toml
from mlx_ppo.runtime.system import flush

CONFIG, RECORD, METRICS, SAMPLES, LOCK = "config.toml", "run.json", "metrics.jsonl", "samples.jsonl", "lock"
MEMORY, RESPONSES, HEALTH = "memory.jsonl", "responses.jsonl", "health.jsonl"
LOGS = (METRICS, SAMPLES, MEMORY, RESPONSES, HEALTH)
FRONTIER = "frontier.json"  # what the command of that name has found
RESULTS = ("adapters", "model", "reward")  # finished folders of `sft` and `reward`
_REPLACED = (RECORD, *LOGS, "plan.json", "report.json", *RESULTS)
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
        _hold(self._lock, fcntl.LOCK_EX, folder)
        with suppress(OSError):  # on a full disk nobody learns the process id; the lock holds all the same
            self._lock.truncate(0)
            self._lock.write("".join(f"{pid}\n" for pid in (supervisor, os.getpid()) if pid is not None))
            self._lock.flush()
        for name in _REPLACED:  # temporary ones of a process that was killed
            for left in folder.glob(f".{name}.[0-9]*"):
                remove(left)

    def __enter__(self) -> "Run":
        """The run itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lock back."""
        with suppress(OSError):
            self._lock.truncate(0)
        with suppress(OSError):
            self._lock.close()

    def record(self) -> dict[str, Any]:
        """What `run.json` says."""
        return read_record(self.folder)

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

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """The complete rows of one of the logs."""
        path = self.folder / name
        yield from map(json.loads, path.read_text("utf-8").split("\n")[:-1]) if path.exists() else ()

    def secure(self) -> None:
        """To be called before a checkpoint: what was logged is on the disk, so that no checkpoint is ahead of it.

        Raises:
            RunError: the disk fails, or the run's folder was removed or replaced while this process worked in it.
        """
        held = os.fstat(self._lock.fileno())
        try:
            there = os.stat(self.folder / LOCK)
        except OSError:
            there = None
        if there is None or (there.st_ino, there.st_dev) != (held.st_ino, held.st_dev):
            raise RunError(f"{self.folder}: was removed or replaced while this process worked in it; nothing is saved")
        try:
            for name in filter(lambda log: (self.folder / log).exists(), LOGS):
                sync(self.folder / name)
        except OSError as error:
            raise RunError(f"{self.folder / name}: cannot be written ({error.strerror})") from None

    def note(self, **facts: Any) -> None:
        """Put something into the record; RunError where it cannot be written."""
        before = self.record()
        if before != {**before, **facts}:
            replace_file(self.folder / RECORD, _record_text({**before, **facts}))

    def note_files(self, *paths: Path) -> None:
        """Record the SHA-256 of files of the run itself, or of those in a finished folder; earlier ones go."""
        found = {
            str(Path(name).relative_to(self.folder)): digest
            for files in hashes(paths).values()
            for name, digest in files.items()
        }
        before = self.record().get("files", {})
        old = {
            name: digest
            for name, digest in before.items()
            if not any((self.folder / name).is_relative_to(path) for path in paths)
        }
        self.note(files={**old, **found})

    def cut_logs(self, step: int) -> None:
        """Remove what was logged after the checkpoint of a step, and what a kill left unfinished.

        That is half a line, and an evaluation without the summary that is logged after its completions.
        """
        for name in LOGS:
            path = self.folder / name
            if not path.exists():
                continue
            # Bytes, and "\n" only: a kill may cut a character, and a completion may hold U+2028 or another line end.
            content = path.read_bytes()
            rows = [(log_row(line), line) for line in content.split(b"\n")[:-1]]
            whole = {row["step"] for row, _ in rows if row is not None and row.get("kind") == "summary"}
            kept = b"".join(
                line + b"\n"
                for row, line in rows
                if row is not None and row["step"] <= step and (row.get("kind") != "evaluation" or row["step"] in whole)
            )
            if kept != content:
                replace_file(path, kept.decode())


def log_row(line: bytes) -> dict[str, Any] | None:
    """A line of a log; None where it isn't one."""
    try:
        row = parse_json(line)
        return row if isinstance(row, dict) and row["step"] == float(row["step"]) < math.inf else None
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _hold(lock: IO[Any], kind: int, folder: Path) -> None:
    """Lock a run, or close the file and raise RunError with the id of the process that holds it.

    A process whose supervisor was killed gets time to save and end.
    """
    deadline = time.monotonic() + _ENDING_SECONDS
    while True:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return
        except OSError:
            lock.seek(0)
            holders = lock.read().split()
        alive = [pid for pid in holders if _alive(pid)]
        if len(holders) < 2 or holders[0] in alive or time.monotonic() > deadline:
            lock.close()
            holder = next(iter(alive or holders), "unknown")
            raise RunError(f"{folder}: another process (pid {holder}) is working in this run")
        time.sleep(0.1)


@contextmanager
def undisturbed(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a run while it is read; nothing is written.

    Raises:
        RunError: one is working in it.
    """
    try:
        lock = open(folder / LOCK, encoding="utf-8")  # noqa: SIM115  held while the caller reads
    except OSError:  # nobody ever worked in it
        yield
        return
    _hold(lock, fcntl.LOCK_SH, folder)
    with lock:
        yield


def create_run(config: Job, base: Path, name: str) -> Path:
    """Make a private folder `base/name` (or `name-2`, ...) with the resolved configuration and the record.

    Raises:
        RunError: the place cannot be written; found before any model is loaded.
    """
    temporary = base / f".{name}.{os.getpid()}"
    try:
        text = to_toml(config)
        base.mkdir(parents=True, exist_ok=True)
        for left in base.glob(f".{name}.[0-9]*"):
            if not _alive(left.suffix[1:]):
                remove(left)
        temporary.mkdir(mode=0o700)
        record = describe(config, text)
        for file, content in ((CONFIG, text), (RECORD, _record_text(record))):
            (temporary / file).write_bytes(content.encode())
            sync(temporary / file)
        sync(temporary)
        return _put_beside_others(temporary, base, name)
    except (OSError, UnicodeEncodeError) as error:
        raise RunError(f"{base}: a run folder cannot be written here ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_beside_others(temporary: Path, base: Path, name: str) -> Path:
    """Rename a complete folder to the first name that is free."""
    number = 1
    while True:
        folder = base / (name if number == 1 else f"{name}-{number}")
        number += 1
        if os.path.lexists(folder):
            continue
        try:
            os.rename(temporary, folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # another process was faster
                continue
            raise
        sync(base)
        return folder


def open_config(folder: Path) -> Job:
    """The configuration that a run was started with; inputs that moved with the run's folder are where they are now.

    Raises:
        ConfigError: the folder isn't a run.
    """
    if not (folder / RECORD).is_file() or not (folder / CONFIG).is_file():
        parent = folder.parent
        names = [item.name for item in parent.iterdir() if (item / RECORD).is_file()] if parent.is_dir() else []
        near = nearest(folder.name, names)
        raise ConfigError(f"{folder}: not a run folder" + (f". Did you mean '{parent / near}'?" if near else ""))
    command = str(read_record(folder).get("command"))
    if command not in JOBS:
        raise ConfigError(f"{folder / RECORD}: unknown command {command!r}")
    config = read_config(JOBS[command], folder / CONFIG)
    return Moved.of(config, folder).config(config)


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
            flush(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
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


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that is possible."""
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's entries, to the drive."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def read_record(folder: Path) -> dict[str, Any]:
    """What a run's `run.json` says; RunError where it cannot be read."""
    path = folder / RECORD
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: cannot be read (not a JSON object)")
    for key in ("inputs", "files", "versions", "reward_files", "surroundings"):
        if not isinstance(content.get(key, {}), dict):
            raise RunError(f"{path}: cannot be read ({key!r} is not a JSON object)")
    return content


def own_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a record but this entry itself."""
    rest = {name: value for name, value in record.items() if name != "record"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _record_text(record: Mapping[str, Any]) -> str:
    return json.dumps({**record, "record": own_digest(record)}, indent=2) + "\n"
