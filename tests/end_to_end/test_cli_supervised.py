"""The run is in a child process: what happens when it, or the command, is killed, and that nobody is left."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

import mlx_ppo
from mlx_ppo.cli import supervise
from mlx_ppo.compute.cpu.blas import Blas
from mlx_ppo.errors import RunError
from mlx_ppo.runs.folder import Run
from mlx_ppo.runs.plan_file import read_plan

WAIT = 240  # seconds; a busy machine
RULE = """import time
def letters(prompts, completions):
    time.sleep(0.1)
    return [sum(c.isascii() and c.isalpha() for c in text) / (1 + len(text)) for text in completions]
"""
RUN = {"iterations": 8, "save_every": 1, "keep_last": 20}


@pytest.fixture
def slow(project):
    (project.folder / "rule.py").write_text(RULE)
    return project


def until(condition, process=None):
    """Wait for something; the process must not end before."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


def ends(process, code):
    shown = process.communicate(timeout=WAIT)
    assert process.returncode == code, shown
    return shown


def journal(project, name="a"):
    return [json.loads(line) for line in (project.run(name) / "journal.jsonl").read_text().splitlines()]


def since_start(project, start):
    """The last iteration that the start-th process of this run has begun; 0 where it hasn't."""
    if not (project.run() / "journal.jsonl").exists():
        return 0
    rows = journal(project)
    starts = [at for at, row in enumerate(rows) if row.get("event") == "started"]
    begun = rows[starts[start] :] if start < len(starts) else []
    return max((row["iteration"] for row in begun if "iteration" in row), default=0)


def trainers(processes):
    """Those that train; one that has been forked just now isn't one yet."""
    found = []
    for child in processes:
        with suppress(psutil.Error):  # it has ended meanwhile
            found += [child] if "mlx_ppo.cli.work" in child.cmdline() else []
    return found


def family(process):
    """The training process, and all processes below the command."""
    below = psutil.Process(process.pid).children(recursive=True)
    found = trainers(below)
    assert len(found) == 1, [child.cmdline() for child in below]
    return found[0], below


def working(processes):
    """Those that have not ended; where nothing adopts orphans nothing collects them, so a zombie has."""
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def has(project, name, words):
    file = project.run() / name
    return lambda: file.is_file() and words in file.read_text()


def in_phase(project, phase, iteration):
    return has(project, "journal.jsonl", f'"phase": "{phase}", "iteration": {iteration}')


@pytest.mark.slow
def test_a_killed_trainer_is_told_in_a_line_and_the_run_goes_on(slow):
    project, draw = slow, random.Random(os.urandom(8))
    process = project.start("train", project.config(run={**RUN, "iterations": 16, "save_every": 2}))
    saved = 0
    for start in range(3):
        reached = saved + draw.choice((2, 3))
        until(lambda start=start, reached=reached: since_start(project, start) >= reached, process)
        time.sleep(draw.uniform(0, 0.3))
        trainer, below = family(process)
        assert len(below) == 2  # with the reward function's
        trainer.kill()
        out, err = ends(process, 4)
        line = re.fullmatch(
            r"error: the training process was killed from outside (in the phase '\w+' of|after) "
            r"iteration \d+ \(signal 9\); (probably )?the system was out of memory \(it had held up to \d\.\d\d GiB, "
            r"the plan expected up to \d\.\d\d GiB of arrays\)\. Go on with: mlx-ppo resume runs/a\n",
            err,
        )
        assert line and "Traceback" not in out, err
        until(lambda below=below: working(below) == [])
        assert {"event", "status", "why"} < journal(project)[-1].keys() and journal(project)[-1]["status"] == -9
        saved = max(project.steps(), default=0)
        process = project.start("resume", "runs/a")
    out, err = ends(process, 0)
    resumed = f"resuming after iteration {saved} of 16" in out
    assert resumed == (saved > 0) and err == ""  # three may have been killed before any had saved
    assert journal(project)[-1]["event"] == "finished"
    project.done("train", "train.toml", "--set", "run.name=whole")
    assert project.metrics() == project.metrics("whole") and project.samples() == project.samples("whole")
    assert project.checkpoints() == project.checkpoints("whole")


