"""`dpo` with `loss = "kto"`: answers judged one by one; the loss by brute force, resume, several processes, errors."""

import itertools
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load as load_by_mlx_lm
from test_cli_parallel import finished

from mlx_ppo import kto
from mlx_ppo.config.file import read_config
from mlx_ppo.config.supervised import DPOConfig
from mlx_ppo.data.judgements import Answer, mismatched
from mlx_ppo.errors import RunError
from mlx_ppo.reporting import Silent
from mlx_ppo.runs import checkpoint
from mlx_ppo.runtime.group import ALONE

ROWS = [
    {"prompt": "the film", "completion": " was very good", "rating": 5},
    {"prompt": "the film", "completion": " was bad", "rating": 1},
    {"prompt": "it is", "completion": " good", "rating": 4},
    {"prompt": "a", "completion": " story", "rating": 3},
    {"prompt": "it was not", "completion": " good and bad", "ratings": [1, 3]},
    {"prompt": "the story", "completion": " is good", "rating": 4},
]
JUDGED = [row for row in ROWS if row.get("rating") != 3]
GOOD = np.array([True, False, True, False, True])
PART = {"dpo": {"loss": "kto", "beta": 0.5, "epochs": 4, "batch_size": 2}, "data": {"train": "judged.jsonl"}}


@pytest.fixture(autouse=True)
def judged(project):
    project.jsonl("judged.jsonl", ROWS)


def by_hand(folder, adapters):
    """Log-probabilities [n, 2] in nats of each answer after its own and of the other answer after that prompt."""
    model, tokenizer = load_by_mlx_lm(str(folder), adapter_path=str(adapters) if adapters is not None else None)
    own = [
        Answer(
            (*tokenizer.encode(row["prompt"] + row["completion"]), tokenizer.eos_token_id),
            len(tokenizer.encode(row["prompt"])),
            row["prompt"],
        )
        for row in JUDGED
    ]

    def logprob(answer):
        logits = model(mx.array([answer.tokens[:-1]]))[0].astype(mx.float32)
        logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        return sum(logprobs[at - 1, answer.tokens[at]] for at in range(answer.start, len(answer.tokens)))

    return np.array([[logprob(one) for one in pair] for pair in zip(own, mismatched(own, 99, 0), strict=True)])


def test_the_figures_are_those_of_the_formula(project):
    shown = project.done("dpo", project.config("dpo", **PART))
    assert "ratings above 3 are good: 3, below bad: 2, at it 1, which are left out" in shown
    assert "a bad answer weighs 1.5, a good one 1" in shown and "finished: runs/a/adapters" in shown
    rows = project.metrics()
    assert len(rows) == 4 and rows[-1]["validation_loss"] < rows[0]["validation_loss"]
    best = min(rows, key=lambda row: row["validation_loss"])
    gained = by_hand(project.folder / "model", project.run() / "adapters")
    gained = gained - by_hand(project.folder / "model", None)
    moved = max(0.0, gained[:, 1].mean())
    assert moved > 0.01
    lead = 0.5 * (gained[:, 0] - moved)
    sign, weight = np.where(GOOD, 1.0, -1.0), np.where(GOOD, 1.0, 1.5)
    assert best["validation_loss"] == pytest.approx((weight / (1 + np.exp(sign * lead))).mean(), abs=1e-4)
    assert best["validation_accuracy"] == np.mean((lead > 0) == GOOD)
    own = gained[:, 0]
    assert best["validation_margin"] == pytest.approx(0.5 * (own[GOOD].mean() - own[~GOOD].mean()), abs=1e-4)
    assert best["validation_chosen"] == pytest.approx(own[GOOD].mean(), abs=1e-3) and best["validation_chosen"] > 0


def test_a_step_counts_from_where_the_policy_is(project):
    """With all answers in one step: the loss of a step is what was found at the end of the epoch before it."""
    config = project.config("dpo", **PART | {"dpo": PART["dpo"] | {"batch_size": 5}})
    project.done("dpo", config, "--set", "optimizer.learning_rate=0.02")
    rows = project.metrics()
    assert rows[0]["loss"] == pytest.approx((3 * 0.5 + 2 * 1.5 * 0.5) / 5, abs=1e-5)  # nothing has moved yet
    for before, after in itertools.pairwise(rows):
        assert after["loss"] == pytest.approx(before["validation_loss"], abs=1e-5)


def test_a_run_goes_on_to_the_same_bytes_and_several_processes_do_the_same(project):
    finished(project, "dpo", project.config("dpo", **PART, run={"keep_last": 99}))
    whole = project.checkpoints()
    shutil.copytree(project.run(), project.run("part"))
    checkpoint.remove_after(project.run("part"), 4)
    finished(project, "resume", project.run("part"))
    assert project.checkpoints("part") == whole and project.metrics("part") == project.metrics()
    two = project.config("dpo", **PART, run={"keep_last": 99}, parallel={"processes": 2, "patience": 60.0})
    assert "2 processes share every step" in finished(project, "dpo", two, "--set", "run.name=two")
    for first, second in zip(project.metrics(), project.metrics("two"), strict=True):
        assert first == pytest.approx(second, abs=1e-4, rel=1e-3)


