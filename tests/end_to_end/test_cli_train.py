"""`mlx-ppo train` from configuration to finished run."""

import json
import math
import shutil
import stat
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ppo.cli.display import harmless
from mlx_ppo.runs.metrics import BY_KEY

EXTRA = {"seconds", "tokens_per_second"}


def stock_text(model, checkpoint, prompt, *, tokens):
    """Greedy text from mlx-lm alone, adapters and all."""
    from mlx_lm import load, stream_generate

    network, tokenizer = load(str(model), adapter_path=str(checkpoint))
    written = [part.token for part in stream_generate(network, tokenizer, prompt, max_tokens=tokens)]
    assert len(written) == tokens
    return tokenizer.decode(tokenizer.encode(prompt) + written, skip_special_tokens=True)


def modes(folder: Path):
    for item in (folder, *folder.rglob("*")):
        yield item.relative_to(folder), stat.S_IMODE(item.stat().st_mode), item.is_dir()


def test_a_run_leaves_everything_that_is_promised(project):
    shown = project.done("train", project.config(run={"iterations": 5, "evaluate_every": 2}))
    assert "run folder: runs/a\n" in shown and "policy: runs/a/checkpoints/000005\n" in shown
    assert "iteration 5/5" in shown and "before" in shown and "after" in shown
    folder = project.run()
    names = {item.name for item in folder.iterdir()}
    assert names == {
        "config.toml",
        "run.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoints",
        "lock",
        "plan.json",
        "memory.jsonl",
        "responses.jsonl",
        "health.jsonl",  # the tiny model never ends a text
    }
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert row.keys() >= EXTRA and all(math.isfinite(value) for value in row.values())
        assert {
            key for key in row if not key.startswith(("score/", "points/", "deviation/", "beyond/", "seconds/"))
        } <= BY_KEY.keys() | {"step"}
        phases = {key: value for key, value in row.items() if key.startswith("seconds/")}
        assert {"seconds/rollout", "seconds/score policy", "seconds/update policy"} <= phases.keys()
        assert all(value > 0 for value in phases.values()) and sum(phases.values()) <= row["seconds"]
        assert 0 < row["seconds"] < 100 and row["tokens_per_second"] > 0
        assert row["ratio_error"] < 1e-4 and row["logprob_error"] < 1e-4
        assert row["total_reward"] == pytest.approx(row["score"] - row["kl_coef"] * row["kl"])
        assert row["score_low"] <= row["score_median"] <= row["score_high"]
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows) and abs(
        rows[-1]["time"] - time.time()
    ) < 100
    each = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in each] == [1, 2, 3, 4, 5]
    for row, of in zip(rows, each, strict=True):
        assert of.keys() == {"step", "score", "length", "finished", "kl", "score/letters"}
        assert all(len(of[key]) == 4 for key in of.keys() - {"step"})
        for key in ("score", "length", "finished", "score/letters"):
            assert sum(of[key]) / 4 == pytest.approx(row[key], rel=1e-3)
        assert sum(of["kl"]) / 4 == pytest.approx(row["kl"], rel=1e-2, abs=1e-4)
    samples = project.samples()
    evaluations = {row["step"] for row in samples if row["kind"] == "summary"}
    assert evaluations == {0, 2, 4, 5}
    for kind in ("rollout", "best", "worst", "chance"):
        assert [row["step"] for row in samples if row["kind"] == kind] == [1, 2, 3, 4, 5]
    for row in samples:
        of = each[row["step"] - 1]["score"]
        bound = {"best": max(of), "worst": min(of), "rollout": sorted(of)[2]}.get(row["kind"], row.get("score"))
        assert row["kind"] == "summary" or row["score"] == pytest.approx(bound, rel=1e-3)
        assert row["kind"] != "chance" or any(row["score"] == pytest.approx(value, rel=1e-3) for value in of)
    assert [row["prompt"] for row in samples if row["kind"] == "evaluation"] == [
        text for _ in range(4) for text in ("the film", "a very good story", "it was")
    ]
    record = json.loads((folder / "run.json").read_text())
    assert record["command"] == "train"
    assert {Path(name).name for name in record["inputs"]} >= {"rule.py", "prompts.jsonl", "model.safetensors"}
    best = json.loads((folder / "checkpoints/000005/state.json").read_text())["best"]
    summaries = {row["step"]: row["score"] for row in samples if row["kind"] == "summary"}
    assert best == [max((2, 4), key=lambda step: (summaries[step], -step)), max(summaries[2], summaries[4])]
    assert set(project.steps()) == {4, 5, best[0]}


