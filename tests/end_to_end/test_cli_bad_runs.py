"""Run folders that can't be used or written: locked, changed, damaged, full."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ppo.runs import checkpoint
from mlx_ppo.runs import folder as runs
from mlx_ppo.runs.folder import Run


@pytest.fixture
def trained(project):
    """A project with a run of two iterations that is to have four."""
    project.done("train", project.config(run={"iterations": 2}))
    text = (project.run() / "config.toml").read_text()
    changed = text.replace("iterations = 2", "iterations = 4")
    (project.run() / "config.toml").write_text(changed)
    with Run(project.run()) as run:  # as if it had been started so
        run.note(config=hashlib.sha256(changed.encode()).hexdigest(), configuration=changed)
    return project


def test_a_run_that_another_process_works_in(trained):
    with Run(trained.run()):
        trained.refused(4, f"runs/a: another process (pid {os.getpid()}) is working in this run", "resume", "runs/a")
    trained.done("resume", "runs/a")
    assert trained.steps() == [3, 4]


def test_folders_that_are_no_run(trained):
    trained.refused(2, "runs/aa: not a run folder. Did you mean 'runs/a'?", "resume", "runs/aa")
    trained.refused(2, "model: not a run folder", "resume", "model")
    trained.refused(2, "rule.py: not a run folder", "resume", "rule.py")
    (trained.run() / "run.json").write_text("{")
    trained.refused(4, "runs/a/run.json: cannot be read", "resume", "runs/a")
    (trained.run() / "run.json").write_text('{"command": "dance"}')
    trained.refused(2, "runs/a/run.json: unknown command 'dance'", "resume", "runs/a")


@pytest.mark.parametrize("name", ["prompts.jsonl", "rule.py"])
def test_inputs_that_changed(trained, name):
    file = trained.folder / name
    content = file.read_bytes()
    file.write_bytes(content + b"\n")
    trained.refused(4, f"{name}: changed since the run was started; restore it", "resume", "runs/a", left=True)
    file.unlink()
    trained.refused(4, f"{name}: missing since the run was started; restore it", "resume", "runs/a", left=True)
    file.write_bytes(content)
    trained.done("resume", "runs/a")


def test_a_file_that_came_into_the_models_folder(trained):
    copy = trained.folder / "copy"
    shutil.copytree(trained.folder / "model", copy)
    trained.done("train", trained.config(model={"path": "copy"}, run={"iterations": 1, "name": "b"}))
    shard = copy / "model-00002-of-00002.safetensors"
    shutil.copy(copy / "model.safetensors", shard)
    (copy / ".DS_Store").write_text("not a file that anything reads")
    allowing = ("resume", "runs/b", "--allow-config-change")
    trained.refused(4, f"{shard}: added since the run was started; remove it", *allowing, left=True)
    shard.unlink()
    trained.done("resume", "runs/b")


def test_a_changed_configuration_is_shown_and_wants_a_word(trained):
    file = trained.run() / "config.toml"
    note = "\ufeff# a note of mine, from another editor\n" + file.read_text()
    file.write_bytes(note.replace("\n", "\r\n").encode())
    assert "warning" not in trained.cli("resume", "runs/a").stderr  # which changes no key
    assert "as recorded (" in trained.done("verify", "runs/a")
    text = file.read_text().replace("iterations = 4", "iterations = 6")
    file.write_text(text.replace("\ncoef = 0.05", "\ncoef = 0.1"))
    words = "config.toml: changed since the run was started; restore it, or give --allow-config-change"
    shown = trained.refused(4, words, "resume", "runs/a", left=True)
    lines = ["- run.iterations = 4", "+ run.iterations = 6", "- kl.coef = 0.05", "+ kl.coef = 0.1"]
    assert shown.splitlines()[1:] == lines
    assert trained.steps() == [3, 4]
    result = trained.cli("resume", "runs/a", "--allow-config-change")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[1:] == lines and "config.toml has changed" in result.stderr
    assert trained.steps() == [5, 6] and [row["kl_coef"] for row in trained.metrics()] == [0.05] * 4 + [0.1] * 2
    trained.done("resume", "runs/a")  # it is the run's configuration now
    changes = json.loads((trained.run() / "run.json").read_text())["changes"]
    assert changes == [{"after_step": 4, "configuration": lines, "code": []}]


def test_a_configuration_that_no_longer_fits_the_checkpoint(trained):
    file = trained.run() / "config.toml"
    file.write_text(file.read_text().replace("rank = 4", "rank = 5"))
    result = trained.cli("resume", "runs/a", "--allow-config-change")
    assert result.exit_code == 4
    wanted = "error: the checkpoint's policy has other weights than this configuration; nothing was loaded"
    assert result.stderr.splitlines()[-1] == wanted
    assert trained.steps() == [1, 2]


def test_an_edited_reward_function_wants_a_word(trained):
    file = trained.folder / "rule.py"
    file.write_text(file.read_text() + "\n# edited\n")
    words = "rule.py: changed since the run was started; restore it, or give --allow-config-change"
    trained.refused(4, words, "resume", "runs/a", left=True)
    trained.done("resume", "runs/a", "--allow-config-change")
    assert trained.steps() == [3, 4]
    trained.done("resume", "runs/a")


def test_a_run_folder_that_is_removed_while_its_process_lives(project, monkeypatch):
    real = runs.Run.log

    def log(run, name, rows):
        real(run, name, rows)
        if name == runs.SAMPLES and any(row["step"] == 2 for row in run.rows(runs.METRICS)):
            shutil.rmtree(run.folder)

    monkeypatch.setattr(runs.Run, "log", log)
    for job in ("train", "sft", "reward"):
        if job != "train":
            monkeypatch.setattr(runs.Run, "log", lambda run, name, rows: shutil.rmtree(run.folder))
        project.refused(4, "runs/a: was removed or replaced while this process", job, project.config(job), left=True)
        assert not project.run().exists()

    def replaced(run, name, rows):
        run.folder.rename(project.folder / "moved")
        run.folder.mkdir()
        (run.folder / "theirs").write_text("another run's")

    monkeypatch.setattr(runs.Run, "log", replaced)
    project.refused(4, "runs/a: was removed or replaced while", "sft", project.config("sft"), left=True)
    assert [path.name for path in project.run().iterdir()] == ["theirs"]


def test_other_software_than_at_the_start_is_told(trained):
    with Run(trained.run()) as run:
        run.note(versions={**run.record()["versions"], "mlx": "0.1"})
    result = trained.cli("resume", "runs/a")
    assert result.exit_code == 0 and result.stderr.startswith("warning: mlx 0.1 -> ")


@pytest.mark.parametrize(
    "name", ["adapters.safetensors", "optimizer_critic.safetensors", "state.json", "manifest.json"]
)
def test_checkpoints_that_are_damaged(trained, name):
    file = trained.run() / "checkpoints/000002" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    shown = trained.refused(4, f"000002/{name}: ", "resume", "runs/a", left=True)
    assert "damaged" in shown and "the checkpoint of step 1 is still there" in shown
    assert trained.steps() == [1, 2]
    trained.refused(4, f"000002/{name}: ", "sample", "runs/a", "--prompt", "it")
    trained.refused(4, f"000002/{name}: ", "compare", "runs/a", "model")
    # with the damaged one out of the way the older one serves
    (trained.run() / "checkpoints/000002").rename(trained.folder / "damaged")
    assert "resuming after iteration 1 of 4" in trained.done("resume", "runs/a")


@pytest.mark.parametrize("train", ["lora", "full"])
def test_checkpoints_that_are_not_there(project, train):
    project.done("train", project.config(model={"train": train}, run={"iterations": 1}))
    for name in ("000009", "latest"):
        words = f"checkpoints/{name}: no such checkpoint; there are: 000001"
        project.refused(3, words, "sample", f"runs/a/checkpoints/{name}", "--prompt", "it")
    assert project.done("sample", "runs/a/checkpoints/000001", "--prompt", "it", "--max-tokens", 2)


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_the_first_checkpoint(project, monkeypatch):
    monkeypatch.setattr(mx, "save_safetensors", full_disk)
    shown = project.refused(
        4, "checkpoints/000001: the checkpoint cannot be written", "train", project.config(), left=True
    )
    assert "No space left on device" in shown
    assert list((project.run() / "checkpoints").iterdir()) == []
    assert [row["step"] for row in project.metrics()] == [1]
    monkeypatch.undo()
    project.done("resume", "runs/a")
    project.done("train", project.config(run={"name": "b"}))
    assert project.metrics("a") == project.metrics("b") and project.checkpoints("a") == project.checkpoints("b")


def test_a_full_disk_later_leaves_the_last_checkpoint(trained, monkeypatch):
    before = trained.checkpoints()
    monkeypatch.setattr(checkpoint, "sync", full_disk)
    trained.refused(4, "000003: the checkpoint cannot be written", "resume", "runs/a", left=True)
    assert trained.checkpoints() == before
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", full_disk)
    trained.refused(4, "metrics.jsonl: cannot be written", "resume", "runs/a", left=True)
    monkeypatch.undo()
    assert trained.checkpoints() == before
    trained.done("resume", "runs/a")
    assert trained.steps() == [3, 4]


def test_a_full_disk_before_anything(project, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    config = project.config()
    project.refused(4, "runs: a run folder cannot be written here", "train", config)


@pytest.mark.parametrize(("job", "result"), [("sft", "adapters"), ("reward", "reward")])
def test_a_full_disk_at_the_finished_folder(project, monkeypatch, job, result):
    save, calls = mx.save_safetensors, []

    def fails_in_the_end(path, arrays, *rest, **options):
        if "checkpoints" not in path:
            calls.append(path)
            full_disk()
        save(path, arrays, *rest, **options)

    monkeypatch.setattr(mx, "save_safetensors", fails_in_the_end)
    project.refused(4, f"runs/a/{result}: cannot be written", job, project.config(job), left=True)
    assert len(calls) == 1 and not any(path.name.startswith(f".{result}") for path in project.run().iterdir())
    project.refused(3, "", "sample", "runs/a", "--prompt", "it")
    monkeypatch.undo()
    assert f"finished: runs/a/{result}" in project.done("resume", "runs/a")
    assert (project.run() / result / "adapters.safetensors").is_file()


def test_places_that_cannot_be_written(project):
    (project.folder / "file").write_text("")
    project.refused(4, "file: a run folder cannot be written here", "train", project.config(run={"folder": "file"}))
    deep = project.config(run={"folder": "deep/er/runs"}, model={"path": "nowhere"})
    project.refused(3, "nowhere: no such folder", "train", deep)
    project.done("train", project.config(run={"iterations": 1}))
    project.refused(3, "nowhere: no such folder", "train", project.config(model={"path": "nowhere"}))
    assert [path.name for path in (project.folder / "runs").iterdir()] == ["a"]


def test_damage_and_unwritable_places_are_found_before_a_model_is_loaded(trained, monkeypatch):
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mlx_ppo.train.load_roles", loads)
    (trained.folder / "file").write_text("")
    words = "file: a run folder cannot be written here"
    trained.refused(4, words, "train", trained.config(run={"folder": "file"}, model={"path": "nowhere"}))
    state = trained.run() / "checkpoints/000002/state.json"
    whole = state.read_bytes()
    state.write_bytes(whole[:-1])
    trained.refused(4, "000002/state.json: damaged", "resume", "runs/a")
    state.write_bytes(whole)
    (trained.run() / "lock").unlink()
    (trained.run() / "lock").mkdir()
    trained.refused(4, "runs/a: cannot be written (Is a directory)", "resume", "runs/a")


def test_a_read_only_file_system(trained):
    """In a user namespace, since a superuser may write wherever the file system lets him."""
    code = "import sys; from mlx_ppo.cli.main import main; sys.exit(main())"
    script = 'mount --bind runs runs && mount -o remount,bind,ro runs && exec "$0" -c "$@"'
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    before = trained.everything()
    for command, status, words in (
        (("train", "train.toml"), 4, "error: runs: a run folder cannot be written here ([Errno 30] Read-only"),
        (("resume", "runs/a"), 4, "error: runs/a: cannot be written (Read-only file system)"),
        (("verify", "runs/a"), 0, "everything is as recorded ("),
    ):
        arguments = ["unshare", "-rm", "sh", "-c", script, sys.executable, code, *command]
        shown = subprocess.run(arguments, cwd=trained.folder, capture_output=True, text=True, timeout=240)
        assert shown.returncode == status, shown
        assert (shown.stderr if status else shown.stdout).replace(f"{trained.folder}/", "").startswith(words), shown
        assert "Traceback" not in shown.stderr
    assert trained.everything() == before


def test_logs_that_cannot_be_written(project, monkeypatch):
    real = runs.Run.log

    def log(run, name, rows):
        with monkeypatch.context() as patch:
            if name == runs.METRICS:
                patch.setattr("builtins.open", full_disk)
            real(run, name, rows)

    monkeypatch.setattr(runs.Run, "log", log)
    project.refused(4, "runs/a/metrics.jsonl: cannot be written (No space left on device)", "train", project.config())
