"""The commands that look, copy or explain: help, --dry-run, init, sample, compare; and what `sft` and `reward` give."""

import json
import math
import re
import subprocess
import sys
import time

import pytest

from mlx_ppo.cli.main import main
from mlx_ppo.rewards.verdicts import Rate

COMMANDS = {"init", "train", "sft", "reward", "resume", "sample", "compare", "import", "export"}


def test_help_of_everything(project):
    shown = project.done("--help")
    assert "..." not in shown.split("Commands:")[1]  # no sentence is cut
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert set(main.commands) >= COMMANDS
    for name in main.commands:
        assert project.done(name, "--help") == project.done(name, "-h")
        assert "Usage: " in project.done(name, "--help")
    assert project.done("--version").startswith("mlx-ppo, version ")


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from mlx_ppo.cli.main import main; main(['--help'], standalone_mode=False); "
        "print('|', *[n for n in ('mlx', 'mlx.core', 'mlx_lm', 'numpy', 'pydantic', 'rich', 'transformers') "
        "if n in sys.modules])"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.splitlines()[-1].strip() == "|"
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("job", "lines"),
    [
        ("train", ["training prompts: 6, 26 tokens; each 2 to 7, median 4", "4 responses of at most 6 tokens, 4 opt"]),
        ("sft", ["training examples: 6, 32 tokens; each 3 to 8", "validation examples: 1, 5 tokens; each 5 to 5"]),
        ("reward", ["training texts: 8, ", "validation texts: 2, ", "test texts: 2, "]),
    ],
)  # fmt: skip
def test_dry_runs_count_tokens_and_write_nothing(project, job, lines):
    extra = {"sft": {"validation": "v.jsonl"}, "reward": {"validation": "w.jsonl", "test": "w.jsonl"}}.get(job, {})
    project.jsonl("v.jsonl", [{"text": "a good film"}])
    project.jsonl("w.jsonl", [{"text": "a good film", "rating": 5}, {"text": "it is bad", "rating": 1}])
    config = project.config(job, data=extra)
    before = project.everything()
    shown = project.done(job, config, "--dry-run")
    assert project.everything() == before
    assert [line for line in lines if line not in shown] == []
    assert shown.endswith("dry run: everything is in order; nothing was trained\n")


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_sft_learns_texts(project, full):
    config = project.config(
        "sft",
        run={"keep_last": 1},
        model={"train": "full" if full else "lora"},
        sft={"epochs": 12},
        optimizer={"learning_rate": 2e-2},
    )
    shown = project.done("sft", config)
    losses = [row["validation_loss"] for row in project.metrics()]
    assert losses[-1] < 0.5 * losses[0] and f"finished: runs/a/{'model' if full else 'adapters'}" in shown
    assert project.metrics()[-1]["validation_perplexity"] == pytest.approx(math.exp(losses[-1]))
    ask = ("--prompt", "is it not", "--temperature", 0, "--max-tokens", 8)
    written = project.done("sample", "runs/a", *ask)
    assert written == "is it not in the story\n" != project.done("sample", "model", *ask)
    if full:
        assert project.done("sample", "runs/a/model", *ask) == written
    newest = project.run() / "checkpoints" / f"{project.steps()[-1]:06d}"
    assert project.done("sample", newest.relative_to(project.folder), *ask)


def test_sft_learns_completions_and_not_their_prompts(project):
    project.jsonl(
        "texts.jsonl", [{"prompt": "the film", "completion": " was bad"}, {"prompt": "it", "completion": " is good"}]
    )
    project.done("sft", project.config("sft", sft={"epochs": 12}, optimizer={"learning_rate": 2e-2}))
    rows = project.metrics()
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    shown = project.done("sample", "runs/a", "--prompt", "the film", "--prompt", "it", "--temperature", 0)
    assert shown == "the film was bad\n\nit is good\n"


def test_reward_models_learn_the_order_and_report_it(project, reward_folders):
    for folder in reward_folders.values():
        figures = json.loads((folder.parent / "report.json").read_text())["training"]
        assert figures["accuracy"] > 0.8 and all(math.isfinite(value) for value in figures.values())
        facts = json.loads((folder / "reward.json").read_text())
        assert facts["slope"] is not None and facts["deviation"] > 0
    project.jsonl("pairs.jsonl", [
        {"prompt": "the film", "chosen": " was good", "rejected": " was bad"},
        {"prompt": "it", "chosen": " is a good story", "rejected": " is bad"},
    ])  # fmt: skip
    config = project.config("reward", data={"train": "pairs.jsonl"}, reward_training={"epochs": 10})
    project.done("reward", config)
    assert json.loads((project.run() / "report.json").read_text())["training"]["accuracy"] == 1.0


