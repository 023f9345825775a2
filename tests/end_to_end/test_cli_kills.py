"""SIGKILL at random moments of the bundled run, shortened: nothing is lost, and `resume` needs no other argument.

MLX_PPO_KILLS=200 python -m pytest -s tests/end_to_end/test_cli_kills.py
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mlx_ppo.errors import RunError
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.verification import verify_run

KILLS = int(os.environ.get("MLX_PPO_KILLS", "5"))
KILLS_EACH = 5  # of one run, before it may finish
ITERATIONS = 5
WAIT = 240  # seconds; a busy machine
TIMES = ("time", "seconds", "tokens_per_second", "memory")
SHORT = {
    "run.iterations": ITERATIONS,
    "run.save_every": 1,
    "run.keep_last": 1,
    "run.evaluate_every": 2,
    "rollout.prompts": 8,
    "rollout.max_tokens": 8,
    "data.eval_count": 4,
    "memory.budget_gb": 1,
}
TRAIN = ("train", *(part for key, value in SHORT.items() for part in ("--set", f"{key}={value}")))
RESUME = ("resume", "runs/reviews")


def start(folder, arguments):
    """A command in a session of its own."""
    code = "import sys; from mlx_ppo.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *arguments]
    with open(folder / "output", "w") as output:
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)


def kill(process):
    """SIGKILL to the command and to whatever it has started; whether it was still at work."""
    try:
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = [process]
    for member in family:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return process.wait(WAIT) == -signal.SIGKILL


def checked(run):
    """Every file of the run is as recorded, as soon as no process works in it; the last checkpoint's step."""
    deadline = time.monotonic() + WAIT
    while True:
        try:
            findings = verify_run(run)
            break
        except RunError as error:
            assert "another process" in str(error) and time.monotonic() < deadline, error
            time.sleep(0.05)
    assert findings.problems == ()
    checkpoint.settle(run)
    return max(checkpoint.steps(run), default=0)


def result(run):
    """All that has to be the same: the checkpoint byte for byte, metrics without times, samples."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = {
        str(file.relative_to(run)): file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()
    }
    figures = [{key: value for key, value in row.items() if key.partition("/")[0] not in TIMES} for row in rows]
    return figures, (run / "samples.jsonl").read_text(), files


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path):
    began = time.monotonic()
    assert start(tmp_path, TRAIN).wait(WAIT) == 0, (tmp_path / "output").read_text()
    whole = time.monotonic() - began
    (tmp_path / "runs").rename(tmp_path / "uninterrupted")
    expected = result(tmp_path / "uninterrupted/reviews")
    assert list(expected[2]) and len(expected[0]) == ITERATIONS
    run, generator = tmp_path / "runs/reviews", random.Random()
    kills, landed, finished, here = 0, [], 0, 0
    while kills < KILLS or run.exists():  # the last one is brought to its end
        before = checked(run) if run.exists() else 0
        process = start(tmp_path, RESUME if run.exists() else TRAIN)
        if kills < KILLS and here < KILLS_EACH:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(generator.uniform(0, whole))  # it may end before, where others made the first one slow
            killed = process.returncode is None and kill(process)
        else:
            killed = process.wait(WAIT) == -signal.SIGKILL
        if killed:
            kills, here = kills + 1, here + 1
            after = checked(run) if run.exists() else 0
            assert after >= before
            landed.append(after if run.exists() else -1)
        else:
            assert process.returncode == 0, (tmp_path / "output").read_text()
            assert checked(run) == ITERATIONS and result(run) == expected
            assert sorted(path.name for path in run.iterdir()) == sorted(
                path.name for path in (tmp_path / "uninterrupted/reviews").iterdir()
            )
            assert [path.name for path in (tmp_path / "runs").iterdir()] == ["reviews"]
            shutil.rmtree(tmp_path / "runs")
            finished, here = finished + 1, 0
    places = ", ".join(f"{landed.count(step)} after {step}" for step in range(ITERATIONS + 1))
    print(f"\n{kills} kills; {finished} runs of {ITERATIONS} iterations finished, each like the uninterrupted one")
    print(f"killed {landed.count(-1)} before there was a run folder, {places} saved iterations")
    assert kills == KILLS and finished > 0