def test_everything_in_a_run_is_private(project):
    project.done("train", project.config())
    found = list(modes(project.run()))
    assert len(found) > 12
    assert {(mode, folder) for _, mode, folder in found} == {(0o700, True), (0o600, False)}, found


def test_checkpoints_are_rotated(project):
    project.done("train", project.config(run={"iterations": 6, "keep_last": 3}))
    assert project.steps() == [4, 5, 6]
    project.done("train", project.config(run={"iterations": 6, "keep_last": 1, "save_every": 4, "name": "b"}))
    assert project.steps("b") == [6]
    assert [path.name for path in (project.run("b") / "checkpoints").iterdir()] == ["000006"]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_stock_mlx_lm_writes_the_same_text(project, train):
    project.done(
        "train", project.config(model={"train": train}, optimizer={"learning_rate": 2e-2}, run={"iterations": 4})
    )
    adapters = json.loads((project.run() / "checkpoints/000004/adapter_config.json").read_text())
    assert adapters["num_layers"] == 2 and (train == "full" or adapters["lora_parameters"]["scale"] == 2.0)
    ask = ("--prompt", "a very", "--temperature", 0, "--max-tokens", 20)
    ours, before = project.done("sample", "runs/a", *ask), project.done("sample", "model", *ask)
    assert ours.startswith("a very") and ours != before
    stock = stock_text(project.folder / "model", project.run() / "checkpoints/000004", "a very", tokens=20)
    assert ours == f"{harmless(stock.rstrip())}\n"


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("placement", ["adapters", "folder"])
def test_a_trained_reward_model_scores(project, reward_folders, placement, train):
    path = str(reward_folders[placement])
    config = project.config(
        model={"train": train},
        reward=[{"kind": "model", "path": path}, {"kind": "function", "function": "rule.py:letters", "weight": 0.5}],
        critic={"kind": "adapters" if placement == "adapters" else "model"},
    )
    shown = project.done("train", config)
    assert "rating points (reward)" in shown
    rows = project.metrics()
    for row in rows:
        assert row["score"] == pytest.approx(row["score/reward"] + 0.5 * row["score/letters"], abs=1e-5)
    assert len({row["score/reward"] for row in rows}) == 3
    evaluation = next(row for row in project.samples() if row["kind"] == "evaluation")
    assert {"score", "points/reward"} <= evaluation.keys()


@pytest.mark.parametrize("name", ["prompt", "score", "kind", "step"])
def test_no_name_of_a_reward_folder_hides_what_is_logged(project, reward_folders, name):
    shutil.copytree(reward_folders["folder"], project.folder / name)
    source = {"kind": "model", "path": name}
    project.done("train", project.config(run={"iterations": 1}, reward=[source], ppo={"advantage": "gae"}))
    rows = [row for row in project.samples() if row["kind"] == "evaluation"]
    assert [row["prompt"] for row in rows] == ["the film", "a very good story", "it was"] * 2
    assert {row["step"] for row in rows} == {0, 1} and all(f"points/{name}" in row for row in rows)


