"""`verify`: nothing to say of a sound run, a line for each file that isn't as recorded, and nothing written."""

import json
import random
import re
import shutil

import pytest

from mlx_ppo.errors import RunError
from mlx_ppo.runs.folder import Run
from mlx_ppo.runs.verification import verify_run


@pytest.fixture
def trained(project):
    """Three iterations, with the model's folder inside the project."""
    (project.folder / "model").rename(project.folder / "link")
    shutil.copytree(project.folder / "link", project.folder / "model")
    project.done("train", project.config())
    return project


def sound(project, *arguments):
    """What `verify` says of a run that is in order: notes and the last line. Nothing changes."""
    before = project.everything()
    shown = project.done("verify", *(arguments or ("runs/a",))).splitlines()
    assert re.fullmatch(r"everything is as recorded \(\d+ files\)", shown[-1])
    assert project.everything() == before
    return shown


def unsound(project, *wanted, whole=False):
    """Every line that `verify` prints of a run that isn't in order; the wanted ones are among them, or are all."""
    before = project.everything()
    result = project.cli("verify", "runs/a")
    assert result.exit_code == 4 and isinstance(result.exception, SystemExit), result.output
    assert project.everything() == before
    lines = result.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines) and "as recorded (" not in result.stdout
    for words in wanted:
        assert sum(words in line for line in lines) == 1, lines
    assert not whole or len(lines) == len(wanted), lines


def test_sound_runs(project):
    project.done("train", project.config())
    assert sound(project) == ["everything is as recorded (27 files)"]
    assert not (project.run() / "lock").read_text()
    project.done("sft", project.config("sft", run={"name": "s"}))
    project.done("reward", project.config("reward", run={"name": "r"}))
    for name in ("s", "r"):
        sound(project, f"runs/{name}")
    (project.run() / "lock").unlink()  # as in a copy
    (project.run() / "notes.txt").write_text("my own")
    sound(project)
    project.refused(2, "runs/aa: not a run folder", "verify", "runs/aa")


def test_a_run_that_a_process_works_in(trained):
    with Run(trained.run()):
        trained.refused(4, "runs/a: another process (pid", "verify", "runs/a")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(before, after):
    return lambda path: path.write_text(path.read_text().replace(before, after, 1))


