"""Runs that several processes share: what one would have done; faults end in a line, and lose nothing."""

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
from mlx.core import load
from test_cli_walls import LOOPBACK, MAIN, namespace, reaching_out, tracer
from thorough import mostly

from mlx_ppo.bundle import example_config, lora_example
from mlx_ppo.memory.starting import expected_peaks
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.folder import MEMORY, RESPONSES
from mlx_ppo.runs.plan_file import read_plan

CLOSE = 2e-5  # after a few steps of Adam; 1.1e-5 was seen, with either engine
CHAIN = {"prompts": 5, "max_tokens": 6, "batch_size": 8, "samples_per_prompt": 2}
MODES = {
    "gae": {},
    "separate critic": {"critic": {"kind": "model"}},
    "head": {"critic": {"kind": "head"}},
    "grpo": {"ppo": {"advantage": "grpo"}},
    "full": {"model": {"train": "full", "path": "model"}},
    "micro": {"ppo": {"micro_batch": 1, "gradient_checkpointing": "on"}},
}


def trained(project, name, processes, **changes):
    """A run that so many processes share."""
    sections = {"rollout": CHAIN, **changes}
    sections["parallel"] = {"processes": processes, "patience": 60.0, **changes.get("parallel", {})}
    config = project.config(**sections)
    return finished(project, "train", config, "--set", f"run.name={name}")


def finished(project, *arguments):
    """The output of a command in a process of its own."""
    command = project.start(*arguments)
    output, errors = command.communicate(timeout=240)
    assert command.returncode == 0, (output, errors)
    return output


def adapters(project, name):
    """Adapters, critic and optimizer states of the last checkpoint, below each other."""
    folder = checkpoint.folder_of(project.run(name), len(project.metrics(name)))
    files = sorted(folder.glob("*.safetensors"))
    return np.concatenate([np.array(array).ravel() for file in files for _, array in sorted(load(str(file)).items())])


def written(project, name):
    """Scores and lengths of all responses."""
    rows = [json.loads(line) for line in (project.run(name) / RESPONSES).read_text().splitlines()]
    return [(row["score"], row["length"]) for row in rows]


@pytest.mark.parametrize("mode", mostly(MODES, ("gae", "separate critic", "micro")))
def test_two_processes_do_what_one_does(project, mode):
    trained(project, "one", 1, **MODES[mode])
    trained(project, "two", 2, **MODES[mode])
    rows = zip(project.samples("one"), project.samples("two"), strict=True)
    assert all(one.get("completion") == two.get("completion") for one, two in rows)
    for one, two in zip(project.metrics("one"), project.metrics("two"), strict=True):
        assert one == pytest.approx(two, abs=1e-4, rel=1e-3)
    assert np.abs(adapters(project, "one") - adapters(project, "two")).max() < CLOSE


def test_three_and_four_do_too_and_each_is_repeatable(project):
    for name, processes in (("one", 1), ("three", 3), ("four", 4), ("again", 3)):
        trained(project, name, processes)
    one = adapters(project, "one")
    assert all(np.abs(one - adapters(project, name)).max() < CLOSE for name in ("three", "four"))
    assert written(project, "three") == written(project, "four") == written(project, "one")
    assert project.checkpoints("three") == project.checkpoints("again")
    rows = [json.loads(line) for line in (project.run("three") / MEMORY).read_text().splitlines()]
    assert all(len(row["processes"]) == 3 and min(row["processes"]) > 0 for row in rows)


@pytest.mark.parametrize(("example", "least"), [(example_config, 0.95), (lora_example, 0.85)])
def test_each_process_needs_what_was_planned_for_it(project, example, least):
    """Responses that end before the longest count with LoRA, where weights, gradients and moments are few."""
    shape = ("rollout.prompts=32", "rollout.max_tokens=10", "rollout.temperature=1", "data.eval_count=4")
    shape += ("ppo.minibatches=2", "ppo.epochs=1", "critic.warmup_iterations=1")
    names = ("run.folder=runs", "run.name=a", "run.iterations=2", "parallel.processes=2")
    shown = finished(project, "train", example(), *(part for one in (*shape, *names) for part in ("--set", one)))
    rows = [json.loads(line) for line in (project.run() / MEMORY).read_text().splitlines()]
    planned = expected_peaks(read_plan(project.run()))
    assert len(rows) == 2 and planned[0] >= planned[1] > 20e6
    for rank in range(2):
        most = max(row["processes"][rank] for row in rows)
        assert least < most / planned[rank] < 1.05, (rank, most, planned)
    assert "arrays of each process at most, of what was planned for it" in shown


def test_there_may_be_more_processes_than_prompts(project):
    shape = {"rollout": {"prompts": 2, "max_tokens": 6}, "data": {"eval_count": 1}, "ppo": {"minibatches": 2}}
    for name, processes in (("one", 1), ("three", 3)):
        trained(project, name, processes, **shape)
    assert written(project, "three") == written(project, "one")
    assert np.abs(adapters(project, "one") - adapters(project, "three")).max() < CLOSE