def test_samples_of_runs_folders_and_files(project):
    project.done("train", project.config(run={"iterations": 1}))
    shown = project.done("sample", "runs/a", "--count", 2, "--samples", 3, "--max-tokens", 3)
    assert shown.count("the film") == 3 and shown.count("a very good story") == 3
    assert shown == project.done("sample", "runs/a", "--count", 2, "--samples", 3, "--max-tokens", 3)
    assert shown != project.done("sample", "runs/a", "--count", 2, "--samples", 3, "--max-tokens", 3, "--seed", 1)
    shown = project.done("sample", "model", "--prompts", "prompts.jsonl", "--max-tokens", 2)
    assert all(text in shown for text in ("the film", "it was", "bad"))
    one = project.done("sample", "model", "--prompt", "bad", "--max-tokens", 5)
    assert project.done("sample", "runs/a/checkpoints/000001", "--prompt", "bad", "--max-tokens", 5).startswith("bad")
    assert one.startswith("bad")


def test_what_reads_a_run_takes_its_settings_and_says_so(project, reward_folders):
    judge = str(reward_folders["folder"])
    changes = {"rollout": {"temperature": 0.25, "max_tokens": 3}, "run": {"iterations": 1}}
    shown = project.done("train", project.config(reward=[{"kind": "model", "path": judge}], **changes))
    assert re.search(r"mlx_lm.generate .* --temp 0.25 --prompt", shown)
    own = "temperature 0.25, up to 3 tokens\n"
    for command in (("sample", "runs/a"), ("sample", "runs/a/checkpoints/000001")):
        result = project.cli(*command)
        assert result.stderr == f"{command[1]}: {own}"
        assert result.stdout == project.done(*command, "--temperature", 0.25, "--max-tokens", 3)
        assert result.stdout != project.done(*command, "--temperature", 1)
    compared = project.cli("compare", "model", "runs/a")
    assert compared.stderr == f"model: {own}runs/a: {own}"
    assert compared.stdout == project.done("compare", "model", "runs/a", "--temperature", 0.25, "--max-tokens", 3)
    assert project.cli("sample", "model", "--prompt", "it").stderr == "model: temperature 1, up to 64 tokens\n"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "NaN", "1e999"])
@pytest.mark.parametrize(
    "command",
    [
        ("plan", "train.toml", "--memory-gb"),
        ("sample", "model", "--prompt", "it", "--temperature"),
        ("compare", "model", "model", "--temperature"),
    ],
)
def test_numbers_on_the_command_line_are_finite(project, command, value):
    project.config()
    result = project.cli(*command, value)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert f"{value!r} is not a finite number" in result.stderr or "is not in the range" in result.stderr


def test_samples_that_cannot_be_had(project, reward_folders):
    project.refused(2, "give --prompt or --prompts", "sample", "model")
    both = ("--prompt", "it", "--prompts", "prompts.jsonl")
    project.refused(2, "--prompt and --prompts exclude each other", "sample", "model", *both)
    project.refused(2, "--prompt: is empty", "sample", "model", "--prompt", " ")
    project.refused(3, "nothing.jsonl: no such file", "sample", "model", "--prompts", "nothing.jsonl")
    run = reward_folders["adapters"].parent
    project.refused(3, "a reward model gives scores, it doesn't write", "sample", run, "--prompt", "it")
    assert project.cli("sample", "model", "--prompt", "it", "--temperature", -1).exit_code == 2


def test_comparisons(project, reward_folders):
    judge = reward_folders["folder"]
    project.done("train", project.config(reward=[{"kind": "model", "path": str(judge)}], critic={"kind": "head"}))
    shown = project.done("compare", "model", "runs/a", "--max-tokens", 5)
    assert shown.startswith("6 prompts, judged by folder reward model (rating points)\n")
    assert re.search(r"\n  model: mean [+-]\d+\.\d{3}, deviation \d+\.\d{3}\n  runs/a: mean ", shown)
    assert re.search(r"\nruns/a wins \d+\.\d% \(95 % interval \d+\.\d% to \d+\.\d%; ties count half\)\n$", shown)
    same = project.done("compare", "runs/a", "runs/a", "--max-tokens", 5)
    assert "runs/a wins 50.0%" in same
    given = ("--reward", reward_folders["adapters"], "--prompts", "prompts.jsonl", "--count", 2, "--max-tokens", 5)
    assert project.done("compare", "model", "model", *given).startswith("2 prompts, judged by adapters reward model")
    project.refused(
        2, "--reward: name a reward model's folder", "compare", "model", "model", "--prompts", "prompts.jsonl"
    )
    project.refused(2, "give --prompt", "compare", "model", "model", "--reward", judge)


