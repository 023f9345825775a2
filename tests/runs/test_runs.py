import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_ppo.config.rewards import RewardSource
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.config.supervised import SFTConfig
from mlx_ppo.errors import ConfigError, RunError
from mlx_ppo.runs import folder as runs
from mlx_ppo.runs import provenance
from mlx_ppo.runs.folder import Run, create_run, open_config, own_digest, replace_file, to_toml, undisturbed
from mlx_ppo.runs.provenance import Change, config_changes, device, differences, hashes, input_changes, input_paths

HOLDER = """
import sys, time
from pathlib import Path
from mlx_ppo.runs.folder import Run
with Run(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path):
    """A `train` configuration with inputs: two files, a folder (nothing deeper or hidden is read), reward code."""
    inputs = tmp_path / "inputs"
    (inputs / "model/sub").mkdir(parents=True)
    for name in ("prompts.jsonl", "model/config.json", "model/.DS_Store", "model/sub/tokens.txt", "f.py"):
        (inputs / name).write_text(name)
    return TrainConfig.model_validate(
        {
            "model": {"path": inputs / "model"},
            "data": {"prompts": inputs / "prompts.jsonl", "eval_prompts": inputs / "missing.jsonl"},
            "reward": [{"kind": "function", "function": f"{inputs}/f.py:score"}],
        }
    )


@pytest.fixture
def folder(config, tmp_path):
    return create_run(config, tmp_path / "runs", "a")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_folders_are_numbered_and_say_what_made_them(config, tmp_path):
    base = tmp_path / "deep/runs"
    assert [create_run(config, base, "a").name for _ in range(3)] == ["a", "a-2", "a-3"]
    (base / "a-4").write_text("a file in the way")
    assert create_run(config, base, "a").name == "a-5"
    assert create_run(config, base, "b").name == "b"
    record = json.loads((base / "a-5/run.json").read_text())
    assert record["command"] == "train" and {"mlx-ppo", "mlx", "mlx-lm", "numpy"} == record["versions"].keys()
    assert record["python"] and record["system"] and "device" not in record  # which the trainer notes
    assert record["configuration"] == (base / "a-5/config.toml").read_text() and record["record"] == own_digest(record)
    assert record["inputs"] == {
        str(tmp_path / "inputs" / name): hashlib.sha256(name.encode()).hexdigest()
        for name in ("prompts.jsonl", "model/config.json", "f.py")
    }
    assert open_config(base / "a-5") == config.model_copy(
        update={"run": config.run.model_copy(update={"folder": base / "a-5/runs"})}
    )


def test_folders_are_private_whatever_the_umask_and_files_under_that_of_the_command_line(config, tmp_path):
    for umask in (0, 0o022, 0o077):
        before = os.umask(umask)
        try:
            folder = create_run(config, tmp_path / "runs", f"a{umask}")
            with Run(folder) as run:
                run.log(runs.METRICS, [{"step": 1}])
                run.log(runs.SAMPLES, [{"step": 1}])
                run.cut_logs(0)
        finally:
            os.umask(before)
        assert mode(folder) == 0o700
    assert {path.name: mode(path) for path in folder.iterdir()} == dict.fromkeys(
        (runs.CONFIG, runs.RECORD, runs.METRICS, runs.SAMPLES, runs.LOCK), 0o600
    )


@pytest.mark.parametrize("place", ["file", "file/sub", "/proc/nowhere", "x" * 300])
def test_a_place_that_cannot_be_written(config, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="a run folder cannot be written here") as caught:
        create_run(config, tmp_path / place, "a")
    assert str(caught.value).startswith(str(tmp_path / place)) and "\n" not in str(caught.value)


def test_nothing_is_left_where_the_disk_is_full_or_a_path_cannot_be_recorded(config, tmp_path, monkeypatch):
    odd = config.model_copy(update={"reward": (RewardSource(kind="model", path=Path("\udcff")),)})
    with pytest.raises(RunError, match="utf-8"):
        create_run(odd, tmp_path / "runs", "a")
    with monkeypatch.context() as patch:
        fails = (OSError(5, "Input/output error", str(tmp_path / "inputs/model/config.json")),)
        patch.setattr(provenance, "sha256", lambda path: (_ for _ in fails).throw(*fails))
        with pytest.raises(RunError, match=r"inputs/model/config\.json: cannot be read \(Input/output error\)"):
            create_run(config, tmp_path / "runs", "a")
    for function in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(runs.os, function, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(RunError, match=r"cannot be written here .*No space left"):
                create_run(config, tmp_path / "runs", "a")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_second_process_is_refused_and_told_the_firsts_id(folder):
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match=rf"another process \(pid {holder.pid}\) is working in this run"):
            Run(folder)
        assert (folder / runs.LOCK).read_text() == f"{holder.pid}\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    # The file stays behind with a dead process's id, and is no hindrance.
    assert (folder / runs.LOCK).read_text() == f"{holder.pid}\n"
    with Run(folder):
        assert (folder / runs.LOCK).read_text() == f"{os.getpid()}\n"
        with pytest.raises(RunError, match=f"pid {os.getpid()}"):
            Run(folder)
    assert (folder / runs.LOCK).read_text() == ""
    with Run(folder):
        pass


def test_a_lock_that_cannot_be_made(folder):
    (folder / runs.LOCK).mkdir()
    for place in (folder, folder / "nowhere"):
        with pytest.raises(RunError, match=r"cannot be written"):
            Run(place)


def test_logs_are_cut_after_the_checkpoint(folder):
    # A completion may hold line ends that aren't the log's: U+2028, U+0085; a kill may end it in half a character.
    texts = ["a", "b\u2028c\u2029\x85\x0b\x1c", "line\r\nend\n", "ü", "e"]
    with Run(folder) as run:
        for step, text in enumerate(texts):
            run.log(runs.SAMPLES, [{"step": step, "text": text}, {"step": step, "text": text + "2"}])
        whole = (folder / runs.SAMPLES).read_bytes()
        (folder / runs.SAMPLES).write_bytes(whole + '{"step": 0, "text": "ü'.encode()[:-1])
        run.cut_logs(99)
        assert (folder / runs.SAMPLES).read_bytes() == whole
        run.cut_logs(2)
        rows = [json.loads(line) for line in (folder / runs.SAMPLES).read_text("utf-8").split("\n")[:-1]]
        assert [(row["step"], row["text"]) for row in rows] == [
            (step, text + end) for step, text in enumerate(texts[:3]) for end in ("", "2")
        ]
        run.cut_logs(-1)
        assert (folder / runs.SAMPLES).read_bytes() == b"" and not (folder / runs.METRICS).exists()


@pytest.mark.parametrize("line", [b'{"step": 0}', b'{"step": NaN}\n', b"[]\n", b"\n", b'{"step": null}\n', b"\xff\n"])
def test_lines_that_are_no_rows_are_dropped(folder, line):
    good = b'{"step": 0}\n'
    for content, kept in ((good + line, good), (line + good if line.endswith(b"\n") else good, good)):
        (folder / runs.METRICS).write_bytes(content)
        with Run(folder) as run:
            run.cut_logs(5)
        assert (folder / runs.METRICS).read_bytes() == kept


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_replacement_keeps_the_old_content_and_leaves_nothing(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.json"
    replace_file(path, "old\n")
    with monkeypatch.context() as patch:
        patch.setattr(runs.os, failing, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RunError, match=r"a\.json: cannot be written \(No space left on device\)"):
            replace_file(path, "new")
    assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]
    replace_file(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_log_that_cannot_be_written(folder):
    (folder / runs.METRICS).symlink_to("/dev/full")
    with Run(folder) as run, pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written \(No space left"):
        run.log(runs.METRICS, [{"step": 1}])


def changes_of(config, folder):
    return input_changes(runs.read_record(folder), hashes(input_paths(config)))


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("model/config.json", lambda path: path.write_text("other"), "changed"),
        ("model/config.json", Path.unlink, "missing"),
        ("model/model-00002.safetensors", lambda path: path.write_text(""), "added"),
        ("prompts.jsonl", lambda path: path.write_text("prompts.jsonl "), "changed"),
        ("f.py", lambda path: path.write_text(""), "changed"),
    ],
)
def test_changed_inputs_are_named(config, folder, tmp_path, name, change, what):
    (tmp_path / "inputs/model/.DS_Store").write_text("a file manager was here")
    (tmp_path / "inputs/other.jsonl").write_text("beside the data, which isn't a folder that is read")
    assert changes_of(config, folder) == []
    change(tmp_path / "inputs" / name)
    assert changes_of(config, folder) == [Change(str(tmp_path / "inputs" / name), what)]


def test_inputs_that_a_changed_configuration_names_or_leaves_out(config, folder, tmp_path):
    (tmp_path / "inputs/new").mkdir()
    (tmp_path / "inputs/new/f.py").write_text("")
    reward = (config.reward[0].model_copy(update={"function": f"{tmp_path}/inputs/new/f.py:score"}),)
    changed = config.model_copy(update={"reward": reward})
    assert changes_of(changed, folder) == [Change(str(tmp_path / "inputs/f.py"), "left out")]


def test_a_changed_configuration_is_shown_key_by_key(config, folder):
    record, text = runs.read_record(folder), (folder / runs.CONFIG).read_text()
    assert config_changes(record, text) == []
    assert config_changes(record, "# a note\n" + text.replace(" = ", "=")) == []
    edited = text.replace("seed = 0", "seed = 1").replace("epochs = 2\n", "").replace("weight = 1.0", "weight = 2.0")
    assert config_changes(record, edited + "[more]\nlist = [1, 2]\n") == [
        "- run.seed = 0", "+ run.seed = 1",
        "- reward.0.weight = 1.0", "+ reward.0.weight = 2.0",
        "- ppo.epochs = 2",
        "+ more.list = [1, 2]",
    ]  # fmt: skip
    for damaged in ({}, {"configuration": 3}, {"configuration": "[run"}):
        with pytest.raises(RunError, match=r"run\.json: the configuration that the run was started with is missing"):
            config_changes(damaged, text)


def test_other_software_or_another_device_is_told(folder):
    record = runs.read_record(folder)
    assert differences(record) == [] and differences({}) == []
    record["versions"]["mlx"], record["device"] = "0.1", "GPU: Apple M9"
    assert differences(record) == [
        f"mlx 0.1 -> {runs.read_record(folder)['versions']['mlx']}",
        f"device GPU: Apple M9 -> {device()}",
    ]


def test_a_record_keeps_what_is_noted_and_its_own_digest(folder):
    with Run(folder) as run:
        (folder / "reward").mkdir()
        for name in ("plan.json", "reward/a", "reward/b"):
            (folder / name).write_text(name)
        run.note_files(folder / "plan.json")
        run.note_files(folder / "reward")
        assert run.record()["files"].keys() == {"plan.json", "reward/a", "reward/b"}
        (folder / "reward/a").unlink()
        run.note_files(folder / "reward")
        record = run.record()
        assert record["files"] == {
            name: hashlib.sha256(name.encode()).hexdigest() for name in ("plan.json", "reward/b")
        }
        assert record["record"] == own_digest(record) and record["inputs"]
        assert own_digest({**record, "command": "sft"}) != record["record"]


def test_a_run_that_is_read_is_left_alone(folder):
    with undisturbed(folder):
        pass
    assert not (folder / runs.LOCK).exists()
    with Run(folder), pytest.raises(RunError, match=f"pid {os.getpid()}"), undisturbed(folder):
        pass
    with undisturbed(folder), undisturbed(folder), pytest.raises(RunError, match="another process"):
        Run(folder)


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_is_gone_is_not_written_to(config, folder, again):
    with Run(folder) as run:
        run.log(runs.METRICS, [{"step": 1}])
        run.secure()
        folder.rename(folder.with_name("moved"))
        if again:  # another run has its name now
            with Run(create_run(config, folder.parent, "a")):
                pass
        with pytest.raises(RunError, match=r"runs/a: was removed or replaced while this process worked in it"):
            run.secure()


def test_what_killed_processes_left_goes(config, folder):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    number = int(dead.stdout)
    for name in (f".metrics.jsonl.{number}", ".run.json.1", ".notes.2024"):
        (folder / name).write_text("half")
    (folder / f".reward.{number}").mkdir()
    for name in (f".a.{number}", f".a.{os.getppid()}", ".a.x"):
        (folder.parent / name).mkdir()
    with Run(folder):
        assert {path.name for path in folder.iterdir()} == {runs.CONFIG, runs.RECORD, runs.LOCK, ".notes.2024"}
    create_run(config, folder.parent, "a")
    assert {path.name for path in folder.parent.iterdir()} == {"a", "a-2", f".a.{os.getppid()}", ".a.x"}


def test_half_an_evaluation_is_cut(folder):
    """As after a kill while the last evaluation was written: its rows are of the checkpoint's step."""
    rows = [{"step": 0, "kind": "evaluation"}, {"step": 0, "kind": "summary"}, {"step": 1, "kind": "rollout"}]
    with Run(folder) as run:
        run.log(runs.SAMPLES, [*rows, {"step": 1, "kind": "evaluation"}])
        run.cut_logs(1)
        assert [json.loads(line) for line in (folder / runs.SAMPLES).read_text().splitlines()] == rows