SPOILS = {
    "checkpoints/000003/state.json": [(flip, "damaged (its SHA-256"), (lambda path: path.unlink(), "missing")],
    "checkpoints/000002/adapters.safetensors": [(flip, "damaged (its SHA-256")],
    "checkpoints/000002/manifest.json": [(flip, "missing or damaged"), (lambda path: path.unlink(), "missing or d")],
    "checkpoints/000003/more.safetensors": [(lambda path: path.write_bytes(b""), "doesn't belong to the checkpoint")],
    "checkpoints/backup": [(lambda path: path.mkdir(), "doesn't belong here")],
    "run.json": [(edit('"train"', '"trail"'), "damaged (its SHA-256"), (edit('"inputs"', '"imputs"'), "damaged (its")],
    "config.toml": [
        (edit("epochs = 2", "epochs = 3"), "changed (ppo.epochs)"),
        (edit("\n", "\n\n"), "config.toml: changed"),
        (edit("epochs = 2", "epoch = 2"), "config.toml: changed"),
        (edit("[run]", "[run"), "config.toml: changed"),
        (lambda path: path.write_bytes(b"\xff"), "config.toml: changed"),
        (lambda path: path.unlink(), "cannot be read (No such file"),
    ],
    "plan.json": [(edit("{", ""), "not a plan")],
    "metrics.jsonl": [
        (edit("{", ""), "metrics.jsonl:1: not a row"),
        (edit('{"step": 2', '{"step": 9'), "metrics.jsonl:2: step 9 where 2 belongs"),
        (lambda path: path.write_text("".join(path.read_text().splitlines(True)[1:])), "step 2 where 1 belongs"),
        (lambda path: path.write_text("".join(path.read_text().splitlines(True)[:1])), "ends at step 1, but the last"),
    ],
    "memory.jsonl": [
        (lambda path: path.write_text(path.read_text() + '{"step": 4}\n{"step": 5}\n'), "jsonl:5: a row of step 5, but")
    ],
    "samples.jsonl": [
        (edit('{"step": 0', '{"step": 3'), "samples.jsonl:2: step 0 after step 3"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\xff\n"), "not a row"),
    ],
    "../../prompts.jsonl": [
        (edit("film", "filn"), "prompts.jsonl: changed since"),
        (lambda path: path.unlink(), "prompts.jsonl: missing"),
    ],
    "../../rule.py": [(edit("letters", "lettres"), "rule.py: changed since")],
    "../../model/model.safetensors": [(flip, "model.safetensors: changed since")],
    "../../model/tokenizer.json": [(edit("film", "filn"), "tokenizer.json: changed since")],
    "../../model/extra.safetensors": [(lambda path: path.write_bytes(b""), "extra.safetensors: added since")],
}


def test_every_file_that_differs_is_named(trained):
    for name, spoils in SPOILS.items():
        file = (trained.run() / name).resolve()
        content = file.read_bytes() if file.exists() else None
        for spoil, words in spoils:
            spoil(file)
            unsound(trained, words, whole=True)
            unsound(trained, str(file) if name.startswith("..") else f"error: runs/a/{name}", whole=True)
            if content is not None:
                file.write_bytes(content)
            elif file.is_dir():
                file.rmdir()
            else:
                file.unlink()
    sound(trained)


LOGGED = ("metrics.jsonl", "samples.jsonl", "memory.jsonl", "responses.jsonl", "plan.json")


def test_logs_and_a_plan_that_are_gone_are_named_by_both_commands(trained):
    for name in LOGGED:
        (trained.run() / name).unlink()
    unsound(trained, *(f"runs/a/{name}: missing" for name in LOGGED), whole=True)
    told = trained.cli("resume", "runs/a")
    assert told.exit_code == 0
    assert told.stderr.count("missing; its rows are lost") == 4
    assert "plan.json: missing; a new plan is made, and results may differ in the last digits" in told.stderr


def test_all_at_once_a_line_each(trained):
    for name in ("checkpoints/000003/state.json", "checkpoints/000003/critic.safetensors", "config.toml"):
        flip(trained.run() / name)
    (trained.run() / "checkpoints/000002").rename(trained.run() / "checkpoints/000009")
    (trained.folder / "rule.py").unlink()
    unsound(
        trained,
        "000003/state.json: damaged",
        "000003/critic.safetensors: damaged",
        "config.toml: changed",
        "000009: holds the checkpoint of step 2",
        "rule.py: missing",
    )


def test_what_a_kill_leaves_is_noted_and_no_damage(trained):
    for name in (".000004.new", ".000001.gone"):
        shutil.copytree(trained.run() / "checkpoints/000003", trained.run() / "checkpoints" / name)
    with open(trained.run() / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "sc')
    notes = sound(trained)[:-1]
    assert len(notes) == 3 and all(note.startswith("note: runs/a/") for note in notes)
    assert "ends in half a row" in notes[-1]
    trained.done("resume", "runs/a")
    assert len(sound(trained)) == 1


@pytest.mark.parametrize(("job", "result"), [("sft", "adapters"), ("reward", "reward")])
def test_finished_folders(project, job, result):
    project.done(job, project.config(job))
    folder = project.run() / result
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        content = (folder / name).read_bytes()
        flip(folder / name)
        unsound(project, f"{result}/{name}: damaged", whole=True)
        (folder / name).unlink()
        unsound(project, f"{result}/{name}: missing", whole=True)
        (folder / name).write_bytes(content)
    (folder / "more.safetensors").write_bytes(b"")
    unsound(project, f"{result}/more.safetensors: doesn't belong here", whole=True)
    (folder / "more.safetensors").unlink()
    record = json.loads((project.run() / "run.json").read_text())
    with Run(project.run()) as run:  # as after a kill just before the end
        run.note(files={})
    assert sound(project)[0] == f"note: runs/a/{result}: written, but not recorded; the next resume writes it again"
    project.done("resume", "runs/a")
    assert len(sound(project)) == 1 and json.loads((project.run() / "run.json").read_text()) == record


def test_a_record_with_any_changed_byte_is_damaged_and_no_riddle(trained):
    file, generator = trained.run() / "run.json", random.Random(0)
    whole = file.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(damaged))] ^= generator.randrange(1, 256)
        if json_of(bytes(damaged)) == json.loads(whole):
            continue  # white space
        file.write_bytes(damaged)
        try:
            lines = verify_run(trained.run()).problems
        except RunError as error:
            lines = (str(error),)
        assert lines[0].startswith(f"{file}: "), lines
    file.write_text('{"inputs": []}')
    trained.refused(4, "run.json: cannot be read ('inputs' is not", "verify", "runs/a", left=True)


