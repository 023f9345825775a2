"""`doctor`: what this machine is, whether mlx-ppo will work well on it, and a proof that nothing leaves it."""

import json
import os
import platform
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import click
import psutil

import mlx_ppo
from mlx_ppo.compute import device
from mlx_ppo.compute.cpu import threads
from mlx_ppo.compute.machine import SIDE, gigaflops
from mlx_ppo.errors import RunError
from mlx_ppo.memory.budget import cgroup_room, default_budget
from mlx_ppo.runs.folder import METRICS
from mlx_ppo.runs.provenance import engine
from mlx_ppo.runtime import offline
from mlx_ppo.runtime.load import BUSY, looked
from mlx_ppo.runtime.surroundings import NOWHERE, Surroundings
from mlx_ppo.runtime.system import cores

_GIB = 1 << 30
_SLOW = 15.0  # GFLOP/s; the reference BLAS has 2 to 6, OpenBLAS some 50 a core
_FILES = 256  # a training run opens some tens
_PROOF_SECONDS = 600.0
_RELAXED = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
_SANDBOX = "(version 1)(allow default)(deny network*)"


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    value: str
    problem: str = ""  # what is wrong with it, and the mend
    fatal: bool = False  # the problem breaks a promise


def examine(*, offline_proof: bool, as_json: bool) -> None:
    """Print what is found; and, if asked for, train a little where there is no network.

    Raises:
        RunError: something could leave this machine, or the proof failed or isn't possible here.
    """
    findings = list(_findings())
    if offline_proof:
        findings.append(prove_offline())
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            click.echo(f"{finding.name:<{width}}  {finding.value}")
            if finding.problem and not finding.fatal:
                click.echo(f"{'':<{width}}  ! {finding.problem}")
    for finding in findings:
        if finding.fatal and finding.problem:
            raise RunError(finding.problem)


def _findings() -> Iterator[Finding]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "numpy"))
    yield Finding("mlx-ppo", f"{mlx_ppo.__version__}, Python {platform.python_version()}, {versions}")
    yield Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Finding("device", f"{device.kind()}, {device.name()}")
    yield Finding("engine", engine())
    yield _memory()
    yield _threads()
    yield _products()
    if device.kind() == "Metal":
        yield _display()
    yield _open_files()
    yield _temporary()
    yield _environment()
    yield _guard()


def _memory() -> Finding:
    memory, room, budget = psutil.virtual_memory(), cgroup_room(), default_budget()
    value = f"{memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} free"
    if room is not None:
        value += f", {room / _GIB:.1f} left by the control group"
    value += f"; a run may use {budget / _GIB:.1f} unless memory.budget_gb says otherwise"
    return Finding("memory", value, "less than 1 GiB for a run: close other programs" if budget < _GIB else "")


def _threads() -> Finding:
    mine = cores()
    given = threads.given()
    busy = looked().others
    value = f"{mine} of {os.cpu_count()} processors, {busy:.1f} kept busy by other programs"
    value += f", OPENBLAS_NUM_THREADS={given}" if given else ""
    if given is not None and given > 1:
        problem = "OPENBLAS_NUM_THREADS keeps a run from giving way to other programs; unset it"
    else:
        problem = "other programs slow a run down: close them" if busy > BUSY * mine else ""
    return Finding("threads", value, problem)


def _products() -> Finding:
    speed = gigaflops()
    value = f"{speed:.0f} GFLOP/s in a product of {SIDE} x {SIDE} float32 matrices"
    if mlx_ppo.BLAS.library is not None:
        value += f", by {mlx_ppo.BLAS.library.name}"
    problem = mlx_ppo.BLAS.problem
    if not problem and speed < _SLOW:
        problem = "as slow as mlx's reference BLAS: another program takes the processors, or OpenBLAS isn't in use"
    return Finding("matrix products", value, problem)


