"""The public interface for programs, beside the commands that do the same."""

import json

import mlx.core as mx
import pytest

import mlx_ppo
from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.errors import ConfigError, DataError, ModelError

PROMPTS = ["the film", "a very good story"]


def test_training_from_python_gives_the_bytes_of_the_command(project, monkeypatch, capsys):
    config = project.config(run={"iterations": 2})
    project.done("train", config)
    monkeypatch.chdir(project.folder)
    folder = mlx_ppo.train_policy("train.toml", ["run.name=b"])
    assert folder == project.run("b")
    assert project.checkpoints("b") == project.checkpoints("a")
    assert project.metrics("b") == project.metrics("a") and project.samples("b") == project.samples("a")
    records = [json.loads((project.run(name) / "run.json").read_text()) for name in "ab"]
    assert records[0].keys() == records[1].keys() and records[0]["device"] == records[1]["device"]
    shown = capsys.readouterr()
    assert shown.out == "" and "decoded" in shown.err  # the plan
    assert "everything is as recorded" in project.done("verify", "runs/b")
    with pytest.raises(ConfigError, match="no such configuration file"):
        mlx_ppo.train_policy("trane.toml")


def test_a_reporter_is_told(project):
    told = []

    class Reporter:
        def message(self, text):
            told.append(text)

        def phase(self, name, iteration, iterations):
            told.append(name)

        def tokens(self, count):
            told.append(count)

        def iteration(self, metrics, iterations, sample):
            told.append(metrics["step"])

    mlx_ppo.train_policy(project.config(run={"iterations": 1}), reporter=Reporter())
    assert {"rollout", "score", "update", "evaluate", 1} <= set(told)


def test_completions_come_by_prompt_with_the_settings_of_the_run(project):
    rollout = {"temperature": 0.5, "max_tokens": 5}
    run = mlx_ppo.train_policy(project.config(run={"iterations": 1}, rollout=rollout))
    policy = mlx_ppo.load_policy(run)
    found = mlx_ppo.generate(policy, PROMPTS, samples=3)
    assert [len(texts) for texts in found] == [3, 3] and len(set(found[0])) > 1
    assert found == mlx_ppo.generate(policy, PROMPTS, samples=3, temperature=0.5, max_tokens=5)
    assert found != mlx_ppo.generate(policy, PROMPTS, samples=3, temperature=2.0)
    assert found != mlx_ppo.generate(policy, PROMPTS, samples=3, seed=1)
    assert found[1] != mlx_ppo.generate(policy, PROMPTS[::-1], samples=3)[1]
    # the same prompts, draws and settings under the command
    lines = project.done("sample", run, "--prompt", PROMPTS[0], "--temperature", 0.5, "--max-tokens", 5).splitlines()
    assert lines == [PROMPTS[0] + mlx_ppo.generate(policy, PROMPTS[:1])[0][0].rstrip()]


def test_what_cannot_be_read_is_named_by_its_number(model_folder, reward_folders):
    policy = mlx_ppo.load_policy(model_folder)
    with pytest.raises(DataError, match=r"^prompts:2: .*chat template"):
        mlx_ppo.generate(policy, ["the film", [{"role": "user", "content": "a film"}]])
    model = mlx_ppo.load_reward_model(reward_folders["folder"])
    with pytest.raises(DataError, match=r"^prompts:1: "):
        mlx_ppo.score(model, [""], ["good"])
    with pytest.raises(ValueError, match="shorter"):
        mlx_ppo.score(model, PROMPTS, ["good"])


@pytest.mark.parametrize("placement", ["adapters", "folder"])
def test_scores_are_those_of_the_finished_texts(placement, model_folder, reward_folders):
    policy = mlx_ppo.load_policy(model_folder)
    model = mlx_ppo.load_reward_model(reward_folders[placement], policy)
    completions = [" was bad", " and it was good and good"]
    found = mlx_ppo.score(model, PROMPTS, completions)
    for prompt, completion, value in zip(PROMPTS, completions, found, strict=True):
        tokens = [*policy.trunk.tokenizer.encode(prompt + completion, bos=True), policy.trunk.tokenizer.eos_id]
        raw = model.raw(make_sequences([tokens[:-3]], [tokens[-3:]]))
        assert value == pytest.approx(float(mx.squeeze(model.normalised(raw)).item()), abs=1e-5)
    assert found[0] != pytest.approx(found[1], abs=1e-3)


def test_adapters_need_the_model_that_they_lie_on(reward_folders):
    with pytest.raises(ModelError, match="adapters for a trunk"):
        mlx_ppo.load_reward_model(reward_folders["adapters"])