def test_labels_pairs_and_a_threshold_of_ones_own(project):
    labels = [
        {"prompt": row["prompt"], "completion": row["completion"], "label": bool(row.get("rating", 0) > 3)}
        for row in ROWS
    ]
    project.jsonl("labels.jsonl", labels)
    shown = project.done("dpo", project.config("dpo", **PART, run={"name": "l"}), "--set", "data.train=labels.jsonl")
    assert "above 0.5 are good: 3, below bad: 3" in shown and "a bad answer weighs 1, " in shown
    project.jsonl("pairs.jsonl", [{"prompt": p, "chosen": " good", "rejected": " bad"} for p in ("it is", "a")])
    shown = project.done("dpo", project.config("dpo", **PART), "--set", "data.train=pairs.jsonl", "--dry-run")
    assert "training answers: 4" in shown and "pairs.jsonl: preferred answers are good: 2, others bad: 2" in shown
    mixed = ("--set", "data.validation=pairs.jsonl", "--set", "dpo.good_above=3.5", "--dry-run")
    assert "validation answers: 4" in project.done("dpo", project.config("dpo", **PART), *mixed)
    held_out = project.config("dpo", **PART, run={"name": "v"}, model={"train": "full"})
    shown = project.done("dpo", held_out, "--set", "dpo.good_above=4.5", "--set", "data.validation=judged.jsonl")
    assert shown.count("above 4.5 are good: 1, below bad: 5") == 2 and "finished: runs/v/model" in shown


def test_what_is_wrong_is_said_in_a_line(project):
    project.jsonl("same.jsonl", [{"prompt": "it", "completion": " good", "rating": 2}] * 2)
    for file, threshold, words in (
        ("same.jsonl", (), "ratings are from 2 to 2, so that with dpo.good_above at 2 no answer is good"),
        ("judged.jsonl", ("--set", "dpo.good_above=0.5"), "no answer is bad"),
        ("prompts.jsonl", (), "rating"),
    ):
        project.refused(3, words, "dpo", project.config("dpo", **PART), "--set", f"data.train={file}", *threshold)
    project.jsonl("pairs.jsonl", [{"prompt": "it is", "chosen": " good", "rejected": " bad"}])
    pairs = ("--set", "data.train=pairs.jsonl", "--set", "dpo.good_above=0.5")
    project.refused(2, "dpo.good_above", "dpo", project.config("dpo", **PART), *pairs)
    project.refused(2, "dpo.beta", "dpo", project.config("dpo", **PART), "--set", "dpo.beta=1e300")
    project.refused(2, "dpo.bad_weight", "dpo", project.config("dpo", **PART), "--set", "dpo.bad_weight=1e39")
    for key, loss in (("good_above=1.0", "sigmoid"), ("bad_weight=2.0", "ipo"), ("label_smoothing=0.1", "kto")):
        config = project.config("dpo", dpo={"loss": loss})
        project.refused(2, f"dpo.{key.split('=')[0]}", "dpo", config, "--set", f"dpo.{key}")


def test_figures_without_validation_are_of_both_kinds(project, monkeypatch):
    rows = [
        {"prompt": "it is", "completion": f" {'good' if good else 'bad'} story", "label": good}
        for good in (True,) * 520 + (False,) * 8
    ]
    project.jsonl("labels.jsonl", rows)
    project.done(
        "dpo", project.config("dpo", **PART | {"dpo": {"loss": "kto", "epochs": 1}}), "--set", "data.train=labels.jsonl"
    )
    row = project.metrics()[-1]
    assert row["validation_margin"] != pytest.approx(0.1 * row["validation_chosen"], abs=1e-6)


def test_a_step_has_both_kinds_where_length_goes_with_what_is_good(project):
    rows = [{"prompt": "it", "completion": " good" * (8 if good else 2), "label": good} for good in (True, False) * 16]
    project.jsonl("labels.jsonl", rows)
    part = PART | {"dpo": {"loss": "kto", "batch_size": 16}, "data": {"train": "labels.jsonl"}}
    job = kto.Job(read_config(DPOConfig, Path(project.config("dpo", **part))), Silent())
    for batch in job.task(ALONE).batches(0):
        assert 0 < job.train.good[list(batch.rows)].sum() < len(batch.rows)


def test_what_is_not_finite_is_no_movement_of_nothing():
    with pytest.raises(RunError, match="not finite"):
        kto._moved(np.array([np.nan, 1.0], np.float32))
    assert kto._moved(np.array([-3.0, 1.0], np.float32)) == 0.0