@pytest.mark.parametrize("name", ["deviation", "score", "norm"])
def test_no_name_of_a_reward_function_hides_what_is_logged(project, name):
    (project.folder / "rule.py").write_text(f"def {name}(prompts, completions):\n    return [1.0] * len(prompts)\n")
    source = {"kind": "function", "function": f"rule.py:{name}"}
    shown = project.done("train", project.config(run={"iterations": 1}, reward=[source]))
    row = project.metrics()[0]
    assert row["score_deviation"] == 0 and row[f"score/{name}"] == 1
    assert "all scores of iteration 1 are equal" in shown


@pytest.mark.parametrize("placement", ["adapters", "folder"])
@pytest.mark.parametrize("initialise", ["reward", "policy"])
def test_the_critic_starts_from_the_reward_model_where_it_fits(project, reward_folders, placement, initialise):
    kind = "adapters" if placement == "adapters" else "model"
    config = project.config(
        run={"iterations": 1},
        reward=[{"kind": "model", "path": str(reward_folders[placement])}],
        critic={"kind": kind, "initialise": initialise, "learning_rate": 1e-12},
    )
    project.done("train", config)
    critic = mx.load(str(project.run() / "checkpoints/000001/critic.safetensors"))
    source = mx.load(str(reward_folders[placement] / f"{kind}.safetensors"))
    assert critic.keys() == source.keys() | {"head.weight", "head.bias"}
    same = {name for name in source if mx.allclose(critic[name], source[name], atol=1e-6)}
    assert same == source.keys() if initialise == "reward" else len(same) < len(source) / 2


@pytest.mark.parametrize("train", ["lora", "full"])
def test_an_easy_rule_is_learned(project, train):
    config = project.config(
        run={"iterations": 15, "save_every": 15},
        model={"train": train},
        data={"eval_count": 6},
        rollout={"prompts": 16, "batch_size": 16},
        kl={"coef": 0.0},
        ppo={"epochs": 4, "minibatches": 2, "clip_high": 0.4},
        optimizer={"learning_rate": 3e-2},
    )
    project.done("train", config)
    scores = [row["score"] for row in project.metrics()]
    first, last = sum(scores[:3]) / 3, sum(scores[-3:]) / 3
    assert last > first + 0.15, scores
    summaries = [row["score"] for row in project.samples() if row["kind"] == "summary"]
    assert summaries[-1] > summaries[0]


def test_critic_warm_up_leaves_the_policy_alone(project):
    project.done("train", project.config(run={"iterations": 3, "keep_last": 3}, critic={"warmup_iterations": 2}))
    files = project.checkpoints()
    adapters = [files[f"{step:06d}/adapters.safetensors"] for step in (1, 2, 3)]
    critics = [files[f"{step:06d}/critic.safetensors"] for step in (1, 2, 3)]
    assert adapters[0] == adapters[1] != adapters[2]
    assert len(set(critics)) == 3
    assert [row["kl"] for row in project.metrics()] == pytest.approx([0, 0, 0], abs=1e-5)


def test_settings_on_the_command_line_win_and_names_are_counted_on(project):
    config = project.config()
    project.done("train", config, "--set", "run.iterations=1", "--set", "ppo.epochs=1")
    shown = project.done("train", config, "--set", "run.iterations=1", "--set", "run.seed=7")
    assert "run folder: runs/a-2" in shown
    resolved = (project.run() / "config.toml").read_text()
    assert "iterations = 1\n" in resolved and "epochs = 1\n" in resolved
    assert project.metrics("a") != project.metrics("a-2")


def test_starting_from_given_adapters_keeps_them_as_the_reference(project):
    project.done("train", project.config(run={"iterations": 3}, optimizer={"learning_rate": 2e-2}))
    given = str(project.run() / "checkpoints/000003")
    project.done("train", project.config(run={"iterations": 2, "name": "b"}, model={"adapter": given}))
    (fresh, *_), (first, second) = project.metrics("a"), project.metrics("b")
    assert first["kl"] == pytest.approx(0, abs=1e-5) and abs(second["kl"]) > 1e-4
    assert first["entropy"] != pytest.approx(fresh["entropy"], abs=1e-3)
