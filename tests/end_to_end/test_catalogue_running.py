"""What goes wrong while a run works; rewards are in test_cli_bad_rewards, folders in test_cli_bad_runs."""

import itertools
import json
import shutil
import time

import mlx.core as mx
import pytest

from mlx_ppo.cli.display import Display, harmless
from mlx_ppo.cli.work import Answers
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.provenance import sha256

ESCAPES = "\x1b[2J\x1b]0;x\x07\u202e[red]\r"


@pytest.mark.parametrize("advantage", ["gae", "grpo", "dr_grpo", "rloo"])
def test_without_a_signal_the_policy_stays_as_it_is(project, advantage):
    (project.folder / "rule.py").write_text("def letters(prompts, completions):\n    return [1] * len(prompts)\n")
    several = {"samples_per_prompt": 2, "prompts": 4, "max_tokens": 6}
    shown = project.done("train", project.config(run={"iterations": 3}, ppo={"advantage": advantage}, rollout=several))
    said = "all scores" if advantage == "gae" else "the scores of each prompt's responses"
    for iteration in (1, 2, 3):
        assert f"warning: {said} of iteration {iteration} are equal: no signal" in shown
    for row in project.metrics():
        assert row["kl"] == pytest.approx(0, abs=1e-5) and row["policy_norm"] == 0
        assert advantage != "gae" or row["critic_norm"] > 0
    policies = [checkpoint.load(project.run(), step).arrays["adapters"] for step in project.steps()]
    assert all(mx.array_equal(policies[0][name], policies[1][name]) for name in policies[0])


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_without_a_signal_a_policy_that_has_left_the_reference_goes_back(project, advantage):
    """What it goes back by is tested in tests/stages/test_estimation.py."""
    (project.folder / "rule.py").write_text(
        "calls = []\n"
        "def letters(prompts, completions):\n"
        "    calls.append(1)\n"
        "    return [len(c) if len(calls) <= 2 else 1 for c in completions]\n"
    )
    several = {"samples_per_prompt": 2, "prompts": 4, "max_tokens": 6}
    shown = project.done("train", project.config(run={"iterations": 2}, ppo={"advantage": advantage}, rollout=several))
    assert "of iteration 2 are equal: no signal to learn from, the policy only goes back towards the reference" in shown
    assert project.metrics()[1]["kl"] != 0 and project.metrics()[1]["policy_norm"] > 0


def test_empty_completions_are_scored_and_learned_from(project, model_folder):
    """The same state after every token, and an output layer for which that means the end."""
    arrays = dict(mx.load(str(model_folder / "model.safetensors")))
    for name, array in arrays.items():
        ones = "norm" in name or "embed" in name
        arrays[name] = mx.ones_like(array) if ones else mx.zeros_like(array)
    arrays["lm_head.weight"][2] = 2.0
    shutil.copytree(model_folder, project.folder / "silent")
    mx.save_safetensors(str(project.folder / "silent/model.safetensors"), arrays)
    (project.folder / "rule.py").write_text(
        "def letters(prompts, completions):\n    assert not any(completions)\n    return [0.5] * len(prompts)\n"
    )
    project.done("train", project.config(model={"path": "silent"}, run={"iterations": 2}))
    assert [(row["length"], row["finished"]) for row in project.metrics()] == [(1, 1), (1, 1)]
    assert project.done("sample", "runs/a", "--prompt", "it") == "it\n"


def test_numbers_that_overflow_end_the_run_before_they_reach_the_weights(project):
    config = project.config(optimizer={"learning_rate": 1e30, "gradient_clip": 1e30}, run={"iterations": 3})
    shown = project.refused(4, "not finite", "train", config, left=True)
    assert len(shown.splitlines()) == 1
    assert all(checkpoint.verify(checkpoint.folder_of(project.run(), step)) == "" for step in project.steps())


@pytest.mark.parametrize("job", ["sft", "reward"])
def test_numbers_that_overflow_in_supervised_jobs(project, job):
    config = project.config(job, optimizer={"learning_rate": 1e30, "gradient_clip": 1e30})
    project.refused(4, "not finite", job, config, left=True)


def test_more_memory_than_the_budget_is_refused_before_the_start(project):
    config = project.config(memory={"budget_gb": 0.01})
    shown = project.refused(2, "memory", "train", config)
    assert len(shown.splitlines()) == 1


def test_a_checkpoint_of_a_newer_version(project):
    project.done("train", project.config(run={"iterations": 1}))
    folder = checkpoint.folder_of(project.run(), 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": 2}))
    seal(folder)
    project.refused(4, "000001: written in format 2; this version reads format 1", "resume", "runs/a")


def test_a_forged_checkpoint_of_somebody_else(project):
    """Its manifest fits its files; mlx would read ranges that overlap."""
    project.done("train", project.config(run={"iterations": 1}))
    folder = checkpoint.folder_of(project.run(), 1)
    raw = (folder / "adapters.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    first, second = [name for name in sorted(entries) if name.endswith("q_proj.lora_a")][:2]
    entries[first]["data_offsets"] = entries[second]["data_offsets"]
    header = json.dumps(entries).encode()
    (folder / "adapters.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    seal(folder)
    project.refused(4, "adapters.safetensors: the range of tensor", "resume", "runs/a")
    project.refused(3, "adapters.safetensors: the range of tensor", "sample", "runs/a", "--prompt", "it")


def seal(folder):
    """Write a manifest that fits what is there."""
    files = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != "manifest.json"}
    (folder / "manifest.json").write_text(
        json.dumps({**files, "manifest.json": checkpoint._digest(files)}, indent=2) + "\n"
    )


def test_a_clock_that_jumps_changes_nothing(project, monkeypatch):
    times = itertools.cycle((2e9, 0.0, 1e9, -5.0))
    monkeypatch.setattr(time, "time", lambda: next(times))
    project.done("train", project.config(run={"iterations": 2}))
    rows = [json.loads(line) for line in (project.run() / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["seconds"] < 600 for row in rows)


def test_nothing_of_a_model_or_a_file_acts_on_the_terminal(project, monkeypatch):
    """What is shown of prompts, completions and names has no control characters, and no markup of rich."""
    project.jsonl("prompts.jsonl", [{"prompt": f"it {ESCAPES} {n}"} for n in range(4)])
    (project.folder / "rule.py").write_text(
        "def letters(prompts, completions):\n    return [len(c) for c in completions]\n"
    )
    shown = project.done("train", project.config(run={"iterations": 1}))
    shown += project.done("sample", "runs/a", "--max-tokens", 2)
    shown += project.refused(2, r"unknown key '\x1b[2J' in [ppo]", "train", project.config(), "--set", "ppo.\x1b[2J=1")
    assert all(c.isprintable() or c == "\n" for c in shown) and r"\x1b[2J" in shown


def test_displays_show_markup_as_it_is(capsys):
    found = Answers({"points/[/x]\x1b": 1.0}, [(f"[red]{ESCAPES}", f"[/bold] {ESCAPES}", 1.0)])
    display = Display()
    display.message(f"[/red] {ESCAPES}")
    display.before_and_after(found, found)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u202e" not in shown and "\x07" not in shown
    assert "[red]" in shown and "[/bold]" in shown and "rating points ([/x]\\x1b)" in shown
    assert harmless("a\n\tb\u00a0🙂\u3000é") == "a\n\tb\u00a0🙂\u3000é"