def test_a_run_goes_on_to_the_same_bytes_and_with_other_processes(project):
    shape = {"run": {"iterations": 4, "save_every": 1, "keep_last": 9}}
    trained(project, "whole", 2, **shape)
    trained(project, "part", 2, **shape)
    checkpoint.remove_after(project.run("part"), 2)
    finished(project, "resume", project.run("part"))
    assert project.checkpoints("part") == project.checkpoints("whole")
    assert project.metrics("part") == project.metrics("whole")
    for processes, left in ((3, 2), (1, 3)):
        checkpoint.remove_after(project.run("part"), left)
        file = project.run("part") / "config.toml"
        file.write_text(file.read_text().replace("processes = 2", f"processes = {processes}"))
        shown = finished(project, "resume", project.run("part"), "--allow-config-change")
        assert (f"memory: {processes} processes" in shown) == (processes > 1)
        assert np.abs(adapters(project, "part") - adapters(project, "whole")).max() < CLOSE
        file.write_text(file.read_text().replace(f"processes = {processes}", "processes = 2"))


def followers(parent):
    found = []
    for child in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            found += [child] if "follow_worker" in str(child.cmdline()) else []
    return found


@pytest.fixture
def started(project):
    """Starts a long run of two processes; what is left of it is ended."""
    commands = []

    def start(**changes):
        commands.append(command := begun(project, **changes))
        return command, follower_of(project, command)

    yield start
    for command in commands:
        for process in psutil.Process(command.pid).children(recursive=True) if command.poll() is None else []:
            process.kill()
        command.kill()
        command.communicate()


def begun(project, **changes):
    changes = {
        "run": {"iterations": 10_000, "save_every": 10_000},
        "parallel": {"processes": 2, "patience": 3.0},
        **changes,
    }
    config = project.config(rollout=CHAIN, **changes)
    return project.start("train", config)


def follower_of(project, command):
    """The process that follows, once an iteration is done."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and command.poll() is None:
        if (project.run() / "metrics.jsonl").exists() and (found := followers(command.pid)):
            return found[0]
        time.sleep(0.05)
    raise AssertionError("no iteration was done")


@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, " is lost: "), (signal.SIGSTOP, " hangs")])
def test_a_process_that_is_lost_is_named_and_nothing_is_lost(project, started, number, words):
    command, follower = started()
    follower.send_signal(number)
    _, errors = command.communicate(timeout=60)
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert command.returncode == 4 and f"process 2 of 2 (pid {follower.pid})" in line and words in line
    assert "Go on with: mlx-ppo resume" in line and not follower.is_running()
    saved = checkpoint.newest(project.run())
    assert saved is not None and saved.step >= len(project.metrics()) - 1


def test_a_lost_process_is_replaced(project, started):
    command, follower = started(memory={"retries": 1})
    follower.kill()
    deadline = time.monotonic() + 60
    while not (found := [one for one in followers(command.pid) if one.pid != follower.pid]):
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.1)
    reached = len(project.metrics())
    while len(project.metrics()) <= reached:
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.1)
    command.send_signal(signal.SIGINT)
    _, errors = command.communicate(timeout=60)
    assert "going on with new processes (1 of 1)" in errors and command.returncode == 130
    assert not found[0].is_running()


def test_the_others_end_with_the_one_that_leads(started):
    command, follower = started()
    for process in (*psutil.Process(command.pid).children(recursive=True), psutil.Process(command.pid)):
        if process.pid != follower.pid:
            process.kill()
    command.communicate(timeout=30)
    psutil.wait_procs([follower], timeout=10)
    assert not follower.is_running()


@pytest.mark.skipif(not tracer(), reason="strace isn't installed, or may not trace")
def test_they_need_no_address_at_all(project):
    config, trace = project.config(rollout=CHAIN, parallel={"processes": 2}), project.folder / "trace"
    command = [*tracer(), f"--output={trace}", sys.executable, "-c", MAIN, "train", str(config)]
    shown = subprocess.run(command, cwd=project.folder, check=True, capture_output=True, text=True, timeout=120)
    assert "2 processes" in shown.stdout and reaching_out(trace.read_text()) == []
    assert not LOOPBACK.search(trace.read_text())


@pytest.mark.skipif(not namespace(), reason="the system allows no network namespace (unshare)")
def test_they_share_a_run_where_there_is_not_even_a_loopback_address(project):
    config = project.config(rollout=CHAIN, parallel={"processes": 2})
    command = [*namespace(), sys.executable, "-c", MAIN, "train", str(config)]
    shown = subprocess.run(command, cwd=project.folder, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "2 processes" in shown.stdout, shown.stdout + shown.stderr


def test_a_program_shares_one_run_after_the_other(project):
    for name in ("one", "two"):
        config = project.config(rollout=CHAIN, parallel={"processes": 2})
        project.done("train", config, "--set", f"run.name={name}")
    assert written(project, "one") == written(project, "two")
