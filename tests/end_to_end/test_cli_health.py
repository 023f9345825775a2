"""Runs that go wrong: what the terminal, the log, the closing table and the exit code say; stopping, and going back."""

import json

import mlx.core as mx
import pytest
from test_cli_resume import stop
from thorough import mostly

from mlx_ppo import train
from mlx_ppo.api import load_policy, train_policy
from mlx_ppo.cli.display import Display
from mlx_ppo.cli.work import Answers
from mlx_ppo.errors import UnhealthyError
from mlx_ppo.runs.folder import HEALTH, RECORD

QUIET = {"unfinished": "off", "ratio": "off", "critic": "off"}  # the tiny model never ends a text


def sick(project, **changes):
    """A run whose rate tears the policy from the reference at once."""
    sections = {
        "run": {"iterations": 8, "evaluate_every": 2, "keep_last": 8},
        "rollout": {"prompts": 6, "max_tokens": 12},
        "optimizer": {"learning_rate": 0.1},
        "kl": {"coef": 0.0},
        "health": QUIET,
        "memory": {"budget_gb": 2.0},
    }
    return project.config(
        **{name: {**sections.get(name, {}), **changes.get(name, {})} for name in {*sections, *changes}}
    )


def health(project, name="a"):
    return [json.loads(line) for line in (project.run(name) / HEALTH).read_text().splitlines()]


def same(one, other):
    """Whether two places hold the same policy."""
    arrays, others = (load_policy(place).weights.arrays for place in (one, other))
    return all(mx.array_equal(arrays[name], others[name]).item() for name in arrays)


def test_what_is_wrong_is_said_once_logged_and_stands_above_the_table(project):
    shown = project.done("train", sick(project))
    (row,) = health(project)
    assert (row["step"], row["rule"], row["key"], row["level"]) == (4, "kl", "kl.coef", "warn")
    during, after = shown.split("iteration 8/8")
    assert during.count(f"health.kl: {row['sentence']}") == 1 == during.count("health.")
    assert "health.kl: KL ran away to " in after.split("held-out prompts")[0]
    assert "everything is as recorded" in project.done("verify", "runs/a")


def test_what_is_wrong_is_shown_before_the_table(capsys):
    found = Answers({"score": 1.0}, [("it", " was", 1.0)])
    Display().before_and_after(found, found, ["THE POLICY COLLAPSED", "health.kl: [bold]\x1b"])
    shown = capsys.readouterr().out
    assert shown.index("THE POLICY COLLAPSED") < shown.index("health.kl: [bold]\\x1b") < shown.index("held-out prompts")


def test_a_rule_that_stops_ends_the_run_with_its_own_code_and_saves_it(project):
    result = project.cli("train", sick(project, health={**QUIET, "kl": "stop"}))
    assert result.exit_code == 5 and "held-out prompts" in result.stdout
    words = "error: stopped by health.kl after iteration 4; saved in runs/a/checkpoints/000004. KL ran away to "
    assert result.stderr.splitlines()[-1].startswith(words)
    assert result.stderr.rstrip().endswith("mlx-ppo resume runs/a --allow-config-change")
    assert project.steps() == [1, 2, 3, 4] and [row["step"] for row in health(project)] == [4]
    assert "everything is as recorded" in project.done("verify", "runs/a")
    project.done("resume", "runs/a")
    assert project.steps()[-1] == 8
    project.done("train", sick(project, run={"name": "b"}))
    assert (
        project.checkpoints()["000008/adapters.safetensors"] == project.checkpoints("b")["000008/adapters.safetensors"]
    )


@pytest.mark.parametrize("level", ["stop", "best"])
def test_a_run_that_is_killed_while_a_rule_ends_it_ends_when_it_is_resumed(project, monkeypatch, level):
    config = sick(project, health={**QUIET, "kl": level})
    evaluate = train.evaluate

    def killed(*given):
        if (project.run() / HEALTH).exists():
            raise ZeroDivisionError
        return evaluate(*given)

    monkeypatch.setattr(train, "evaluate", killed)
    assert isinstance(project.cli("train", config).exception, ZeroDivisionError)
    monkeypatch.undo()
    result = project.cli("resume", "runs/a")
    assert (
        result.exit_code == 5
        and "stopped by health.kl after iteration 4; saved in runs/a/checkpoints/" in result.stderr
    )
    assert project.steps() == [1, 2, 3, 4] and [row["step"] for row in health(project)] == [4]


def test_going_back_to_the_best_evaluation(project):
    result = project.cli("train", sick(project, health={**QUIET, "kl": "best"}))
    assert result.exit_code == 5 and "back to the best evaluation, after iteration 2" in result.stdout
    assert "saved in runs/a/checkpoints/000002" in result.stderr
    assert project.steps() == [1, 2, 3, 4] and json.loads((project.run() / RECORD).read_text())["policy"] == 2
    assert "everything is as recorded" in project.done("verify", "runs/a")
    best, last = (project.run() / "checkpoints" / name for name in ("000002", "000004"))
    assert same(project.run(), best) and not same(project.run(), last)
    config = project.run() / "config.toml"
    config.write_text(config.read_text().replace('kl = "best"', 'kl = "off"'))
    shown = project.done("resume", "runs/a", "--allow-config-change")
    assert "resuming after iteration 2 of 8" in shown and project.steps() == list(range(1, 9))
    assert json.loads((project.run() / RECORD).read_text())["policy"] is None and health(project) == []
    assert not same(project.run(), best)


def test_going_back_without_an_evaluation_is_refused(project):
    config = sick(project, health={"kl": "best"}, run={"evaluate_every": 0})
    project.refused(2, "health.kl: 'best' goes back to an evaluation; set run.evaluate_every", "train", config)


@pytest.mark.parametrize("at", mostly([2, 4, 6], (4,)))
def test_a_resumed_run_says_what_an_uninterrupted_one_says(project, at):
    config = sick(project, health={"kl_limit": 0.5})
    project.done("train", config)
    stop(project, "train", config, "b", at=at)
    project.done("resume", "runs/b")
    assert health(project) == health(project, "b") != []
    assert project.checkpoints() == project.checkpoints("b")


def test_rules_change_no_byte_of_the_training(project):
    project.done("train", sick(project))
    levels = dict.fromkeys(("entropy", "kl", "length", "repetition", "diversity", "signal"), "off")
    project.done("train", sick(project, health={**QUIET, **levels}, run={"name": "b"}))
    assert not (project.run("b") / HEALTH).exists()
    assert project.metrics() == project.metrics("b") and project.checkpoints() == project.checkpoints("b")


def test_from_python_a_stopped_run_is_an_error_that_names_its_folder(project):
    config = sick(project, health={**QUIET, "kl": "stop"})
    with pytest.raises(UnhealthyError, match=r"runs/a: stopped by health\.kl, saved: KL ran away"):
        train_policy(config, [f"run.folder={project.folder / 'runs'}"])
    assert project.steps()[-1] == 4