def test_a_killed_command_takes_the_rest_with_it_once_that_is_saved(slow):
    project = slow
    (project.folder / "rule.py").write_text(RULE.replace("0.1", "1"))
    process = project.start("train", project.config(run={"iterations": 4, "save_every": 100}))
    until(in_phase(project, "score", 3), process)
    trainer, below = family(process)
    process.kill()
    process.wait()
    assert working([trainer])  # it ends the phase
    with Run(project.run()):  # which waits for that
        assert project.steps() == [2]
    ends(process, -signal.SIGKILL)
    until(lambda: working(below) == [])
    out, _ = ends(project.start("resume", "runs/a"), 0)
    assert "resuming after iteration 2 of 4" in out


def test_a_killed_command_while_nothing_was_computed_leaves_nobody(slow):
    process = slow.start("train", slow.config())
    until(lambda: trainers(psutil.Process(process.pid).children()), process)
    _, below = family(process)
    process.kill()
    ends(process, -signal.SIGKILL)
    until(lambda: working(below) == [])


def test_a_trainer_killed_before_anything_was_saved(slow):
    process = slow.start("train", slow.config(run=RUN))
    until(in_phase(slow, "evaluate", 0), process)
    family(process)[0].kill()
    _, err = ends(process, 4)
    assert "in the phase 'evaluate' before the first iteration (signal 9)" in err
    assert "Nothing had been saved yet; start again" in err
    assert not (slow.folder / "runs").exists()


def test_a_trainer_that_crashes_leaves_nothing_of_what_reward_functions_start(slow):
    started = "import subprocess\nsubprocess.Popen(['sleep', '1000'])\n"
    (slow.folder / "rule.py").write_text(started + RULE)
    process = slow.start("train", slow.config(run=RUN))
    until(in_phase(slow, "rollout", 2), process)
    trainer, below = family(process)
    assert len(below) == 3
    trainer.send_signal(signal.SIGSEGV)
    _, err = ends(process, 4)
    if sys.platform.startswith("linux"):
        assert working(below) == []
    assert "by SIGSEGV: a fault in a library, or a signal from outside. Go on with: mlx-ppo resume runs/a" in err


@pytest.mark.slow
def test_where_configured_a_killed_run_goes_on_with_a_smaller_plan(slow):
    project = slow
    process = project.start("train", project.config(run=RUN, memory={"retries": 1}, rollout={"batch_size": 0}))
    until(in_phase(project, "score", 2), process)
    plan = read_plan(project.run()).latest
    first, below = family(process)
    first.kill()
    until(lambda: working(below) == [], process)
    until(in_phase(project, "score", 4), process)
    second, below = family(process)
    record = read_plan(project.run())
    assert record.choices == plan != record.latest and 1 <= record.changes[0].iteration <= 2
    second.kill()
    out, err = ends(process, 4)
    warning, error = err.splitlines()
    assert warning.startswith("warning: the training process was killed from outside in the phase")
    assert warning.endswith("; going on with a smaller plan (1 of 1)")
    assert error.startswith("error: the training process was killed from outside")
    assert "resuming after iteration" in out
    assert working(below) == []
    ends(project.start("resume", "runs/a"), 0)


def test_a_run_whose_plan_cannot_be_smaller_says_so(slow):
    sizes = {
        "rollout": {"prompts": 2, "batch_size": 1, "kv_cache": "full"},
        "score": {"batch_size": 1},
        "ppo": {"minibatches": 2, "micro_batch": 1, "gradient_checkpointing": "off"},
        "memory": {"retries": 3, "positions": 64},
    }
    config = slow.config(run=RUN, **sizes)
    process = slow.start("train", config)
    until(in_phase(slow, "rollout", 2), process)
    family(process)[0].kill()
    _, err = ends(process, 4)
    assert (
        "error: runs/a: the plan can't be made smaller. Close other programs and go on with: mlx-ppo resume runs/a"
        in err
    )


def test_a_signal_to_the_trainer_itself_saves_too(slow):
    process = slow.start("train", slow.config(run=RUN))
    until(in_phase(slow, "rollout", 2), process)
    trainer, _ = family(process)
    for _ in range(3):  # only those to the command are counted
        trainer.send_signal(signal.SIGTERM)
    _, err = ends(process, 143)
    assert err == "stopped by SIGTERM; saved. Go on with: mlx-ppo resume runs/a\n"
    assert journal(slow)[-1]["event"] == "stopped"


