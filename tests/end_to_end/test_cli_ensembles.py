"""`reward --ensemble`: from the command to PPO, and back after a stop."""

import json

from project import Project


def test_an_ensemble_is_trained_used_planned_and_verified(project: Project) -> None:
    said = project.done("reward", project.config("reward", model={"train": "lora"}), "--ensemble=3")
    assert "member 3 of 3, epoch 3 of 3" in said
    assert "calibration" in (project.run() / "report.txt").read_text()
    project.done("verify", "runs/a")
    reward = [{"kind": "model", "path": "runs/a/reward"}]
    config = project.config(run={"name": "p"}, reward=reward, score={"combine": "cautious", "caution": 2.0})
    planned = json.loads(project.done("plan", config, "--json"))
    assert planned
    project.done("train", config)
    rows = project.metrics("p")
    assert all(row["disagreement/reward"] > 0 for row in rows)
    for row in rows:
        assert row["score"] < row["score/reward"], "the members' deviation is subtracted"
    project.done("verify", "runs/p")
    project.done("compare", "model", "runs/p", "--count=2")


def test_whole_models_are_an_ensemble_too(project: Project) -> None:
    project.done("reward", project.config("reward", model={"train": "full"}), "--ensemble=2")
    config = project.config(run={"name": "p", "iterations": 1}, reward=[{"kind": "model", "path": "runs/a/reward"}])
    project.done("train", config)
    assert project.metrics("p")[0]["disagreement/reward"] > 0


def test_what_is_no_number_of_members_is_refused(project: Project) -> None:
    config = project.config("reward")
    assert project.cli("reward", config, "--ensemble=0").exit_code == 2
    project.refused(2, "reward_training.members", "reward", config, "--set=reward_training.members=101")