def test_comparisons_by_a_function_and_by_a_model_that_is_asked(project):
    given = ("compare", "model", "model", "--prompts", "prompts.jsonl", "--max-tokens", 5)
    shown = project.done(*given, "--reward", "rule.py:letters")
    assert shown.startswith("6 prompts, judged by the function letters of rule.py\n  model: mean +0.")
    assert shown.endswith("model wins 50.0% (95 % interval 18.8% to 81.2%; ties count half)\n")
    project.done("train", project.config(optimizer={"learning_rate": 0.1}))
    both = ("compare", "model", "runs/a", "--judge", "model", "--criterion", "Which is longer?")
    shown = project.done(*both, "--reward", "rule.py:letters")
    assert "\n6 prompts, judged by model, asked in both orders: Which is longer?\n  the order alone decides " in shown
    assert len(re.findall(r"\nruns/a wins \d+\.\d% \(95 % interval", shown)) == 2
    assert re.search(r"\nboth judges prefer the same one in \d+\.\d% \(95 % interval .*\)\n$", shown)
    alone = project.done(*both)
    assert alone == "".join(shown.splitlines(keepends=True)[4:7]) and "wins 50.0%" not in alone


def test_comparisons_that_cannot_be_made(project):
    given = ("compare", "model", "model", "--prompts", "prompts.jsonl")
    project.refused(3, "nothing: no such folder", *given, "--judge", "nothing")
    project.refused(2, "nothing.py: no such file", *given, "--reward", "nothing.py:letters")
    project.refused(2, "isn't a reward function; write it as", *given, "--reward", "rule.py:not a name")
    (project.folder / "rule.py").write_text(
        "def letters(completions, answer):\n    return [0.0 for _ in completions]\n"
    )
    project.refused(2, "has a parameter 'answer'", *given, "--reward", "rule.py:letters")


def test_win_rates_against_known_values():
    """Wilson's interval for 7 of 10: 0.3968 to 0.8922 (Newcombe 1998's method 3)."""
    share, low, high, count = Rate.of([1.0] * 7 + [0.0] * 3)
    assert (share, round(low, 4), round(high, 4), count) == (0.7, 0.3968, 0.8922, 10)
    assert Rate.of([1.0, 0.5, 0.5, 0.0]).share == 0.5
    share, low, high, _ = Rate.of([1.0] * 10)
    assert share == 1.0 and high == pytest.approx(1.0) and round(low, 4) == 0.7225
    assert Rate.of([]) == (0.5, 0.0, 1.0, 0)


def test_init_copies_the_example_once(project):
    shown = project.done("init", "new")
    assert shown == "new is ready. Next: mlx-ppo train new/configs/reviews.toml\n"
    assert (project.folder / "new/models/reviews/config.json").is_file()
    assert not [path for path in project.folder.iterdir() if path.name.startswith(".")]
    assert "dry run: everything is in order" in project.done("train", "new/configs/reviews.toml", "--dry-run")
    project.refused(2, "new: already there and not an empty folder", "init", "new")
    project.refused(2, "rule.py: already there", "init", "rule.py")
    (project.folder / "empty").mkdir()
    project.done("init", "empty")


@pytest.mark.parametrize(
    "key", ["rollout.prompts", "rollout.samples_per_prompt", "rollout.max_tokens", "data.eval_count"]
)
@pytest.mark.parametrize("command", [("plan",), ("train", "--dry-run"), ("train",)])
def test_a_number_with_too_many_zeros_is_refused_soon(project, command, key):
    name, *options = command
    config = project.config(memory={"budget_gb": 2.0})
    shown = project.refused(2, "memory.budget_gb: ", name, config, *options, "--set", f"{key}=10000000000")
    assert re.search(r"answered together, whose numbers alone take \d+\.\d GiB of 2\.0", shown)


def test_a_dry_run_keeps_to_the_budget(project):
    config = project.config(memory={"budget_gb": 0.1})
    project.refused(2, "memory.budget_gb: the run needs", "train", config, "--dry-run")
    assert "memory: up to" in project.done("train", config, "--dry-run", "--set", "memory.budget_gb=2")


def test_a_working_folder_that_is_gone_is_told(project):
    gone = project.folder / "gone"
    gone.mkdir()
    for command in (
        ("train", "x.toml"),
        ("plan", "x.toml"),
        ("sample", "model", "--prompt", "it"),
        ("verify", "runs/a"),
    ):
        code = "import os, sys; os.chdir(sys.argv.pop(1)); os.rmdir('../gone')\n"
        code += "from mlx_ppo.cli.main import main; main()"
        gone.mkdir(exist_ok=True)
        done = subprocess.run([sys.executable, "-c", code, gone, *command], capture_output=True, text=True, timeout=240)
        assert done.returncode == 4 and done.stderr.startswith("error: the current folder can't be used"), done.stderr


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_that_cannot_be_written_is_an_error_in_a_line(project, option):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from mlx_ppo.cli.main import main; main()", option],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 4 and done.stderr == "error: No space left on device\n"


def test_the_file_that_is_planned_for_is_named_where_it_is_wrong(project):
    file = project.folder / "other.json"
    file.write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    project.refused(3, "other.json: mlx-lm cannot make this model", "plan", project.config(), "--model-config", file)
