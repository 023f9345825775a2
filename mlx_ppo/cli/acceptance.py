"""`doctor --acceptance`: does this machine hold what the program promises? Commands as a user gives them, and figures.

What is printed and kept names neither user nor host nor folders, so that it can be published.
"""

import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import psutil

from mlx_ppo.bundle import bundle_root, lora_example
from mlx_ppo.cli.doctor import prove_offline
from mlx_ppo.cli.trials import IN_TERMINAL, Place, last_line
from mlx_ppo.compute import device
from mlx_ppo.errors import RunError
from mlx_ppo.runs.folder import MEMORY
from mlx_ppo.runs.plan_file import PLAN
from mlx_ppo.runs.provenance import engine
from mlx_ppo.runtime import system
from mlx_ppo.runtime.load import BUSY, Load

FILE = "mlx-ppo-acceptance.json"
_ITERATIONS = 4
_OVER = 1.1  # of a planned peak
_SPARE = 4 << 20  # bytes that a small model's phases may be over it
_GROWTH, _RESIDENT = 1.05, 128  # times as many bytes in arrays; MB more that the processes hold
_SETTLED = 3  # iterations before memory and time are compared: kernels are compiled, the plan is corrected
_ROUNDING = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.2, "4-bit": 0.2}  # of the largest |ratio - 1|
_COARSE = 0.02  # of the same in float32 where products are in TF32
_SHARES = {"speed by phase": 0.5, "kill and resume": 1.5, "a long run": 4.0}  # twelfths of the time; else one
_GIB = 1 << 30


class Check(NamedTuple):
    """What was tried."""

    name: str
    passed: bool | None  # None: not tried
    said: str  # a line for people
    figures: dict[str, Any]


def accept(*, minutes: float, as_json: bool) -> None:
    """Try everything, print a line for each as it is known, and keep the figures in `FILE` of the working folder.

    Raises:
        RunError: something failed, or the file can't be written.
    """
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="mlx-ppo-acceptance-", ignore_cleanup_errors=True) as folder:
        place = Place(Path(folder), minutes)
        click.echo(f"at most {place.limit / 60:.0f} minutes in all", err=True)
        for check in _checks(place):
            checks.append(check)
            word = {True: "PASS", False: "FAIL", None: "----"}[check.passed]
            click.echo(f"{word}  {check.name:<22}  {check.said}", err=as_json)
    text = json.dumps({"format": 1, "minutes": minutes, "checks": [check._asdict() for check in checks]}, indent=2)
    if as_json:
        click.echo(text)
    else:
        try:
            Path(FILE).write_text(text + "\n", "utf-8")
        except OSError as error:
            raise RunError(f"{FILE}: cannot be written ({error.strerror})") from None
        click.echo(f"figures: {FILE}")
    failed = [check.name for check in checks if check.passed is False]
    if failed:
        raise RunError(f"acceptance: {len(failed)} of {len(checks)} failed: {', '.join(failed)}")


def _checks(place: Place) -> Iterator[Check]:
    yield _machine(place)
    for dtype in ("float32", "float16", "bfloat16"):
        yield _tried(f"example, {dtype}", _trained, place, dtype, [f"model.dtype={dtype}"])
    four = _tried("example, 4-bit", _quantised, place)
    if device.kind() == "CUDA" and not four.passed:
        four = four._replace(passed=None, said=f"quantised models are not promised on CUDA: {four.said}")
    yield four
    yield _tried("speed by phase", _speed, place)
    yield _tried("kill and resume", _killed, place)
    yield _tried("closed terminal", _closed, place)
    yield _tried("a long run", _long, place)
    yield _tried("offline", _offline, place)


def _tried(name: str, check: Callable[..., Check], place: Place, *given: Any) -> Check:
    """A check's result; what goes wrong with the check itself fails it."""
    place.begin(_SHARES.get(name, 1.0) / sum(_SHARES.values(), 6.0))
    try:
        return check(place, *given)._replace(name=name)
    except subprocess.TimeoutExpired:
        said = f"cut after {place.share:.0f} s, its share of the time: it hangs, or this machine is too slow for it"
        return Check(name, False, said, {"cut_after_seconds": place.share})
    except (OSError, subprocess.SubprocessError, RunError, ValueError, KeyError, IndexError) as error:
        return Check(name, False, f"{type(error).__name__}: {place.shown(last_line(str(error)))[:200]}", {})


def _machine(place: Place) -> Check:
    figures = {
        **system.facts(),
        **{name: version(name) for name in ("mlx-ppo", "mlx", "mlx-lm", "numpy")},
        "device": f"{device.kind()}: {device.name()}",
        "engine": engine(),
        "memory_gib": round(psutil.virtual_memory().total / _GIB, 1),
        "processors": os.cpu_count(),
        "sizes": "the example's own" if not place.sizes else f"smaller: {', '.join(place.sizes)}",
    }
    said = f"{figures['device']}, {figures['memory_gib']} GiB, {figures['system']}, mlx {figures['mlx']}; {engine()}"
    return Check("machine", True, said, figures)


