"""`forgetting`: perplexity before and after, of every kind of run."""

import json
import math
import re

import pytest
from project import PROMPTS


def _found(project, *arguments):
    return json.loads(project.done("forgetting", *arguments, "--json"))


def test_a_run_that_was_trained_hard_forgets_and_says_so(project):
    project.done("sft", project.config("sft", sft={"epochs": 12}, optimizer={"learning_rate": 2e-2}))
    project.jsonl("other.jsonl", [{"text": "bad bad bad it bad"}] * 4)
    begun = {"model": {"adapter": "runs/a/adapters"}, "run": {"name": "b"}, "optimizer": {"learning_rate": 0.05}}
    project.done("sft", project.config("sft", data={"train": "other.jsonl"}, sft={"epochs": 8}, **begun))
    (project.folder / "texts.txt").write_text("\n\n".join(PROMPTS * 3))
    shown = project.done("forgetting", "runs/b", "--text", "texts.txt")
    assert shown.startswith("texts.txt: 18 paragraphs, ") and " tokens in windows of 512\n" in shown
    assert shown.endswith("by paragraphs: worse\n")
    assert "bundled English: 26 paragraphs, " in project.done("forgetting", "runs/b", "--tokens", 100000)
    found = _found(project, "runs/b", "--text", "texts.txt")
    assert found["difference"]["low"] > 0 and found["before"]["nats"] < found["after"]["nats"]
    assert found["after"]["perplexity"] == pytest.approx(math.exp(found["after"]["nats"]))
    nats = found["after"]["nats"] - found["before"]["nats"]
    assert found["difference"]["nats"] == pytest.approx(nats)
    assert re.search(rf"\nbefore +{found['before']['nats']:.4f} ", shown)
    own = _found(project, "runs/b", "--base", "runs/b")
    assert own["difference"] == {"nats": 0, "low": 0, "high": 0}
    assert "no difference can be told" in project.done("forgetting", "runs/b", "--base", "runs/b")
    first = project.run("b") / "checkpoints" / f"{project.steps('b')[0]:06d}"
    assert _found(project, first, "--text", "texts.txt")["after"] != found["after"]
    assert _found(project, "runs/b", "--text", "texts.txt", "--base", "runs/a") == {**found, "base": "runs/a"}


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_sft_is_better_on_what_it_learned(project, full):
    model = {"train": "full" if full else "lora"}
    project.done("sft", project.config("sft", model=model, sft={"epochs": 8}, optimizer={"learning_rate": 2e-2}))
    found = _found(project, "runs/a", "--text", "texts.jsonl")
    assert found["rows"] == 6 and found["difference"]["high"] < 0
    assert found["after"]["nats"] == pytest.approx(project.metrics()[-1]["validation_loss"], rel=0.2)
    assert project.done("forgetting", "runs/a", "--text", "texts.jsonl").endswith(
        "by rows: better; 6 rows are few for an interval\n"
    )
    if full:
        same = _found(project, "runs/a/model", "--base", "model", "--text", "texts.jsonl")
        assert same["difference"] == pytest.approx(found["difference"])


def test_what_a_run_began_from_is_its_adapter(project):
    project.done("sft", project.config("sft", optimizer={"learning_rate": 2e-2}))
    project.done(
        "train",
        project.config(model={"adapter": "runs/a/adapters"}, run={"name": "b"}, optimizer={"learning_rate": 1e-9}),
    )
    first, second = _found(project, "runs/a"), _found(project, "runs/b")
    assert second["before"] == first["after"] != first["before"]
    assert second["difference"]["nats"] == pytest.approx(0, abs=1e-5)


def test_long_texts_and_single_ones(project):
    (project.folder / "long.txt").write_text("\n\n".join(["the film was a very good story"] * 40))
    given = ("model", "--base", "model", "--text", "long.txt")
    found = _found(project, *given, "--window", 8, "--tokens", 100)
    assert found["window"] == 8 and found["tokens"] == 99 and found["left_out"] > 100
    assert "are left out (--tokens)" in project.done("forgetting", *given, "--tokens", 100)
    (project.folder / "one.txt").write_text("the film")
    shown = project.done("forgetting", "model", "--base", "model", "--text", "one.txt")
    assert shown.endswith("one of the paragraphs alone has no interval\n")
    assert _found(project, "model", "--base", "model", "--text", "one.txt")["difference"]["low"] is None


def test_what_cannot_be_measured(project, make_model, reward_folders):
    project.refused(2, "--base: name the model folder", "forgetting", "model")
    project.refused(3, "nothing: no such folder", "forgetting", "model", "--base", "nothing")
    project.refused(3, "no.txt: no such file", "forgetting", "model", "--base", "model", "--text", "no.txt")
    project.refused(2, "--window: 100000 tokens, and", "forgetting", "model", "--base", "model", "--window", 100000)
    project.refused(3, "a reward model gives scores", "forgetting", reward_folders["adapters"].parent)
    (project.folder / "empty.txt").write_text("\n")
    project.refused(3, "has no text", "forgetting", "model", "--base", "model", "--text", "empty.txt")
    random = {"initialise": "random", "train": "full"}
    project.done("sft", project.config("sft", model=random, sft={"epochs": 1}))
    project.refused(2, "began from random weights", "forgetting", "runs/a")
    assert "difference" in project.done("forgetting", "runs/a", "--base", "model")
