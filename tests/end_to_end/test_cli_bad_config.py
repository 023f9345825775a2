"""Configurations, models and data that can't be used: one line each, the promised code, and nothing left behind."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

JOBS = ("train", "sft", "reward")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ppo": {"minibatch_sise": 2}}, "train.toml:25: unknown key 'minibatch_sise' in [ppo]"),
        ({"ppo": {"epochs": "4"}}, "ppo.epochs: must be a whole number; remove the quotes"),
        ({"ppo": {"epochs": True}}, "ppo.epochs: must be a whole number"),
        ({"ppo": {"clip_low": 2.0}}, "ppo.clip_low: must be at most 1"),
        ({"pppo": {"epochs": 4}}, "unknown section [pppo]. Did you mean [ppo]?"),
        ({"ppo": {"advantage": "grpo"}}, "rollout.samples_per_prompt to 2 or more"),
        ({"run": {"name": "../a"}}, "run.name: must be letters, digits"),
        ({"reward": []}, "reward"),
        ({"reward": [{"kind": "function"}]}, "reward.0.function: missing"),
        ({"reward": [{"kind": "model", "path": "r", "function": "rule.py:letters"}]}, "another kind of reward"),
        ({"reward": [{"kind": "function", "function": "rule.py"}]}, "file.py:name"),
        ({"reward": [{"kind": "model", "path": "r", "gate": True}]}, "reward.0.gate: a model's 0"),
        ({"data": {"max_prompt_tokens": 1}}, "data.max_prompt_tokens: must be at least 2"),
        ({"model": {"path": ""}}, "model.path: must name a file"),
    ],
    ids=str,
)
def test_mistakes_in_the_configuration(project, changes, words):
    shown = project.refused(2, words, "train", project.config(**changes))
    assert len(shown.splitlines()) == 1
    project.refused(2, words, "train", "train.toml", "--dry-run")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "bad.toml: the file is empty"),
        ("[run\n", "bad.toml:1: not valid TOML"),
        ("[run]\nseed = 1\nseed = 2\n", "bad.toml:3: 'seed' is there twice"),
        (b"[run]\nname = '\xff'\n", "bad.toml:2: not UTF-8 at byte 14"),
        ("[run]\n", "bad.toml: missing key 'path' in [model]"),
    ],
)
@pytest.mark.parametrize("job", JOBS)
def test_files_that_are_no_configuration(project, job, text, words):
    (project.folder / "bad.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    project.refused(2, words, job, "bad.toml")


def test_every_mistake_is_told_at_once(project):
    changes = {"ppo": {"epochs": 0, "lambda": 1.0}, "rollout": {"temperature": 0.0}, "kl": {"coeff": 0.1}}
    lines = project.refused(2, "train.toml:", "train", project.config(**changes)).splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.epochs", "--set ppo.epochs: write it as section.key=value"),
        ("epochs=3", "--set epochs=3: write it as section.key=value"),
        ("ppo.epoch=3", "--set ppo.epoch=3: unknown key 'epoch' in [ppo]. Did you mean 'epochs'?"),
        ("ppo.epochs=many", "--set ppo.epochs=many: ppo.epochs: must be a whole number"),
        ("reward.1.weight=2", "--set reward.1.weight=2: there is no reward.1"),
        ("model.path=elsewhere", "elsewhere: no such folder"),
    ],
)
def test_mistakes_in_set(project, override, words):
    code = 3 if "elsewhere" in override else 2
    project.refused(code, words, "train", project.config(), "--set", override)


def test_missing_configurations(project):
    project.config()
    project.refused(2, "trian.toml: no such configuration file. Did you mean 'train.toml'?", "train", "trian.toml")
    project.refused(2, "runs: no such configuration file", "train", "runs")
    project.refused(2, ".: is a folder", "train", ".")


@pytest.fixture
def own_model(project, model_folder) -> Path:
    """A copy of the model that a test may spoil."""
    shutil.copytree(model_folder, project.folder / "own")
    return project.folder / "own"


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "own/model.safetensors: truncated"


def nan(folder):
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    name = sorted(arrays)[3]
    arrays[name] = mx.full(arrays[name].shape, mx.nan)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return f"own: {name} contains NaN or infinity"


def too_few_rows(folder):
    config = json.loads((folder / "config.json").read_text())
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        arrays[name] = arrays[name][:200]
    mx.eval(arrays)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    return "own: the tokenizer has 300 tokens, the model only 200"


def missing_tensor(folder):
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    arrays.pop("model.norm.weight")
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return "own: mlx-lm cannot load this model (ValueError: Missing 1 parameters"


def code(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    return "own/config.json: 'auto_map' asks to run code"


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    return "own: no tokenizer"


@pytest.mark.parametrize("spoil", [truncate, nan, too_few_rows, missing_tensor, code, no_tokenizer])
def test_spoiled_models(project, own_model, spoil):
    words = spoil(own_model)
    for job in JOBS:
        project.refused(3, words, job, project.config(job, model={"path": "own"}))
    project.refused(3, words, "train", project.config(model={"path": "own"}), "--dry-run")
    project.refused(3, words, "sample", "own", "--prompt", "it")
    project.refused(3, words, "compare", "model", "own", "--prompts", "prompts.jsonl")


def test_models_that_are_not_there(project):
    for job in JOBS:
        project.refused(3, "modle: no such folder. Did you mean", job, project.config(job, model={"path": "modle"}))
        project.refused(3, "nothing is ever downloaded", job, project.config(job, model={"path": "org/model-7b"}))
    shown = project.refused(3, "org/model-7b: no such folder", "sample", "org/model-7b", "--prompt", "it")
    assert "bring the model's folder" in shown
    project.refused(3, "rule.py: a file, not a model folder", "train", project.config(model={"path": "rule.py"}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "it"}\n{"prompt": \n', "prompts.jsonl:2: malformed JSON"),
        ("", "prompts.jsonl: the file is empty"),
        ("\n\n", "prompts.jsonl: the file has only blank lines"),
        ('{"prompt": ""}\n', "prompts.jsonl:1: 'prompt' is empty"),
        ('{"promt": "it"}\n', "prompts.jsonl:1: no field 'prompt' or 'messages', only 'promt'; did you mean 'promt'"),
        ('{"prompt": 3}\n', "prompts.jsonl:1: 'prompt' must be a string"),
        (b'{"prompt": "\xff"}\n', "prompts.jsonl:1: byte 12 (0xff) isn't UTF-8"),
        (
            '{"prompt": "the film is a very good story"}\n',
            "prompts.jsonl: every record (1) is longer than data.max_prompt_tokens = 4",
        ),
        ('{"prompt": [{"role": "user", "content": "it"}]}\n', "prompts.jsonl:1: messages need a chat template"),
    ],
)
def test_prompts_that_cannot_be_used(project, text, words):
    (project.folder / "prompts.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    config = project.config(data={"max_prompt_tokens": 4})
    project.refused(3, words, "train", config)
    project.refused(3, words, "train", config, "--dry-run")


@pytest.mark.parametrize(
    ("job", "row", "words"),
    [
        ("sft", {"text": ""}, ":2: 'text' is empty"),
        ("sft", {"prompt": "it", "completion": ""}, ":2: 'completion' is empty"),
        ("sft", {"text": "a", "completion": "b"}, ":2: both 'text' and 'completion' are given"),
        ("reward", {"text": "a"}, ":2: no field 'rating' or 'ratings'"),
        ("reward", {"text": "a", "rating": "5"}, ":2: 'rating' must be a number"),
    ],
)
def test_lines_that_cannot_be_learned_from(project, job, row, words):
    good = {"text": "it was", "rating": 3}
    project.jsonl("bad.jsonl", [good, row])
    for key in ("train", "validation"):
        project.refused(3, f"bad.jsonl{words}", job, project.config(job, data={key: "bad.jsonl"}))


def test_overlong_prompts_are_counted_or_refused(project):
    shown = project.done("train", project.config(run={"iterations": 1}, data={"max_prompt_tokens": 4}), "--dry-run")
    assert "prompts.jsonl: 3 overlong prompts dropped, 0 truncated (max_prompt_tokens = 4)" in shown
    config = project.config(data={"max_prompt_tokens": 4, "overlong": "error"})
    project.refused(3, "prompts.jsonl:2: 5 tokens, more than data.max_prompt_tokens = 4", "train", config)


def test_feedback_that_says_nothing(project):
    project.jsonl("same.jsonl", [{"text": text, "rating": 3} for text in ("it was", "bad")])
    project.jsonl("pairs.jsonl", [{"prompt": "it", "chosen": " is", "rejected": " is"}])
    project.refused(3, "no two of the 2 ratings", "reward", project.config("reward", data={"train": "same.jsonl"}))
    project.refused(3, "pairs.jsonl:1: 'chosen'", "reward", project.config("reward", data={"train": "pairs.jsonl"}))
    mixed = project.config("reward", data={"train": "same.jsonl", "validation": "prompts.jsonl"})
    project.refused(3, "prompts.jsonl:1: no field", "reward", mixed)