def test_a_closed_terminal_saves(slow):
    (slow.folder / "rule.py").write_text(RULE.replace("0.1", "1"))  # the phase lasts until the signal has come
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, also by what is started
    process = slow.start("train", slow.config(run={**RUN, "save_every": 100}))
    signal.signal(signal.SIGHUP, before)
    until(in_phase(slow, "score", 2), process)
    trainer, below = family(process)
    for one in (trainer, process):
        one.send_signal(signal.SIGHUP)
    ends(process, -signal.SIGHUP)
    until(lambda: working(below) == [])
    assert slow.steps() == [1]


class Terminal:
    """A command in a terminal, where Ctrl-C reaches the whole foreground group."""

    def __init__(self, project, *arguments):
        code = "import sys; from mlx_ppo.cli.main import main; sys.exit(main())"
        inside = [sys.executable, "-c", code, *map(str, arguments)]
        outside = f"import os, pty; os._exit(os.waitstatus_to_exitcode(pty.spawn({inside!r})))"
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen([sys.executable, "-c", outside], cwd=project.folder, **streams)

    def press(self, key):
        self.process.stdin.write(key)
        self.process.stdin.flush()

    def ends(self, code):
        shown = self.process.communicate(timeout=WAIT)[0].decode()
        assert self.process.returncode == code, shown
        return shown


def test_control_c_in_a_terminal_counts_once(slow):
    terminal = Terminal(slow, "train", slow.config(run=RUN))
    until(in_phase(slow, "score", 2), terminal.process)
    below = psutil.Process(terminal.process.pid).children(recursive=True)
    terminal.press(b"\x03")
    shown = terminal.ends(130)
    assert "stopped by SIGINT; saved. Go on with: mlx-ppo resume runs/a" in shown and "Traceback" not in shown
    assert "\x1b[?25h" in shown[shown.rindex("\x1b[?25l") :]  # the panel gives the cursor back
    assert slow.steps() and working(below) == []


def test_a_second_control_c_ends_it_at_once(slow):
    (slow.folder / "rule.py").write_text(RULE.replace("0.1", "0.1 if len(completions) == 3 else 100"))
    terminal = Terminal(slow, "train", slow.config(run=RUN))
    until(in_phase(slow, "score", 1), terminal.process)
    below = psutil.Process(terminal.process.pid).children(recursive=True)
    terminal.press(b"\x03")
    time.sleep(0.5)
    assert terminal.process.poll() is None
    terminal.press(b"\x03")
    shown = terminal.ends(130)
    assert "\x1b[?25h" in shown[shown.rindex("\x1b[?25l") :] and "Traceback" not in shown
    until(lambda: working(below) == [])


def test_a_reader_that_goes_away_ends_the_run(slow):
    reading, writing = os.pipe()
    code = "from mlx_ppo.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", str(slow.config(run=RUN))],
        stdout=writing, stderr=subprocess.PIPE, text=True, cwd=slow.folder, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    os.close(writing)
    until(in_phase(slow, "score", 2), process)
    _, below = family(process)
    os.close(reading)
    ends(process, 1)
    assert working(below) == [] and slow.steps()


def test_errors_of_our_own_come_with_their_traceback(slow):
    """No user can cause one, so a module is taken away."""
    (slow.folder / "sitecustomize.py").write_text("import sys\nsys.modules['mlx_ppo.train'] = None\n")
    code = "from mlx_ppo.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", str(slow.config())],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=slow.folder,
        env={**os.environ, "PYTHONPATH": str(slow.folder)},
    )  # fmt: skip
    _, err = ends(process, 1)
    assert err.startswith("Traceback (most recent call last):\n") and "ModuleNotFoundError" in err.splitlines()[-1]
    assert not (slow.folder / "runs").exists()


def test_errors_come_through_as_they_were(slow):
    (slow.folder / "rule.py").write_text("def letters(:\n")
    _, err = ends(slow.start("train", slow.config()), 2)
    here = slow.cli("train", "train.toml")
    assert here.exit_code == 2 and here.stderr == err
    assert err.startswith(f"error: {slow.folder}/rule.py:1: the reward function can't be loaded: raised SyntaxError")
    (slow.folder / "texts.jsonl").write_text("{\n")
    _, err = ends(slow.start("sft", slow.config("sft")), 3)
    assert err.startswith(f"error: {slow.folder}/texts.jsonl:1: ") and len(err.splitlines()) == 1
    assert not (slow.folder / "runs").exists()


