"""What reports about comparable tools complain of: lines that mislead, sizes that fill the memory, odd terminals."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from thorough import mostly

from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.errors import ConfigError
from mlx_ppo.runs.folder import create_run
from mlx_ppo.runs.metrics import BY_KEY, by_present_names

CODE = "import sys; from mlx_ppo.cli.main import main; sys.exit(main())"
ESTIMATORS = ("gae", "grpo", "dr_grpo", "rloo")
BROKEN = {  # what is wrong before anything is computed
    "model.path": ("model", {"path": "nowhere"}),
    "data.prompts": ("data", {"prompts": "nowhere.jsonl"}),
    "lora.targets": ("lora", {"targets": ["nowhere"]}),
    "reward.function": ("reward", [{"kind": "function", "function": "rule.py:nothing"}]),
    "memory.budget_gb": ("memory", {"budget_gb": 0.001}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_run_that_cannot_begin_names_no_folder(project, case):
    section, change = BROKEN[case]
    result = project.cli("train", project.config(**{section: change}))
    assert result.exit_code in (2, 3)
    assert "run folder" not in result.output and not project.run().exists()


@pytest.mark.parametrize("job", ["sft", "reward"])
def test_supervised_jobs_that_cannot_begin_name_none_either(project, job):
    result = project.cli(job, project.config(job, model={"path": "nowhere"}))
    assert result.exit_code == 3 and "run folder" not in result.output
    shown = project.done(job, project.config(job))
    assert shown.index("run folder: runs/a") < shown.index("finished: runs/a")


@pytest.mark.parametrize("job", ["sft", "reward"])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_adapters_that_would_fill_the_memory_are_refused(project, job, dry):
    started = time.monotonic()
    words = "lora.rank: adapters of rank 500000000, their gradient and optimizer state take "
    project.refused(2, words, job, project.config(job, lora={"rank": 500_000_000}), *dry)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("job", ["sft", "reward"])
def test_texts_that_would_fill_the_memory_are_refused(project, job, monkeypatch):
    monkeypatch.setattr("mlx_ppo.supervised_models.default_budget", lambda: 1_000_000)
    sizes = {"sft": {"sft": {"batch_size": 10**9}}, "reward": {"reward_training": {"batch_size": 10**9}}}
    project.jsonl("texts.jsonl", [{"text": "the film " * 60}] * 40)
    project.jsonl("ratings.jsonl", [{"text": f"the film {i} " * 60, "rating": i % 5} for i in range(40)])
    project.refused(2, "batch_size or data.max_tokens: the states of 40 texts", job, project.config(job, **sizes[job]))


@pytest.mark.parametrize(
    ("job", "key"),
    [
        ("reward", "reward_training.epochs"),
        ("reward", "reward_training.pairs_per_item"),
        ("sft", "sft.epochs"),
        ("train", "ppo.epochs"),
        ("train", "rollout.max_tokens"),
        ("train", "lora.rank"),
    ],
)
@pytest.mark.parametrize("value", ["9" * 12, "9" * 40, "9" * 400])
def test_numbers_beyond_any_use_are_refused_by_their_key(project, job, key, value):
    shown = project.refused(2, f"{key}: ", job, project.config(job), f"--set={key}={value}")
    assert "must be at most" in shown and len(shown.splitlines()) == 1


def test_ratings_that_need_not_differ_make_no_pairs(project):
    config = project.config("reward", reward_training={"min_difference": 0})
    project.refused(2, "reward_training.min_difference: must be above 0", "reward", config)
    project.done("reward", config, "--set=reward_training.objective=regression")


@pytest.mark.parametrize("job", ["sft", "reward"])
def test_only_held_out_data_tell_the_best_epoch(project, job):
    assert "best" not in project.done(job, project.config(job))
    held_out = {"validation": {"sft": "texts.jsonl", "reward": "ratings.jsonl"}[job]}
    assert "(best)" in project.done(job, project.config(job, data=held_out))


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(ESTIMATORS, 2)))
def test_one_key_switches_the_estimator_or_the_second_is_named(project, before, after):
    own = {"gae": {"critic": {"warmup_iterations": 1, "kind": "model"}}}.get(before, {})
    for samples in (1, 4) if before == "gae" else (4,):
        config = project.config(**own, ppo={"advantage": before}, rollout={"samples_per_prompt": samples})
        switched = (TrainConfig, config, (f"ppo.advantage={after}",))
        if samples == 4 or after == "gae":
            assert read_config(*switched).ppo.advantage == after
            continue
        with pytest.raises(ConfigError, match=r"set rollout.samples_per_prompt to 2 or more"):
            read_config(*switched)
        read_config(TrainConfig, config, (*switched[2], "rollout.samples_per_prompt=2"))


def test_a_number_has_one_name_in_metrics_and_another_in_the_logs_of_responses(project):
    project.done("train", project.config(run={"iterations": 1}))
    (row,) = project.metrics()
    logged = (project.run() / "responses.jsonl").read_text() + (project.run() / "samples.jsonl").read_text()
    assert "total_reward" in row and "reward" not in row and '"reward"' not in logged
    old = by_present_names({"step": 1, "reward": 0.5, "score/reward": 1.0})
    assert old == {"step": 1, "total_reward": 0.5, "score/reward": 1.0} and "total_reward" in BY_KEY


SURROUNDINGS = {
    "dumb": {"TERM": "dumb"},
    "none": {"TERM": ""},
    "no colour": {"TERM": "xterm-256color", "NO_COLOR": "1"},
    "narrow": {"TERM": "xterm", "COLUMNS": "20", "LINES": "3"},
    "forced": {"FORCE_COLOR": "1", "COLUMNS": "1"},
    "ascii": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
}


@pytest.mark.parametrize("case", mostly(SURROUNDINGS, ("none", "forced", "ascii")))
def test_a_pipe_gets_plain_lines_whatever_the_terminal(project, case):
    """Each iteration in a line that is whole, the table, and nothing that moves a cursor."""
    config = project.config(run={"iterations": 2})
    environment = {**os.environ, **SURROUNDINGS[case]}
    command = [sys.executable, "-c", CODE, "train", str(config)]
    shown = subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, timeout=240)
    assert shown.returncode == 0 and shown.stderr == b"", shown
    text = shown.stdout.decode()
    assert [line.split("  ")[0] for line in text.splitlines() if line.startswith("iteration")] == [
        "iteration 1/2",
        "iteration 2/2",
    ]
    assert not re.search(r"\x1b\[\d*[A-HJKSTfsu]", text), "moves the cursor"
    assert "held-out" in text and "try it: mlx-ppo sample runs/a" in text
    assert case == "forced" or "\x1b" not in text


FULL = {  # what is written, and where
    "init": (("init", "small/x"), "small/x: cannot be written"),
    "train": (("train", "train.toml", "--set=run.folder=small", "--set=lora.rank=64"), "cannot be written"),
    "sft": (("sft", "sft.toml", "--set=run.folder=small", "--set=lora.rank=64"), "cannot be written"),
    "fused": (("export", "runs/a", "small/x", "--format", "fused"), "small/x: cannot be written"),
    "adapters": (("export", "runs/a", "small/x", "--format", "adapters"), "small/x: cannot be written"),
    "import": (("import", "model", "small/x"), "small/x: cannot be written"),
    "import as another type": (("import", "model", "small/x", "--dtype", "bfloat16"), "small/x: cannot be written"),
    "bench": (("bench", "train.toml", "--iterations=1", "--output=small/x"), "small/x: cannot be written"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL)
def test_a_full_disk_is_called_so_by_every_writer(project, case):
    """On a file system of its own, of 16 blocks or, for short files, of none."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    project.config("sft")
    project.done("train", project.config(run={"iterations": 1}, lora={"rank": 64}))
    (project.folder / "small").mkdir()
    arguments, words = FULL[case]
    fill = "cat /dev/zero > small/full 2>/dev/null; " if case == "bench" else ""
    mount = f'mount -t tmpfs -o size=64k tmpfs small && {fill}exec "$0" -c "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, sys.executable, CODE, *arguments]
    shown = subprocess.run(command, cwd=project.folder, capture_output=True, text=True, timeout=240)
    assert shown.returncode in (2, 4), shown
    (line,) = [line for line in shown.stderr.splitlines() if line.startswith("error: ")]
    assert words in line and re.search(r"No space left on device|the disk has 0\.\d MB free", line), line
    assert "Traceback" not in shown.stderr


