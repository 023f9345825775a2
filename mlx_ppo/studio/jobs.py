"""Jobs that a click starts: ordinary commands, each in a session of its own with a log, which no page's end ends."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from mlx_ppo.errors import RunError, UnhealthyError
from mlx_ppo.files import open_regular, read_json
from mlx_ppo.runs.folder import replace_file
from mlx_ppo.studio.project import is_text

_PROCESS = Path(__file__).with_name("job_process.py")
_MAIN = "import sys; from mlx_ppo.cli.main import main; sys.exit(main())"
_STARTING_SECONDS = 20.0
_STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit codes, and ends by the signals themselves
_TAIL = 16_000  # bytes
_SHOWN = 4_000  # characters of a command line
_RUN = re.compile(rb"^run folder: (.+)$", re.MULTILINE)
_HELD: list["subprocess.Popen[bytes]"] = []  # this server's own, waited for so that none stays a zombie


class Job(NamedTuple):
    """A job as the page shows it."""

    id: str
    kind: str
    shown: str  # the command line that does the same
    started: str
    state: str  # running, finished, stopped, failed, killed
    status: int | None
    run: str | None  # the run's folder, as the log names it

    @property
    def running(self) -> bool:
        """Whether it works."""
        return self.state == "running"


def command(*arguments: str) -> list[str]:
    """An `mlx-ppo` command line as a process starts it."""
    return [sys.executable, "-P", "-c", _MAIN, *arguments]


class Jobs:
    """The jobs of a project's folder; what a server knows of them is in the files."""

    def __init__(self, project: Path) -> None:
        """Jobs work in the project's folder."""
        self._project = project
        self._folder = project / ".studio" / "jobs"

    def start(self, kind: str, arguments: Sequence[str], *, module: str | None = None) -> str:
        """Start an `mlx-ppo` command, or a module of the package; the job's id.

        Raises:
            RunError: a job of this kind is running, or none can be started.
        """
        if any(job.running for job in self.all() if job.kind == kind):
            raise RunError(f"a job of this kind ({kind}) is running; stop it first, or wait")
        words = [sys.executable, "-P", "-m", module, *arguments] if module else command(*arguments)
        shown = shlex.join(["mlx-ppo", *arguments]) if module is None else f"{kind} (in the background)"
        try:
            folder = self._new(kind)
            facts = {"kind": kind, "command": words, "shown": shown, "started": _now()}
            replace_file(folder / "job.json", json.dumps(facts))
            with open(folder / "log", "wb") as log:
                _HELD.append(
                    subprocess.Popen(
                        [sys.executable, "-P", str(_PROCESS), str(folder)],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=self._project,
                        start_new_session=True,
                        env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
                    )
                )
        except OSError as error:
            raise RunError(f"the job can't be started ({error.strerror})") from None
        return folder.name

    def _new(self, kind: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(name[:4]) for name in os.listdir(self._folder) if name[:4].isdecimal()), default=0)
        folder = self._folder / f"{number:04}-{kind}"
        folder.mkdir()
        return folder

    def all(self) -> list[Job]:
        """All jobs, newest first."""
        for process in [process for process in _HELD if process.poll() is not None]:
            _HELD.remove(process)
        names = sorted(filter(is_text, os.listdir(self._folder)), reverse=True) if self._folder.is_dir() else []
        return [job for name in names if (job := self._read(self._folder / name)) is not None]

    def get(self, name: str) -> Job:
        """A job by its id; RunError where there is none."""
        found = next((job for job in self.all() if job.id == name), None)
        if found is None:
            raise RunError("there is no such job")
        return found

    def log(self, name: str) -> str:
        """The end of what a job printed."""
        with open_regular(self._folder / self.get(name).id / "log") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            return file.read().decode("utf-8", "replace")

    def stop(self, name: str) -> None:
        """Ask a job to save and stop; a second time ends it at once."""
        job = self.get(name)
        if job.running:
            for process in _alive(self._folder / job.id):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGINT)
                    return

    def _read(self, folder: Path) -> Job | None:
        facts = _json(folder / "job.json")
        if facts is None or not all(isinstance(facts.get(key), str) for key in ("kind", "shown", "started")):
            return None
        status = (_json(folder / "status.json") or {}).get("status")
        if isinstance(status, int):
            state = "finished" if status == 0 else "killed" if status < 0 else "failed"
            state = "stopped" if status in (*_STOPPED, UnhealthyError.exit_code) else state
        else:
            starting = not (folder / "process.json").exists() and _is_new(facts["started"])
            status, state = None, "running" if starting or _alive(folder) else "killed"
        shown = facts["shown"][:_SHOWN]
        return Job(folder.name, facts["kind"], shown, facts["started"], state, status, _run_of(folder / "log"))


def _is_new(started: str) -> bool:
    """Whether a job was started just now; by a clock that was set back since, it wasn't."""
    try:
        return abs(time.time() - datetime.fromisoformat(started).timestamp()) < _STARTING_SECONDS
    except (ValueError, OverflowError, OSError):
        return False


def _alive(folder: Path) -> list[psutil.Process]:
    """A job's processes that work: its parent first, and the command, which outlives a parent that was killed."""
    found = []
    facts = _json(folder / "process.json") or {}
    words = (_json(folder / "job.json") or {}).get("command", [])
    for name, marks in (("parent", [str(folder)]), ("command", words)):
        with suppress(psutil.Error, KeyError, TypeError, ValueError, OverflowError):
            process = psutil.Process(facts[name])
            # by what it does too: the system gives numbers again
            if process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[-len(marks) :] == marks:
                found.append(process)
    return found


def _run_of(log: Path) -> str | None:
    """The run's folder that a job names; it is one of the project's, whatever else stands there."""
    with suppress(OSError), open_regular(log) as file:
        match = _RUN.search(file.read(_TAIL))
        run = match[1].decode("utf-8", "replace").strip() if match else ""
        parts = Path(run).parts
        return run if parts[:1] == ("runs",) and ".." not in parts and "\0" not in run else None
    return None


def _json(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        value = read_json(path)
        return value if isinstance(value, dict) else None
    return None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