def json_of(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_changed_bytes_of_the_last_checkpoint_are_named_by_both_commands(trained):
    """A few through the command line; 1,000 in tests/test_checkpoint_faults.py."""
    folder, generator = trained.run() / "checkpoints/000003", random.Random(1)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for _ in range(4):
            damaged = bytearray(whole)
            damaged[generator.randrange(len(damaged))] ^= generator.randrange(1, 256)
            file.write_bytes(damaged)
            unsound(trained, f"runs/a/checkpoints/000003/{file.name}: ", whole=True)
            trained.refused(4, f"runs/a/checkpoints/000003/{file.name}: ", "resume", "runs/a")
        file.write_bytes(whole)
    sound(trained)


@pytest.mark.parametrize("change", ["good", None], ids=["changed", "missing"])
def test_what_a_reward_function_read_is_part_of_the_record(project, change):
    (project.folder / "words.txt").write_text("film")
    (project.folder / "rule.py").write_text(
        "WORD = open(__file__.replace('rule.py', 'words.txt')).read()\n"
        "def letters(prompts, completions):\n    return [text.count(WORD) + len(text) / 10 for text in completions]\n"
    )
    project.done("train", project.config(run={"iterations": 2}))
    project.done("verify", "runs/a")
    (project.folder / "words.txt").write_text(change) if change else (project.folder / "words.txt").unlink()
    what = "changed" if change else "missing"
    shown = project.cli("verify", "runs/a")
    assert shown.exit_code == 4 and f"words.txt: {what} since a reward function read it" in shown.stderr
    project.refused(4, f"words.txt (read by a reward function): {what} since", "resume", "runs/a")
    if change:
        shown = project.cli("resume", "runs/a", "--allow-config-change")
        assert shown.exit_code == 0 and "words.txt (read by a reward function): changed since" in shown.stderr
        assert "everything is as recorded" in project.done("verify", "runs/a")


@pytest.mark.parametrize("how", ["project", "project, run elsewhere", "inputs"])
def test_a_project_that_was_moved_goes_on(project, how):
    """The whole folder; the same where the run lies outside it; inputs alone, with config.toml corrected."""
    (project.folder / "words.txt").write_text("film")
    (project.folder / "rule.py").write_text(
        "WORD = open(__file__.replace('rule.py', 'words.txt')).read()\n"
        "def letters(prompts, completions):\n    return [text.count(WORD) + len(text) / 10 for text in completions]\n"
    )
    home, inputs = project.folder / "home", ("prompts.jsonl", "rule.py", "words.txt", "model", "train.toml")
    home.mkdir()
    project.config(run={"iterations": 1, "folder": "../runs" if how == "project, run elsewhere" else "runs"})
    for name in inputs:
        (project.folder / name).rename(home / name)
    project.done("train", home / "train.toml")
    new = project.folder / ("home/inner" if how == "inputs" else "moved/home")
    new.parent.mkdir(exist_ok=True)
    if how == "project":
        home.rename(new)
        run = new / "runs/a"
    elif how == "project, run elsewhere":
        home.rename(new)
        (project.folder / "runs").rename(new.parent / "runs")
        run = new.parent / "runs/a"
    else:
        new.mkdir()
        for name in inputs:
            (home / name).rename(new / name)
        run = home / "runs/a"
        text = (run / "config.toml").read_text()
        (run / "config.toml").write_text(text.replace(f"{home}/", f"{new}/").replace(f"{new}/runs", f"{home}/runs"))
        (new / "words.txt").rename(home / "words.txt")
        (new / "words.txt").write_text("film")
        project.done("resume", run, "--allow-config-change")
    assert project.done("sample", run, "--prompt", "the film", "--max-tokens", 2).startswith("the film")
    assert "everything is as recorded" in project.done("verify", run)
    project.done("resume", run)
    project.done("export", run, project.folder / "exported", "--format", "adapters")
    file = run.parent.parent / "rule.py" if how == "project" else new / "rule.py"
    file.write_text(file.read_text() + "# edited")
    project.refused(4, "rule.py: ", "resume", run, left=True)