def test_what_surrounds_a_run_is_recorded_and_another_is_told_at_resume(project, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setenv("LC_ALL", "C")
    config = read_config(TrainConfig, project.config(run={"iterations": 1}))
    monkeypatch.chdir(project.folder)
    folder = create_run(config, config.run.folder, "a")
    project.done("resume", folder)
    same = project.cli("resume", folder)
    assert same.exit_code == 0 and "warning" not in same.stderr
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        told = project.cli("resume", folder).stderr
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
    for change in ("threads 1 -> 2", "locale C -> de_DE.UTF-8", "timezone UTC UTC -> JST JST"):
        assert f"warning: {change} since the run was started; results may differ" in told


VARIED = {
    "people": {
        "LC_ALL": "tr_TR.UTF-8",
        "LANG": "tr_TR.UTF-8",
        "TZ": "Pacific/Kiritimati",
        "HOME": "/nonexistent",
        "XDG_CACHE_HOME": "/nonexistent",
    },
    "programs": {"PYTHONHASHSEED": "1", "UMASK": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", VARIED)
def test_a_run_is_the_same_in_other_surroundings(project, case):
    """Weights and logs, but for times, and nothing is open to others."""
    config, made = project.config(run={"iterations": 2}), []
    for place, varied in (("one", {}), ("two", VARIED[case])):
        (project.folder / place).mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", **varied}
        mask = int(environment.pop("UMASK", "22"), 8)
        command = [sys.executable, "-c", CODE, "train", str(config), "--set=run.folder=runs"]
        done = subprocess.run(
            command, cwd=project.folder / place, env=environment, capture_output=True, timeout=240, umask=mask
        )
        assert done.returncode == 0, done.stderr
        run = project.folder / place / "runs/a"
        made.append({path.name: path.read_bytes() for path in sorted(run.glob("checkpoints/000002/*.safetensors"))})
        made[-1] |= {name: (run / name).read_bytes() for name in ("samples.jsonl", "responses.jsonl")}
        assert all(path.stat().st_mode & 0o077 == 0 for path in run.rglob("*"))
    assert len(made[0]) > 3 and made[0] == made[1]


def test_memory_that_there_is_not_ends_in_a_line(project, monkeypatch):
    def none(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 373. GiB")

    monkeypatch.setattr("mlx_ppo.writing.generate_together", none)
    words = "there isn't enough memory for this (Unable to allocate 373. GiB); ask for less at once"
    result = project.cli("sample", "model", "--prompt", "it")
    assert result.exit_code == 4 and result.stderr.splitlines()[-1] == f"error: {words}"


@pytest.mark.parametrize("option", ["--max-tokens=99999999999", "--samples=9999999", "--temperature=1e-308"])
def test_options_beyond_any_use_are_refused(project, option):
    result = project.cli("sample", "model", "--prompt", "it", option)
    assert result.exit_code == 2 and f"Invalid value for '{option.partition('=')[0]}'" in result.stderr


def test_a_prompt_longer_than_is_read_at_once_is_refused(project):
    project.refused(2, "--prompt: 20001 tokens, more than 4096", "sample", "model", "--prompt", " a" * 20_000)
