"""Reward functions and reward models that fail: before training, and while it runs."""

import json
import shutil
import subprocess

import pytest

FILE_PROBLEMS = [
    ("rul.py:letters", "", "rul.py: no such file for the reward function. Did you mean"),
    ("rule.py:leters", "", "no function 'leters' in this file. Did you mean 'letters'?"),
    ("rule.py:letters", "def letters(x):\n    return 0\n", "doesn't say which parameter gets the completions"),
    ("rule.py:letters", "import nothing_of_this_name\n", "rule.py:1: the reward function can't be loaded"),
    ("rule.py:letters", "def letters(:\n", "rule.py:1: the reward function can't be loaded: raised SyntaxError"),
]


def workers(project) -> list[str]:
    """Worker processes of this project that are still alive."""
    shown = subprocess.run(["ps", "-axwwo", "pid,command"], capture_output=True, text=True, timeout=60).stdout
    return [line for line in shown.splitlines() if "rewards/worker.py" in line and str(project.folder) in line]


@pytest.mark.parametrize(("function", "text", "words"), FILE_PROBLEMS)
def test_functions_that_cannot_be_loaded(project, function, text, words):
    if text:
        (project.folder / "rule.py").write_text(text)
    config = project.config(reward=[{"kind": "function", "function": function}])
    project.refused(2, words, "train", config)
    project.refused(2, words, "train", config, "--dry-run")
    assert workers(project) == []


RUNNING = {
    "raise ValueError('boom')": "rule.py:letters raised ValueError: boom (line 5",
    "import time; time.sleep(60)": "gave no scores for a batch of 3 within 1 s and was killed",
    "return [1.0]": "returned 1 scores for 3 completions; return a list of 3 floats",
    "return [1.0, float('nan'), 1.0, 1.0][:len(completions)]": "returned nan; scores must be finite (sample 2 of 3)",
    "return None": "returned None (is a return statement missing?)",
    "return ['high'] * len(completions)": "returned a value of type str where a float belongs (sample 1 of 3)",
    "import os; os._exit(3)": "its process ended while scoring: it exited with status 3",
}
# Calls 1 and 2 are the evaluation before training and iteration 1.
AT_CALL = """calls = 0
def letters(prompts, completions):
    global calls; calls += 1
    if calls == {call}:
        {fault}
    return [len(set(c)) / 10 for c in completions]
"""


@pytest.mark.parametrize("fault", RUNNING)
def test_functions_that_fail_at_once(project, fault):
    (project.folder / "rule.py").write_text(AT_CALL.format(call=1, fault=fault))
    config = project.config(reward=[{"kind": "function", "function": "rule.py:letters", "timeout": 1.0}])
    shown = project.refused(4, RUNNING[fault], "train", config)
    assert "mlx_ppo" not in shown.replace("mlx_ppo/", "")  # nothing of our own stack
    assert workers(project) == []


def test_a_function_that_fails_later_leaves_the_run_to_go_on_with(project):
    (project.folder / "rule.py").write_text(AT_CALL.format(call=4, fault="[int(c) for c in completions if c]"))
    config = project.config(run={"iterations": 4})
    shown = project.refused(4, "raised ValueError: invalid literal", "train", config, left=True)
    assert "prompt: " in shown and "completion: " in shown and "sample 1 of 4" in shown
    assert project.steps() == [1, 2] and [row["step"] for row in project.metrics()] == [1, 2]
    # the worker counts its calls anew: the evaluation before, iterations 3 and 4, the evaluation after
    project.refused(4, "raised ValueError", "resume", "runs/a", left=True)
    assert project.steps() == [3, 4] and [row["step"] for row in project.metrics()] == [1, 2, 3, 4]
    assert "before" in project.done("resume", "runs/a")
    assert workers(project) == []


