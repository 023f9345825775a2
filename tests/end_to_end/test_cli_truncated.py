"""Runs that sample from truncated distributions, and the commands that read them."""

import re

import pytest
from test_cli_parallel import CLOSE, adapters, finished, trained, written
from test_cli_resume import PINNED, same, stop
from thorough import mostly

import mlx_ppo

BOUNDS = {
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.3},
    "all": {"top_k": 30, "top_p": 0.9, "min_p": 0.05},
}
SHAPE = {"prompts": 5, "samples_per_prompt": 2, "max_tokens": 6}
by_bounds = pytest.mark.parametrize("name", BOUNDS)


def config_of(project, name, **changes):
    rollout = {**SHAPE, "temperature": 0.8, **BOUNDS[name]}
    return project.config(**{"rollout": rollout, "memory": PINNED, **changes})


@by_bounds
def test_a_run_samples_scores_and_learns_on_the_same_sets(project, name):
    project.done("train", config_of(project, name, run={"evaluate_every": 2}))
    plain = project.config(rollout={**SHAPE, "temperature": 0.8}, memory=PINNED)
    project.done("train", plain, "--set", "run.name=plain")
    rows, others = project.metrics(), project.metrics("plain")
    for row in rows:
        assert row["ratio_error"] < 1e-4 and row["logprob_error"] < 1e-4
        assert row["policy_norm"] > 1e-3
    assert 0 < rows[0]["entropy"] < others[0]["entropy"] - 0.5
    assert abs(rows[0]["kl"]) < 1e-4 < rows[-1]["kl_token"]
    summary = [row for row in project.samples() if row["kind"] == "summary"]
    assert abs(summary[0]["kl"]) < 1e-4 < abs(summary[-1]["kl"])
    # the bounds may not matter where they are off
    off = project.config(rollout={**SHAPE, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, memory=PINNED)
    project.done("train", off, "--set", "run.name=off")
    same(project, "plain", "off")


@pytest.mark.parametrize("name", ["top_k", "all"])
def test_training_in_parts_is_training_at_once(project, name):
    config = config_of(project, name, run={"iterations": 2, "keep_last": 4})
    project.done("train", config)
    stop(project, "train", config, "b", at=1)
    project.done("resume", "runs/b")
    same(project, "a", "b")
    stop(project, "train", config, "c", at=2, phase="update")
    project.done("resume", "runs/c")
    same(project, "a", "c")


@pytest.mark.parametrize("name", mostly(["top_p", "all"], ("all",)))
def test_processes_do_what_one_does(project, name):
    """Also one without prompts of its own."""
    rollout = {**SHAPE, "prompts": 2, **BOUNDS[name]}
    for count in (1, 3) if name == "all" else (1, 2):
        changes = {"rollout": rollout, "lora": {"layers": 1, "rank": 4}, "data": {"eval_count": 2}}
        changes["run"] = {"iterations": 2}
        trained(project, f"of-{count}", count, **changes)
    one = project.samples("of-1")
    for other in ("of-3",) if name == "all" else ("of-2",):
        rows = zip(one, project.samples(other), strict=True)
        assert all(row.get("completion") == found.get("completion") for row, found in rows)
        assert written(project, other) == written(project, "of-1")
        assert abs(adapters(project, "of-1") - adapters(project, other)).max() < CLOSE
        for row, found in zip(project.metrics("of-1"), project.metrics(other), strict=True):
            assert row == pytest.approx(found, abs=1e-4, rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"ppo": {"advantage": "grpo"}},
        {"critic": {"kind": "head"}},
        {"model": {"train": "full"}, "critic": {"kind": "model"}},
        {"ppo": {"micro_batch": 1, "gradient_checkpointing": "on", "entropy_coef": 0.1}},
        {"memory": {**PINNED, "positions": 64}, "rollout": {**SHAPE, "top_p": 0.8, "kv_cache": "8-bit"}},
        {"score": {"batch_size": 3}, "rollout": {**SHAPE, "top_k": 5, "batch_size": 2}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_kind_of_run(project, changes):
    project.done("train", config_of(project, "all", **changes))
    assert all(row["ratio_error"] < 1e-4 for row in project.metrics())


def test_both_engines_take_the_same_tokens(project, monkeypatch):
    for name in ("cpu", "portable"):
        monkeypatch.setenv("MLX_PPO_ENGINE", name)
        project.done("train", config_of(project, "all", run={"iterations": 1}), "--set", f"run.name={name}")
    one, two = project.samples("cpu"), project.samples("portable")
    assert [row.get("completion") for row in one] == [row.get("completion") for row in two]
    first, second = project.metrics("cpu")[0], project.metrics("portable")[0]
    for name in ("entropy", "score", "policy_norm", "length"):
        assert first[name] == pytest.approx(second[name], rel=1e-3)


def test_what_reads_a_run_samples_as_it_did_and_says_so(project, reward_folders):
    reward = [{"kind": "model", "path": str(reward_folders["folder"])}]
    shown = project.done("train", config_of(project, "all", run={"iterations": 1}, reward=reward))
    assert re.search(r"mlx_lm.generate .* --temp 0.8 --top-k 30 --top-p 0.9 --min-p 0.05 --prompt", shown)
    own = "temperature 0.8, top-k 30, top-p 0.9, min-p 0.05, up to 6 tokens\n"
    result = project.cli("sample", "runs/a", "--samples", 3)
    assert result.stderr == f"runs/a: {own}"
    given = ("--temperature", 0.8, "--top-k", 30, "--top-p", 0.9, "--min-p", 0.05)
    assert result.stdout == project.done("sample", "runs/a", "--samples", 3, *given)
    off = project.cli("sample", "runs/a", "--samples", 3, "--top-k", 0, "--top-p", 1, "--min-p", 0)
    assert off.stderr == "runs/a: temperature 0.8, up to 6 tokens\n" and off.stdout != result.stdout
    one = project.cli("sample", "runs/a", "--samples", 3, "--top-k", 1)
    assert one.stderr.startswith("runs/a: temperature 0.8, top-k 1, top-p 0.9")
    assert one.stdout == project.done("sample", "runs/a", "--samples", 3, "--temperature", 0)
    compared = project.cli("compare", "model", "runs/a", "--top-k", 3)
    assert compared.stderr == "".join(f"{of}: {own}" for of in ("model", "runs/a")).replace("top-k 30", "top-k 3")
    policy = mlx_ppo.load_policy(project.run())
    texts = mlx_ppo.generate(policy, ["the film"], samples=12, top_k=2)
    assert texts == mlx_ppo.generate(policy, ["the film"], samples=12, top_k=2, top_p=0.9, min_p=0.05, temperature=0.8)
    assert texts != mlx_ppo.generate(policy, ["the film"], samples=12, top_k=0, top_p=1.0, min_p=0.0)
    asked = project.cli("frontier", "runs/a", "--prompts", 2, "--samples", 4)
    assert asked.exit_code == 0 and "by samples of the reference alone" in asked.stderr
    with pytest.raises(TypeError, match="no 'topk'"):
        mlx_ppo.generate(policy, ["the film"], topk=2)
    with pytest.raises(ValueError, match="top_p"):
        mlx_ppo.generate(policy, ["the film"], top_p=0.0)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("top_k", -1, "rollout.top_k"),
        ("top_k", 2.5, "rollout.top_k"),
        ("top_k", 1, "rollout.top_k: 1 leaves one token"),
        ("top_p", 0, "rollout.top_p"),
        ("top_p", 1.01, "rollout.top_p"),
        ("top_p", "nan", "rollout.top_p"),
        ("min_p", 1, "rollout.min_p"),
        ("min_p", -0.1, "rollout.min_p"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(project, key, value, words):
    config = project.config()
    project.refused(2, words, "train", config, "--set", f"rollout.{key}={value}")
    if key != "top_k" or value != 1:
        option = f"--{key.replace('_', '-')}"
        result = project.cli("sample", "model", "--prompt", "it", option, value)
        assert result.exit_code == 2 and option in result.stderr and "Traceback" not in result.output


def test_a_plan_and_a_dry_run_count_the_sets(project):
    config = config_of(project, "top_p")
    shown = project.done("plan", config, "--json")
    assert "sets of tokens that were sampled from" in shown
    assert "sets" not in project.done("plan", project.config(memory=PINNED), "--json")
    assert "rollout" in finished(project, "bench", config, "--iterations", "1")
