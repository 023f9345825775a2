"""`sft` and `reward` shared between processes: what one would have done; faults end in a line, and lose nothing."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from mlx.core import load
from test_cli_hosts import hosts  # noqa: F401  a fixture
from test_cli_parallel import CLOSE, finished, followers
from thorough import mostly

from mlx_ppo.runs import checkpoint

NOISY = {"dropout": 0.2, "token_dropout": 0.2}
# job, its changes, processes: three have more processes than pairs in the last batch of an epoch
KINDS = {
    "sft": ("sft", {"sft": {"epochs": 2, "batch_size": 4, **NOISY}, "data": {"validation": "prompts.jsonl"}}, 2),
    "sft of all weights": ("sft", {"model": {"train": "full", "path": "model"}}, 3),
    "ratings": ("reward", {"reward_training": {"objective": "regression", "epochs": 2, "batch_size": 5, **NOISY}}, 2),
    "pairs of ratings": ("reward", {"reward_training": {"objective": "both", "centering": 0.1, **NOISY}}, 3),
    "pairs": ("reward", {"data": {"train": "pairs.jsonl"}, "reward_training": {"epochs": 2, **NOISY}}, 2),
}


@pytest.fixture(autouse=True)
def pairs(project):
    rows = [("it is", " good", " bad"), ("the film was", " very good", " a bad story"), ("a", " good film", " bad")]
    names = ("prompt", "chosen", "rejected")
    project.jsonl("pairs.jsonl", [dict(zip(names, row, strict=True)) for row in rows])
    project.jsonl("prompts.jsonl", [{"text": text} for text in ("a film", "it was not good", "bad story")])


def done(project, name, job, processes, **changes):
    config = project.config(job, parallel={"processes": processes, "patience": 60.0}, **changes)
    return finished(project, job, config, "--set", f"run.name={name}")


def arrays(folder: Path):
    """All numbers of the last checkpoint and of the result, below each other."""
    files = sorted(checkpoint.folder_of(folder, checkpoint.steps(folder)[-1]).glob("*.safetensors"))
    files += sorted(file for kind in ("model", "adapters", "reward") for file in folder.glob(f"{kind}/*.safetensors"))
    return np.concatenate([np.array(array).ravel() for file in files for _, array in sorted(load(str(file)).items())])


@pytest.mark.parametrize("kind", mostly(KINDS, ("sft", "pairs of ratings", "pairs")))
def test_several_processes_do_what_one_does(project, kind):
    job, changes, processes = KINDS[kind]
    done(project, "one", job, 1, **changes)
    shown = done(project, "several", job, processes, **changes)
    assert f"{processes} processes share every step" in shown
    one, several = arrays(project.run("one")), arrays(project.run("several"))
    assert np.abs(one - several).max() < CLOSE and np.abs(one).max() > 1e-3
    for first, second in zip(project.metrics("one"), project.metrics("several"), strict=True):
        assert first == pytest.approx(second, abs=1e-4, rel=1e-3)
    if job == "reward":
        first, second = (json.loads((project.run(name) / "report.json").read_text()) for name in ("one", "several"))
        assert first["training"] == pytest.approx(second["training"], abs=1e-4, rel=1e-3)


def test_a_run_goes_on_to_the_same_bytes_and_with_other_processes(project):
    shape = {"run": {"save_every": 1, "keep_last": 99}, "sft": {"epochs": 2, **NOISY}}
    done(project, "whole", "sft", 2, **shape)
    whole = project.checkpoints("whole")
    shutil.copytree(project.run("whole"), project.run("part"))
    checkpoint.remove_after(project.run("part"), 2)
    finished(project, "resume", project.run("part"))
    assert project.checkpoints("part") == whole and project.metrics("part") == project.metrics("whole")
    for processes, left in ((3, 4), (1, 3)):
        checkpoint.remove_after(project.run("part"), left)
        file = project.run("part") / "config.toml"
        file.write_text(file.read_text().replace("processes = 2", f"processes = {processes}"))
        shown = finished(project, "resume", project.run("part"), "--allow-config-change")
        assert (f"{processes} processes share" in shown) == (processes > 1) and "resuming after step" in shown
        assert np.abs(arrays(project.run("part")) - arrays(project.run("whole"))).max() < CLOSE
        record = json.loads((project.run("part") / "run.json").read_text())
        assert record["shared"]["processes"] == processes
        file.write_text(file.read_text().replace(f"processes = {processes}", "processes = 2"))


@pytest.mark.parametrize(
    ("job", "number", "words"), [("sft", signal.SIGKILL, "lost"), ("reward", signal.SIGSTOP, "hangs")]
)
def test_a_process_that_is_lost_is_named_and_the_run_goes_on(project, job, number, words):
    section = {"sft": "sft", "reward": "reward_training"}[job]
    shape = {"run": {"save_every": 5}, section: {"epochs": 500}}
    command = project.start(job, project.config(job, parallel={"processes": 2, "patience": 10.0}, **shape))
    try:
        deadline = time.monotonic() + 90
        while not (project.run() / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and command.poll() is None
            time.sleep(0.05)
        (follower,) = followers(command.pid)
        follower.send_signal(number)
        _, errors = command.communicate(timeout=60)
    finally:
        command.kill()
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    line = errors
    assert command.returncode == 4 and f"process 2 of 2 (pid {follower.pid})" in line and words in line
    assert "Go on with: mlx-ppo resume" in line and not follower.is_running()
    saved = checkpoint.newest(project.run())
    assert saved is not None and saved.step >= project.metrics()[-1]["step"]


@pytest.mark.parametrize("job", mostly(["sft", "reward"], ("reward",)))
def test_a_lost_process_is_replaced_and_a_killed_run_goes_on(project, job):
    section = {"sft": "sft", "reward": "reward_training"}[job]
    shape = {"run": {"save_every": 5}, section: {"epochs": 500}, "memory": {"retries": 2}}
    command = project.start(job, project.config(job, parallel={"processes": 2, "patience": 10.0}, **shape))
    log, deadline, reached = project.run() / "metrics.jsonl", time.monotonic() + 150, 0

    def further():
        """The run goes on: its step now."""
        while not log.exists() or len(project.metrics()) <= reached:
            assert time.monotonic() < deadline and command.poll() is None
            time.sleep(0.05)
        return len(project.metrics())

    try:
        reached = further() + 5
        reached = further()
        (follower,) = followers(command.pid)
        follower.kill()
        psutil.wait_procs([follower], timeout=30)
        while not (found := [one for one in followers(command.pid) if one.pid != follower.pid]):
            assert time.monotonic() < deadline and command.poll() is None
            time.sleep(0.05)
        reached = further()
        found[0].parent().kill()  # the process that works
        psutil.wait_procs(found, timeout=30)
        reached = further()
        command.send_signal(signal.SIGINT)
        _, errors = command.communicate(timeout=60)
    finally:
        command.kill()
    first, second, last = errors.splitlines()
    assert "process 2 of 2" in first and first.endswith("; going on with new processes (1 of 2)"), errors
    assert "was killed" in second and second.endswith("; going on with the last checkpoint (2 of 2)"), errors
    assert command.returncode == 130 and "mlx-ppo resume" in last, errors
    steps = [row["step"] for row in project.metrics()]
    assert steps == sorted(set(steps))


def test_two_machines_share_the_training_of_a_reward_model(project, hosts):  # noqa: F811
    done(project, "one", "reward", 1)
    config = project.config("reward")
    other = project.start("reward", config, "--hosts", hosts, "--rank", 1)
    finished(project, "reward", config, "--hosts", hosts, "--rank", 0, "--set", "run.name=two")
    output, errors = other.communicate(timeout=60)
    assert other.returncode == 0 and "has the run" in output, (output, errors)
    assert np.abs(arrays(project.run("one")) - arrays(project.run("two"))).max() < CLOSE


def test_more_processes_than_memory_has_room_for_are_refused(project):
    project.refused(2, "parallel.processes: ", "sft", project.config("sft", parallel={"processes": 100_000}))