def _display() -> Finding:
    """MacOS ends long work of the GPU while the display is on; what helped: ml-explore/mlx, issue 3267."""
    relaxed = os.environ.get(_RELAXED) == "1"
    value = f"macOS may end a run's work on the GPU while the display is on; {_RELAXED} is {'' if relaxed else 'not '}1"
    if relaxed:
        return Finding("display", value)
    mend = f"if a run ends so: let the display sleep, set {_RELAXED}=1, or compute less at a time (ppo.micro_batch)"
    return Finding("display", value, mend)


def _open_files() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shown = "no limit" if limit == resource.RLIM_INFINITY else f"at most {limit}"
    return Finding("open files", shown, "few for a run; raise it with ulimit -n 1024" if 0 < limit < _FILES else "")


def _temporary() -> Finding:
    folder = Path(os.environ.get("TMPDIR", tempfile.gettempdir()))
    facts = folder.stat()
    private = facts.st_uid == os.getuid() and not stat.S_IMODE(facts.st_mode) & 0o077
    problem = f"others may write libraries into it that mlx loads; make {Path('~/.cache').expanduser()} writable"
    return Finding(
        "mlx's temporary folder", f"{folder}, {'private' if private else 'open'}", "" if private else problem
    )


def _environment() -> Finding:
    missing = [name for name, value in offline.OFFLINE_ENVIRONMENT.items() if os.environ.get(name) != value]
    count = len(offline.OFFLINE_ENVIRONMENT)
    problem = f"changed since mlx_ppo was imported: {', '.join(missing)}" if missing else ""
    return Finding("libraries", f"{count - len(missing)} of {count} variables keep them offline", problem, fatal=True)


def _guard() -> Finding:
    """With the guard on, nothing is sent; without it nothing is tried."""
    if not offline.refusing():
        return Finding("network", "not guarded: this process isn't the command's own", "start mlx-ppo as a program")
    host, port = NOWHERE
    with socket.socket() as probe:
        try:
            probe.settimeout(1)
            probe.connect(NOWHERE)
        except offline.NetworkRefused:
            return Finding("network", f"a connection to {host} port {port} was refused before anything was sent")
        except OSError as error:
            how = f"tried ({error})"
        else:
            how = "made"
    return Finding("network", "open", f"a connection to {host} port {port} was {how}, not refused", fatal=True)


def prove_offline(seconds: float = _PROOF_SECONDS) -> Finding:
    """Train the bundled example a little behind a wall of the system's, for so long at most, and say what was seen."""
    click.echo("training a little without a network ...", err=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mlx-ppo-proof-") as folder:
        command = [*_wall(), sys.executable, "-P", "-m", "mlx_ppo.cli.proof", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=folder)
        except subprocess.TimeoutExpired:
            return _unproved(f"the training behind it took longer than {seconds:.0f} s")
        except OSError as error:
            return _unproved(str(error))
        metrics = Path(folder) / "proof" / METRICS
        iterations = metrics.read_text("utf-8").count("\n") if metrics.exists() else 0
    try:
        seen = Surroundings(*json.loads(done.stdout.partition("\n")[0]))
    except (ValueError, TypeError):
        return _unproved(f"the system allows no such wall here: {_last_line(done.stderr)}")
    if not seen.walled:
        return _unproved(
            f"the wall has holes: interfaces {seen.up}, a socket to {NOWHERE[0]}: {seen.refusal or 'open'}"
        )
    if done.returncode or not iterations:
        return _unproved(f"the training behind it ended with code {done.returncode}: {_last_line(done.stderr)}")
    inside = "the sandbox" if sys.platform == "darwin" else "a network namespace without a live interface"
    value = f"{iterations} iterations trained in {inside} ({time.monotonic() - started:.0f} s); "
    return Finding("offline proof", value + f"a socket to {NOWHERE[0]} gets there: {seen.refusal}")


def _wall() -> list[str]:
    """The system's own command that runs another without a network."""
    if sys.platform == "darwin":
        return ["sandbox-exec", "-p", _SANDBOX]
    return [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--net"]


def _unproved(why: str) -> Finding:
    return Finding("offline proof", "none", f"no offline proof: {why}", fatal=True)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no word"
