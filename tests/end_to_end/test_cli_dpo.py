"""`dpo`: preferences without a reward model; the loss by brute force, resume, several processes, what it writes."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load as load_by_mlx_lm
from project import PROMPTS
from test_cli_parallel import finished

from mlx_ppo.runs import checkpoint

PAIRS = [
    {"prompt": "the film", "chosen": " was very good", "rejected": " was bad"},
    {"prompt": "it is", "chosen": " good", "rejected": " a bad bad story"},
    {"prompt": "a", "chosen": " very good story", "rejected": " bad film"},
    {"prompt": "it was not", "chosen": " bad", "rejected": " good and bad"},
    {"prompt": "the story", "chosen": " is good", "rejected": ""},
]


@pytest.fixture(autouse=True)
def pairs(project):
    project.jsonl("pairs.jsonl", PAIRS)


def by_hand(folder, adapters):
    """Of each pair, the answers' log-probabilities [p, 2] in nats, by stock mlx-lm."""
    model, tokenizer = load_by_mlx_lm(str(folder), adapter_path=str(adapters) if adapters is not None else None)
    found = []
    for pair in PAIRS:
        prompt, row = tokenizer.encode(pair["prompt"]), []
        for name in ("chosen", "rejected"):
            tokens = [*tokenizer.encode(pair["prompt"] + pair[name]), tokenizer.eos_token_id]
            logits = model(mx.array([tokens[:-1]]))[0].astype(mx.float32)
            logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            row.append(sum(logprobs[at - 1, tokens[at]] for at in range(len(prompt), len(tokens))))
        found.append(row)
    return np.array(found)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_figures_are_those_of_the_formula(project, loss):
    config = project.config("dpo", dpo={"loss": loss, "label_smoothing": 0.1 if loss == "sigmoid" else 0.0})
    shown = project.done("dpo", config)
    assert "reading 5 pairs by the reference" in shown and "finished: runs/a/adapters" in shown
    rows = project.metrics()
    assert len(rows) == 4 and rows[-1]["validation_loss"] < rows[0]["validation_loss"]
    best = min(rows, key=lambda row: row["validation_loss"])
    gained = by_hand(project.folder / "model", project.run() / "adapters")
    gained = gained - by_hand(project.folder / "model", None)
    lengths = np.array([[4, 3], [2, 5], [4, 3], [2, 4], [3, 1]])
    lead = gained[:, 0] - gained[:, 1]
    if loss == "ipo":
        per_token = gained / lengths
        expected = np.square(per_token[:, 0] - per_token[:, 1] - 1 / (2 * 0.5)).mean()
        lead = per_token[:, 0] - per_token[:, 1]
    else:
        expected = (0.9 * np.log1p(np.exp(-0.5 * lead)) + 0.1 * np.log1p(np.exp(0.5 * lead))).mean()
    assert best["validation_loss"] == pytest.approx(expected, abs=1e-4)
    assert best["validation_margin"] == pytest.approx(0.5 * lead.mean(), abs=1e-4)
    assert best["validation_chosen"] == pytest.approx(gained[:, 0].mean(), abs=1e-3)
    assert best["validation_accuracy"] == np.mean(lead > 0)


def test_a_run_goes_on_to_the_same_bytes_and_several_processes_do_the_same(project):
    finished(project, "dpo", project.config("dpo", run={"keep_last": 99}))
    whole = project.checkpoints()
    shutil.copytree(project.run(), project.run("part"))
    checkpoint.remove_after(project.run("part"), 4)
    finished(project, "resume", project.run("part"))
    assert project.checkpoints("part") == whole and project.metrics("part") == project.metrics()
    two = project.config("dpo", run={"keep_last": 99}, parallel={"processes": 2, "patience": 60.0})
    assert "2 processes share every step" in finished(project, "dpo", two, "--set", "run.name=two")
    for first, second in zip(project.metrics(), project.metrics("two"), strict=True):
        assert first == pytest.approx(second, abs=1e-4, rel=1e-3)