def _trained(place: Place, name: str, settings: Sequence[str], config: Sequence[str] = ()) -> Check:
    """The example for a few iterations: the self-check, sampled against scored probabilities, memory, what was said."""
    done = place.run(
        place.train(name, f"run.iterations={_ITERATIONS}", "critic.warmup_iterations=0", *settings, config=config)
    )
    rows = place.rows(name)
    if done.returncode or len(rows) != _ITERATIONS:
        return Check("", False, place.shown(last_line(done.stderr)), {})
    lines = [place.shown(line) for line in done.stdout.splitlines()[:20]]
    remarks = [line for line in lines if "computed" in line or line.startswith(("warning", "rollouts", "prompts"))]
    over = _over_plan(place, name)
    figures = {
        "ratio_error": max(row["ratio_error"] for row in rows),
        "logprob_error": max(row["logprob_error"] for row in rows),
        "tokens_per_second": rows[-1]["tokens_per_second"],
        "measured_over_planned": over,
        "said": remarks,
    }
    worst = max(over, key=lambda phase: over[phase])
    bound = _COARSE if name == "float32" and device.multiplies_coarsely() else _ROUNDING[name]
    passed = figures["ratio_error"] <= bound and over[worst] <= _OVER
    said = (
        f"ratio error {figures['ratio_error']:.1e}, logprob error {figures['logprob_error']:.1e}, "
        f"{figures['tokens_per_second']:.0f} tokens/s, peak at most {over[worst]:.2f} of the plan ({worst})"
    )
    return Check("", passed, "; ".join([said, *remarks]), figures)


def _over_plan(place: Place, name: str) -> dict[str, float]:
    """Measured peaks over planned ones, by phase, less what a model of a few megabytes may be off by."""
    planned = json.loads((place.folder / name / PLAN).read_text("utf-8"))["phases"]
    rows = place.rows(name, MEMORY)
    found = {phase: max(row.get(phase, 0) for row in rows) for phase in planned}
    return {
        phase: round(max(0, peak - _SPARE) / planned[phase]["mlx_bytes"], 3)
        for phase, peak in found.items()
        if peak and planned[phase]["mlx_bytes"]
    }


def _quantised(place: Place) -> Check:
    """The example's model in 4 bits; its reward model stays whole."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    source, target = bundle_root() / "models" / "reviews", place.folder / "models" / "4-bit"
    target.mkdir(parents=True)
    model, config = load_model(source, trust_remote_code=False)
    with redirect_stdout(sys.stderr):
        model, config = quantize_model(model, config, group_size=32, bits=4)
    save_model(target, model)
    save_config(config, target / "config.json")
    for file in source.glob("token*"):
        (target / file.name).write_bytes(file.read_bytes())
    rule = place.folder / "rule.py"
    rule.write_text("def length(completions):\n    return [len(text) / 100 for text in completions]\n", "utf-8")
    toml = place.folder / "4-bit.toml"
    prompts = source / "data" / "prompts-train.jsonl"
    toml.write_text(
        f'[model]\npath = "{target}"\n[data]\nprompts = "{prompts}"\n[[reward]]\nkind = "function"\n'
        f'function = "{rule}:length"\n[critic]\ninitialise = "policy"\n',
        "utf-8",
    )
    return _trained(place, "4-bit", ["rollout.prompts=16"], [str(toml)])


def _speed(place: Place) -> Check:
    file = place.folder / "bench.json"
    settings = [part for setting in place.sizes if "eval" not in setting for part in ("--set", setting)]
    done = place.run(place.command("bench", str(lora_example()), "--iterations", "1", "--output", str(file), *settings))
    if done.returncode:
        return Check("", False, place.shown(done.stderr), {})
    phases = json.loads(file.read_text("utf-8"))["phases"]
    keys = ("tokens_per_second", "share_of_peak", "seconds")
    figures = {name: {key: row[key] for key in keys if key in row} for name, row in phases.items()}
    told = (
        f"{name} {row['tokens_per_second']:.0f}" + (f" ({row['share_of_peak']:.0%})" if "share_of_peak" in row else "")
        for name, row in figures.items()
        if "tokens_per_second" in row
    )
    return Check("", True, f"tokens/s (of the peak): {', '.join(told)}", figures)


def _digest(place: Place, name: str) -> str:
    newest = max((place.folder / name / "checkpoints").glob("[0-9]*"))
    return hashlib.sha256((newest / "adapters.safetensors").read_bytes()).hexdigest()


def _killed(place: Place) -> Check:
    """A run that is killed in mid-iteration and resumed, against one that wasn't."""
    settings = (f"run.iterations={_ITERATIONS}", "run.save_every=1", "critic.warmup_iterations=0")
    whole = place.run(place.train("whole", *settings))
    with place.started(place.train("killed", *settings)) as process:
        place.until("killed", 2, process)
    at = len(place.rows("killed"))
    again = place.run(place.command("resume", str(place.folder / "killed")))
    if whole.returncode or again.returncode:
        return Check("", False, place.shown(whole.stderr or again.stderr), {})
    same = _digest(place, "whole") == _digest(place, "killed")
    steps = [row["step"] for row in place.rows("killed")]
    exact = same or device.kind() != "CPU"  # on a CPU resuming gives the same bytes; a GPU's sums may have no order
    said = f"killed after iteration {at}; {'the same bytes' if same else 'other bytes'} as without"
    return Check("", exact and steps == list(range(1, _ITERATIONS + 1)), said, {"same_bytes": same, "steps": steps})