def test_the_command_itself_does_without_mlx(slow):
    code = """
import sys
from mlx_ppo.cli.main import main
try:
    main(sys.argv[1:])
finally:
    assert not {"mlx.core", "mlx_lm", "numpy"} & set(sys.modules), "heavy"
"""
    arguments = [sys.executable, "-c", code, "train", str(slow.config(run={"iterations": 1}))]
    done = subprocess.run(arguments, cwd=slow.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((slow.run() / "run.json").read_text())["device"].startswith(("CPU: ", "GPU: "))
    assert "policy: runs/a/checkpoints/000001" in done.stdout and "held-out prompts" in done.stdout


def test_a_slow_blas_is_told_when_training_starts(project, monkeypatch):
    monkeypatch.setattr(mlx_ppo, "BLAS", Blas(None, "mlx's slow reference BLAS stays: it is Monday"))
    shown = project.done("sft", project.config("sft", sft={"epochs": 1}))
    assert "warning: mlx's slow reference BLAS stays: it is Monday" in shown.splitlines()


def test_a_lock_names_the_process_that_a_user_knows(project, tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with Run(tmp_path, supervisor=other.pid):
        with pytest.raises(RunError, match=rf"another process \(pid {other.pid}\) is working in this run"):
            Run(tmp_path)
        other.communicate()
    assert (tmp_path / "lock").read_text() == ""


REFUSED = "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU...ErrorOutOfMemory)"
# the trainer's second iteration fails as on a GPU, as many times as there are files to take away
REFUSING = f"""
import sys
if sys.argv[0] == "-m" or "mlx_ppo.cli.work" in " ".join(sys.orig_argv):
    import pathlib
    from mlx_ppo.stages import iteration
    score = iteration.score
    def refusing(roles, policy, critic, rollout, *others):
        left = sorted(pathlib.Path(__file__).parent.glob("refuse-*"))
        if left and (pathlib.Path(__file__).parent / "runs/a/metrics.jsonl").exists():
            left[0].unlink()
            raise RuntimeError("{REFUSED}")
        return score(roles, policy, critic, rollout, *others)
    iteration.score = refusing
"""


@pytest.mark.parametrize("retries", [0, 1])
def test_a_gpu_that_refuses_ends_a_run_at_its_last_checkpoint_or_makes_its_plan_smaller(project, retries):
    (project.folder / "sitecustomize.py").write_text(REFUSING)
    (project.folder / "refuse-1").touch()
    run = {"iterations": 3, "save_every": 1}
    config = project.config(run=run, memory={"retries": retries})
    code = "from mlx_ppo.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", str(config)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=project.folder,
        env={**os.environ, "PYTHONPATH": str(project.folder)},
    )  # fmt: skip
    _, err = ends(process, 0 if retries else 4)
    assert "Traceback" not in err and "the GPU was out of memory" in err and "Insufficient Memory" in err
    if retries:
        assert "going on with a smaller plan (1 of 1)" in err and [row["step"] for row in project.metrics()] == [
            1,
            2,
            3,
        ]
        changes = json.loads((project.run() / "plan.json").read_text())["changes"]
        assert len(changes) == 1
    else:
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "memory.budget_gb" in line and "mlx-ppo resume runs/a" in line
        assert project.steps() == [1]
        project.done("resume", project.run())
        assert [row["step"] for row in project.metrics()] == [1, 2, 3]


def test_what_a_killed_process_held_counts_a_gpus_arrays(tmp_path, monkeypatch):
    """They aren't resident memory of a process on a Mac; what another process had logged before doesn't count."""
    monkeypatch.setattr(supervise, "most_held_by_children", lambda: 1 << 30)
    rows = [{"step": 1, "rollout": 9 << 30}, {"step": 2, "rollout": 3 << 30}, {"step": 3, "load": 1, "step.x": 5 << 30}]
    (tmp_path / "memory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "roll')
    journal = supervise.Journal(tmp_path)

    def said():
        return supervise._death(-signal.SIGKILL, journal, tmp_path, starved=True)

    assert "it had held up to 1.00 GiB" in said(), "this process has finished no iteration"
    journal.follow("iteration", [{"step": 2.0}])
    journal.follow("iteration", [{"step": 3.0}])
    assert "it had held up to 5.00 GiB" in said()
