"""What follows a run: a program's own callbacks, and TensorBoard's files."""

import importlib.util
import json

import pytest
from test_cli_resume import stop

from mlx_ppo import Callback, train_policy
from mlx_ppo.runs.folder import SAMPLES

EVALUATED = {"iterations": 4, "evaluate_every": 2}


class Notes(Callback):
    def __init__(self):
        self.rows, self.events = [], []

    def iteration(self, row):
        self.rows.append(dict(row))

    def evaluation(self, step, figures):
        self.events.append(("evaluation", step, figures["score"]))

    def health(self, finding):
        self.events.append((finding.rule, finding.step))

    def saved(self, step, folder):
        assert (folder / "manifest.json").exists()
        self.events.append(("saved", step))

    def ended(self):
        self.events.append(("ended",))


def test_a_callback_hears_what_is_logged(project):
    notes = Notes()
    config = project.config(run={**EVALUATED, "save_every": 2}, health={"unfinished": "warn"})
    folder = train_policy(config, [f"run.folder={project.folder / 'runs'}"], callbacks=[notes, Callback()])
    assert notes.rows == [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["score"] for row in project.samples() if row["kind"] == "summary"}
    told = [("evaluation", step, score) for step, score in scores.items()]
    assert notes.events == [told[0], told[1], ("saved", 2), ("unfinished", 4), ("saved", 4), told[2], ("ended",)]


def test_what_a_callback_raises_ends_the_run_whose_checkpoint_stands(project):
    class Impatient(Notes):
        def iteration(self, row):
            if row["step"] == 3:
                raise ZeroDivisionError

    impatient = Impatient()
    with pytest.raises(ZeroDivisionError):
        train_policy(project.config(), [f"run.folder={project.folder / 'runs'}"], callbacks=[impatient])
    assert project.steps() == [1, 2] and impatient.events[-1] == ("ended",)
    project.done("resume", "runs/a")
    assert project.steps()[-1] == 3


def scalars(folder):
    """Everything that TensorBoard reads from a folder: step and value by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_tensorboard_shows_the_log_and_a_resumed_run_no_row_twice(project):
    config = project.config(run=EVALUATED, log={"tensorboard": True})
    stop(project, "train", config, "a", at=2)
    project.done("resume", "runs/a")
    found = scalars(project.run() / "tensorboard")
    for key in ("score", "kl", "entropy", "score/letters"):
        assert found[key] == [(row["step"], pytest.approx(row[key])) for row in project.metrics()]
    summaries = [row for row in project.samples() if row["kind"] == "summary"]
    assert found["evaluation/score"] == [(row["step"], pytest.approx(row["score"])) for row in summaries]
    assert [row["step"] for row in summaries] == [0, 2, 4] and (project.run() / SAMPLES).exists()
    assert "everything is as recorded" in project.done("verify", "runs/a")


def test_tensorboard_that_is_not_installed_is_said_before_anything_is_written(project, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else real(name, *rest)
    )
    config = project.config(log={"tensorboard": True})
    project.refused(2, "log.tensorboard: TensorBoard isn't installed; pip install tensorboard", "train", config)