def _closed(place: Place) -> Check:
    """A terminal is closed on a run: it saves, and nothing of it stays."""
    ends = pty.openpty()
    os.set_blocking(ends[0], False)
    with open(ends[0], "rb", buffering=0) as screen, open(ends[1], "rb", buffering=0) as terminal:
        command = [
            sys.executable,
            "-c",
            IN_TERMINAL,
            *place.train("closed", "run.iterations=1000", "run.save_every=1000"),
        ]
        with place.started(command, terminal.fileno()) as process:
            terminal.close()
            place.until("closed", 1, process, screen)
            below = psutil.Process(process.pid).children(recursive=True)
            screen.close()
            process.wait(place.left())
            _, alive = psutil.wait_procs(below, timeout=place.left())
    saved, done = any((place.folder / "closed" / "checkpoints").glob("[0-9]*")), len(place.rows("closed"))
    said = f"{'saved' if saved else 'NOT saved'} after iteration {done}; {len(alive) or 'no'} processes are left"
    return Check("", saved and not alive, said, {"iterations": done, "processes_left": len(alive)})


def _long(place: Place) -> Check:
    """For as long as is allowed, at most 200 iterations: does it live, and does anything grow?"""
    load, resident = Load(), list[tuple[float, int]]()
    with place.started(place.train("long", "run.iterations=200", "run.save_every=50")) as process:
        end = time.monotonic() + 60 * place.minutes
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.5)
            resident.append((time.time(), _resident(process.pid)))
        busy = load.others
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        status = process.wait(place.left())
    rows = place.rows("long")
    lives = status in (0, 128 + signal.SIGTERM)
    figures: dict[str, Any] = {"iterations": len(rows), "minutes": place.minutes, "status": status}
    figures["processors_kept_busy_by_others"] = round(busy, 2)
    if len(rows) < 3 * _SETTLED:
        return Check("", lives, f"{len(rows)} iterations: too few to see whether anything grows", figures)
    over = _over_plan(place, "long")
    worst = max(over, key=lambda phase: over[phase])
    held = [size for at, size in resident if at > rows[_SETTLED - 1]["time"]]
    figures |= {**_growth(rows, place.rows("long", MEMORY), held), "measured_over_planned": over}
    arrays, more, pace = (
        figures[name] for name in ("arrays_last_over_first", "resident_more_mb", "pace_last_over_first")
    )
    said = (
        f"{len(rows)} iterations; from their first to their last quarter: arrays at a step {arrays:.2f} times as much, "
        f"resident memory {more:+.0f} MB, seconds a token {pace:.2f} times"
    )
    said += f" (others kept {busy:.1f} processors busy)" if busy > BUSY * system.cores() else ""
    said += f"; peak at most {over[worst]:.2f} of the plan ({worst})"
    return Check("", lives and arrays <= _GROWTH and more <= _RESIDENT and over[worst] <= _OVER, said, figures)


def _growth(
    rows: Sequence[dict[str, Any]], memory: Sequence[dict[str, Any]], resident: Sequence[int]
) -> dict[str, float]:
    """What is there at an optimizer step, what the processes hold, and time a token: the last quarter over the first.

    Peaks of other phases follow the responses, which become longer or shorter as the policy learns; what a step needs
    doesn't.
    """

    def quarters(figures: Sequence[Any], of: Callable[[Sequence[Any]], float]) -> tuple[float, float]:
        quarter = max(1, len(figures) // 4)
        return of(figures[:quarter]), of(figures[-quarter:])

    def pace(part: Sequence[dict[str, Any]]) -> float:
        return float(
            sum(row["seconds"] for row in part) / sum(row["tokens_per_second"] * row["seconds"] for row in part)
        )

    steps = [row["update step"] for row in memory[_SETTLED:] if "update step" in row]
    arrays, held, paces = quarters(steps, max), quarters(resident or [0], median), quarters(rows[_SETTLED:], pace)
    return {
        "arrays_last_over_first": arrays[1] / arrays[0],
        "resident_more_mb": (held[1] - held[0]) / 1e6,
        "pace_last_over_first": paces[1] / paces[0],
    }


def _resident(pid: int) -> int:
    """Bytes of a process and of all that it has started."""
    with suppress(psutil.Error):  # one has ended meanwhile
        each = (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))
        return sum(process.memory_info().rss for process in each)
    return 0


def _offline(place: Place) -> Check:
    found = prove_offline(place.left())
    return Check("", not found.problem, place.shown(found.problem or found.value), {})
