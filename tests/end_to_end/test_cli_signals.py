"""Real processes and real signals: what is saved, what is left, and that going on gives the same run."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

WAIT = 240  # seconds; a busy machine
SLOW_RULE = """import time
def letters(prompts, completions):
    time.sleep({pause})
    return [sum(c.isascii() and c.isalpha() for c in text) / (1 + len(text)) for text in completions]
"""


def workers(project):
    shown = subprocess.run(["ps", "-axwwo", "stat,command"], capture_output=True, text=True, timeout=60).stdout
    lines = [line for line in shown.splitlines() if "rewards/worker.py" in line and str(project.folder) in line]
    return [line for line in lines if not line.startswith("Z")]


def until(condition, process=None):
    """Wait for something; the process must not end before."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def begun(project, iterations):
    """Whether a run has that many lines of metrics."""
    file = project.run() / "metrics.jsonl"
    return lambda: file.is_file() and file.read_text().count("\n") >= iterations


def ends(process, code):
    shown = process.communicate(timeout=WAIT)
    assert process.returncode == code, shown
    return shown


def left_in_tmp(project):
    """What a process has left in its temporary folder, but for the kernels that mlx compiles and keeps there."""
    return {path.name for path in project.tmp.iterdir()} - {"mlx"}


@pytest.fixture
def slow_rule(project):
    (project.folder / "rule.py").write_text(SLOW_RULE.format(pause=0.1))
    return project


RUN = {"iterations": 8, "save_every": 1, "keep_last": 20}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_resume_finishes(slow_rule, number, code):
    project = slow_rule
    process = project.start("train", project.config(run=RUN))
    until(begun(project, 2), process)
    assert len(workers(project)) == 1
    process.send_signal(number)
    out, err = ends(process, code)
    assert err == f"stopped by {number.name}; saved. Go on with: mlx-ppo resume runs/a\n"
    assert "\nrun folder: runs/a\n" in out and "Traceback" not in out + err
    saved = project.steps()[-1]
    assert saved >= 2 and [row["step"] for row in project.metrics()] == list(range(1, saved + 1))
    assert workers(project) == []
    assert left_in_tmp(project) == set()
    out, _ = ends(project.start("resume", "runs/a"), 0)
    assert f"resuming after iteration {saved} of 8" in out
    project.done("train", "train.toml", "--set", "run.name=whole")
    assert project.metrics() == project.metrics("whole") and project.samples() == project.samples("whole")
    whole, parts = project.checkpoints("whole"), project.checkpoints()
    assert all(parts[name] == data for name, data in whole.items())
    assert workers(project) == [] and left_in_tmp(project) == set()


@pytest.mark.slow
def test_a_kill_loses_nothing_that_was_saved(slow_rule):
    project = slow_rule
    process = project.start("train", project.config(run={**RUN, "save_every": 2}))
    until(begun(project, 3), process)
    process.kill()
    ends(process, -signal.SIGKILL)
    until(lambda: workers(project) == [])
    with open(project.run() / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "sc')  # as if it had died in the middle of a line
    process = project.start("resume", "runs/a")
    until(lambda: (project.run() / "checkpoints/000006").is_dir(), process)
    process.kill()
    ends(process, -signal.SIGKILL)
    until(lambda: workers(project) == [])
    out, _ = ends(project.start("resume", "runs/a"), 0)
    saved = int(re.search(r"resuming after iteration (\d) of 8", out)[1])
    assert saved >= 6  # the trainer outlives the command by the phase it is in, and saves
    project.done("train", "train.toml", "--set", "run.name=whole")
    assert project.metrics() == project.metrics("whole")
    whole, parts = project.checkpoints("whole"), project.checkpoints()
    assert whole and all(parts[name] == data for name, data in whole.items())
    names = {path.name for path in project.run().iterdir()} - {"journal.jsonl"}
    assert names == {path.name for path in project.run("whole").iterdir()}
    assert not [path for path in (project.run() / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_second_signal_ends_it_at_once(project):
    (project.folder / "rule.py").write_text(SLOW_RULE.format(pause="0.05 if len(completions) == 3 else 100"))
    process = project.start("train", project.config(rollout={"prompts": 4}))
    until(lambda: (project.run() / "samples.jsonl").is_file(), process)
    time.sleep(1.5)  # into the first iteration's call of the reward function
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it waits for the phase to end
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    ends(process, 143)
    assert time.monotonic() - started < 30
    until(lambda: workers(project) == [])


def test_supervised_jobs_stop_and_go_on(project):
    config = project.config("sft", sft={"epochs": 400}, run={"save_every": 100000, "keep_last": 1})
    process = project.start("sft", config)
    until(begun(project, 3), process)
    process.send_signal(signal.SIGTERM)
    _, err = ends(process, 143)
    assert err.startswith("stopped by SIGTERM; saved.")
    rows, steps = project.metrics(), project.steps()
    assert rows[-1]["step"] <= steps[-1] < rows[-1]["step"] + 3
    process = project.start("resume", "runs/a")
    until(lambda: begun(project, len(rows) + 1)(), process)
    process.send_signal(signal.SIGINT)
    ends(process, 130)
    assert [row["epoch"] for row in project.metrics()] == list(range(1, len(project.metrics()) + 1))


def test_two_processes_do_not_share_a_run(slow_rule):
    project = slow_rule
    process = project.start("train", project.config(run={**RUN, "iterations": 100}))
    until(begun(project, 1), process)
    second = project.start("resume", "runs/a")
    _, err = ends(second, 4)
    assert f"runs/a: another process (pid {process.pid}) is working in this run" in err
    process.send_signal(signal.SIGINT)
    ends(process, 130)
    assert json.loads((project.run() / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def test_a_reader_that_goes_away_is_no_error(project):
    """As in `mlx-ppo sample ... | head -1`."""
    reading, writing = os.pipe()
    code = "from mlx_ppo.cli.main import main; main()"
    arguments = [sys.executable, "-c", code, "sample", "model", "--prompt", "it", "--max-tokens", "3"]
    process = subprocess.Popen(arguments, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=project.folder)
    os.close(writing)
    os.close(reading)
    _, err = ends(process, 1)
    assert err == "model: temperature 1, up to 3 tokens\n"