def test_what_comes_out_is_a_policy(project):
    project.done("dpo", project.config("dpo"))
    project.done("sample", "runs/a", "--prompt", "the film", "--max-tokens", 3)
    project.done("export", "runs/a", "fused", "--format", "fused")
    project.done("forgetting", "runs/a", "--text", "texts.jsonl")
    assert "everything is as recorded" in project.done("verify", "runs/a")
    project.done("report", "runs/a", "--output", "report.html")
    assert "chosen answers" in (project.folder / "report.html").read_text()
    full = project.config("dpo", model={"train": "full"}, data={"validation": "pairs.jsonl"}, run={"name": "full"})
    assert "finished: runs/full/model" in project.done("dpo", full)
    assert "training texts of pairs: 10" in project.done("dpo", full, "--dry-run", "--set", "run.name=dry")


def test_what_is_wrong_is_said_in_a_line(project):
    project.jsonl("same.jsonl", [{"prompt": "it", "chosen": " good", "rejected": " good"}])
    for file, words in (("same.jsonl", "'chosen' and 'rejected' are the same"), ("ratings.jsonl", "no field 'prompt'")):
        project.refused(3, words, "dpo", project.config("dpo", data={"train": file}))
    project.refused(2, "dpo.beta", "dpo", project.config("dpo", dpo={"beta": 0.0}))
    project.refused(2, "dpo.label_smoothing", "dpo", project.config("dpo", dpo={"label_smoothing": 0.5}))
    project.refused(2, "label_smoothing", "dpo", project.config("dpo", dpo={"loss": "ipo", "label_smoothing": 0.1}))


def test_from_a_policys_own_samples_to_the_frontier_of_a_run(project):
    """Best and worst sample of each prompt, DPO on them, and its policy by the run's scores and penalty."""
    upper = {"lora": {"layers": 1, "rank": 4}, "critic": {"kind": "head"}}  # the other policy changes all blocks
    project.done("train", project.config(run={"name": "ppo"}, kl={"coef": 0.1}, **upper))
    given = ("--prompts", "prompts.jsonl", "--n", 6, "--output", "own.jsonl", "--pairs")
    assert "the best and the worst of 6 of 6 prompts" in project.done("best-of", "runs/ppo", *given)
    rows = [json.loads(line) for line in (project.folder / "own.jsonl").read_text().splitlines()]
    assert all(row["chosen_score"] > row["rejected_score"] for row in rows)
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    project.refused(2, "--pairs: goes with --output", "best-of", "runs/ppo", "--pairs")
    project.done("dpo", project.config("dpo", data={"train": "own.jsonl"}, dpo={"epochs": 20}))
    asked = ("frontier", "runs/ppo", "--samples", 32, "--prompts", 3, "--json", "--policy")
    found, start = (json.loads(project.done(*asked, policy)) for policy in ("runs/a", "model"))
    assert found["of"] == "runs/a" and not (project.run("ppo") / "frontier.json").exists()
    assert found["policy"]["gain"][0] > 0.02 and found["policy"]["kl"][0] > 0.05
    assert abs(start["policy"]["kl"][0]) < 1e-4 and found["reference"] == start["reference"]
    config = project.config("dpo", data={"train": "own.jsonl"}, model={"train": "full"}, run={"name": "full"})
    project.done("dpo", config)
    assert json.loads(project.done(*asked, "runs/full/model"))["policy"]["kl"][0] > 0.01
    shown = project.done(
        "frontier", "runs/ppo", "--samples", 4, "--prompts", 3, "--policy", "runs/a", "--picture", "a.svg"
    )
    assert "and of the policy runs/a; penalty 0.1" in shown and (project.folder / "a.svg").exists()


def test_a_policy_of_another_model_has_no_place_on_a_runs_frontier(project, make_model):
    project.done("train", project.config(run={"name": "ppo"}, kl={"coef": 0.1}))
    other = make_model(seed=7)
    words = "its adapters lie on other weights"
    project.done("dpo", project.config("dpo", model={"path": str(other)}))
    project.refused(2, words, "frontier", "runs/ppo", "--policy", "runs/a")
    larger = make_model(num_hidden_layers=3)
    project.refused(2, "a policy of another model", "frontier", "runs/ppo", "--policy", larger)
    project.refused(3, "", "frontier", "runs/ppo", "--policy", "nothing")
