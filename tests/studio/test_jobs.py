"""Jobs outlive the server, are found again, stop when asked, and say how they ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pages import until

from mlx_ppo.errors import RunError
from mlx_ppo.studio.jobs import Jobs

SLEEPER = """import signal, sys, time
def stop(number, _):
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
print("run folder: runs/a", flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch) -> Jobs:
    """Jobs that run SLEEPER in place of a command."""
    monkeypatch.setattr("mlx_ppo.studio.jobs.command", lambda *arguments: [sys.executable, "-c", SLEEPER, *arguments])
    return Jobs(tmp_path)


def test_how_a_job_ended_is_kept(jobs: Jobs, tmp_path: Path) -> None:
    for status, state in ((0, "finished"), (3, "failed"), (5, "stopped"), (143, "stopped")):
        name = jobs.start("train", ["0", str(status)])
        until(lambda name=name: not jobs.get(name).running, "its end", 20)
        assert (jobs.get(name).state, jobs.get(name).status, jobs.get(name).run) == (state, status, "runs/a")
        assert Jobs(tmp_path).get(name) == jobs.get(name)
    assert [job.id for job in jobs.all()] == ["0004-train", "0003-train", "0002-train", "0001-train"]


def test_one_job_of_a_kind_at_a_time_and_stopping_lets_it_save(jobs: Jobs) -> None:
    name = jobs.start("train", ["60", "0"])
    until(lambda: "run folder" in jobs.log(name), "its first line", 20)
    with pytest.raises(RunError, match="is running"):
        jobs.start("train", ["0", "0"])
    jobs.stop(name)
    until(lambda: not jobs.get(name).running, "its end", 20)
    assert jobs.get(name).state == "stopped" and jobs.log(name).endswith("saved\n")
    with pytest.raises(RunError, match="no such job"):
        jobs.get("../../etc")


@pytest.mark.parametrize("which", ["parent", "command"])
def test_a_killed_job_is_said_to_be(jobs: Jobs, tmp_path: Path, which: str) -> None:
    name = jobs.start("train", ["60", "0"])
    until(lambda: "run folder" in jobs.log(name), "its first line", 20)
    parent = next(p for p in psutil.Process().children() if name in " ".join(p.cmdline()))
    (child,) = parent.children()
    (parent if which == "parent" else child).kill()
    if which == "parent":
        time.sleep(0.2)
        assert jobs.get(name).running  # the command itself works on
        jobs.stop(name)
        until(lambda: not jobs.get(name).running, "its end", 20)
        assert jobs.log(name).endswith("saved\n")
    until(lambda: jobs.get(name).state == "killed", "its end", 20)


def test_a_job_outlives_its_server_and_is_found_again(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
import mlx_ppo.studio.jobs as module
module.command = lambda *arguments: [sys.executable, "-c", {SLEEPER!r}, *arguments]
module.Jobs(Path({str(tmp_path)!r})).start("train", ["60", "0"])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    jobs = Jobs(tmp_path)
    (job,) = jobs.all()
    until(lambda: "run folder" in jobs.log(job.id), "its first line", 20)
    assert jobs.get(job.id).running
    jobs.stop(job.id)
    until(lambda: not jobs.get(job.id).running, "its end", 20)
    assert jobs.get(job.id).state == "stopped"


def test_another_process_with_a_jobs_number_is_not_taken_for_it(jobs: Jobs, tmp_path: Path) -> None:
    name = jobs.start("train", ["0", "0"])
    until(lambda: not jobs.get(name).running, "its end", 20)
    folder = tmp_path / ".studio/jobs" / name
    (folder / "status.json").unlink()
    (folder / "process.json").write_text(f'{{"parent": {os.getpid()}, "command": {os.getpid()}}}')
    assert jobs.get(name).state == "killed"
    jobs.stop(name)  # would end this test