def test_what_is_no_run_is_refused(folder, tmp_path):
    (folder.parent / "aa.bak").mkdir()
    with pytest.raises(ConfigError, match=rf"runs/aa: not a run folder\. Did you mean '{folder}'\?$"):
        open_config(folder.parent / "aa")
    with pytest.raises(ConfigError, match=r"not a run folder$"):
        open_config(tmp_path / "nowhere/b")
    (folder / runs.RECORD).write_text('{"command": "dance"}')
    with pytest.raises(ConfigError, match=r"run\.json: unknown command 'dance'"):
        open_config(folder)
    for content in (b"{", b"\xff", b"[]"):
        (folder / runs.RECORD).write_bytes(content)
        with pytest.raises(RunError, match=r"run\.json: cannot be read"):
            open_config(folder)


def test_a_configuration_as_toml():
    config = SFTConfig.model_validate(
        {"model": {"path": Path('/a"b\\c\x7f\t😀é')}, "data": {"train": Path("/t")}, "lora": {"targets": ("q", "k")}}
    )
    text = to_toml(config)
    assert text.startswith('[run]\nfolder = "runs"\nname = "sft"\nseed = 0\n') and text.endswith("\n")
    assert '[model]\npath = "/a\\"b\\\\c\\u007f\\t😀é"\ntrain = "lora"\n' in text and "adapter" not in text
    assert 'targets = ["q", "k"]\n' in text and "eps = 1e-05\n" in text