def test_rewards_that_are_all_the_same_are_no_failure(project):
    (project.folder / "rule.py").write_text("def letters(prompts, completions):\n    return [1] * len(prompts)\n")
    for changes in ({}, {"ppo": {"advantage": "grpo"}, "rollout": {"prompts": 2, "samples_per_prompt": 2}}):
        project.done("train", project.config(**changes))
    assert [row["score_deviation"] for row in project.metrics("a-2")] == [0, 0, 0]


def test_records_reach_the_function(project):
    project.jsonl("prompts.jsonl", [{"prompt": text, "wanted": text[:1]} for text in ("it", "bad", "a", "the film")])
    (project.folder / "rule.py").write_text(
        "def letters(prompts, completions, records):\n"
        "    assert all(p.startswith(r['wanted']) for p, r in zip(prompts, records, strict=True))\n"
        "    return [float(ord(r['wanted'])) for r in records]\n"
    )
    project.done("train", project.config(run={"iterations": 1}))
    assert project.metrics()[0]["score"] == pytest.approx(sum(map(ord, "ibat")) / 4)


@pytest.fixture
def own_reward(project, reward_folders):
    """A copy of the reward adapters that a test may spoil, and the configuration that uses it."""
    shutil.copytree(reward_folders["adapters"], project.folder / "judge")
    return project.folder / "judge", project.config(reward=[{"kind": "model", "path": "judge"}])


def test_reward_models_that_are_none(project):
    for name in ("model", "runs"):
        refused = project.config(reward=[{"kind": "model", "path": name}])
        project.refused(3, f"{name}: not a reward model", "train", refused)
    project.refused(3, ": not a reward model", "compare", "model", "model", "--reward", "model",
                    "--prompts", "prompts.jsonl")  # fmt: skip


def cut_head(folder):
    (folder / "head.safetensors").write_bytes((folder / "head.safetensors").read_bytes()[:-4])
    return "judge/head.safetensors: truncated"


def no_head(folder):
    (folder / "head.safetensors").unlink()
    return "judge/head.safetensors: missing"


def no_deviation(folder):
    facts = json.loads((folder / "reward.json").read_text())
    (folder / "reward.json").write_text(json.dumps({**facts, "deviation": 0.0}))
    return "judge/reward.json: not a description"


def torn_facts(folder):
    (folder / "reward.json").write_text('{"placement": "adap')
    return "judge/reward.json: malformed JSON"


@pytest.mark.parametrize("spoil", [cut_head, no_head, no_deviation, torn_facts])
def test_spoiled_reward_models(project, own_reward, spoil):
    folder, config = own_reward
    assert project.done("train", config, "--dry-run")
    words = spoil(folder)
    project.refused(3, words, "train", config)
    project.refused(3, words, "train", config, "--dry-run")


def test_reward_adapters_of_another_model(project, reward_folders, make_model):
    other = make_model(hidden_size=40, num_attention_heads=4, head_dim=8)
    reward = [{"kind": "model", "path": str(reward_folders["adapters"])}]
    config = project.config(model={"path": str(other)}, reward=reward)
    project.refused(3, "trained on other weights than those in", "train", config)


def test_reward_adapters_know_their_trunk(project, own_reward, make_model):
    """Of the same shape, but with other weights; what an earlier version wrote doesn't say."""
    folder, config = own_reward
    project.done("train", config, "--dry-run")
    other = make_model(seed=5)
    config = project.config(model={"path": str(other)}, reward=[{"kind": "model", "path": "judge"}])
    shown = project.refused(3, "judge: these adapters were trained on other weights than those in", "train", config)
    assert f"{other};" in shown
    compared = ("model", other, "--reward", "judge", "--prompts", "prompts.jsonl", "--count", 2, "--max-tokens", 2)
    assert "judged by adapters reward model" in project.done("compare", *compared)  # on the trunk that fits
    project.refused(3, "were trained on other weights", "compare", other, *compared[1:])
    facts = json.loads((folder / "reward.json").read_text())
    assert len(facts.pop("trunk")) == 64
    (folder / "reward.json").write_text(json.dumps(facts))
    project.done("train", config, "--dry-run")
