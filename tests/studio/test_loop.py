"""The whole loop in a real browser, from an empty folder, by clicks and keys only."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from pages import Page, shorter, until

from mlx_ppo.runs import checkpoint

pytestmark = pytest.mark.slow
LABELS, ITERATIONS, COMPARED = 100, 15, 40


def test_a_taste_given_by_keys_moves_the_policy(serve, browser, tmp_path: Path) -> None:
    """100 labels of a rater who likes few words; then the policy writes fewer, and this rater prefers it blind."""
    project = tmp_path / "project"
    served = serve(project)
    page = Page(browser)
    page.open(served.url)
    page.step(0)
    page.click("#use-example")
    page.done(0)
    page.done(1)
    page.step(2)
    page.click("#to-label")
    page.label(LABELS, shorter)
    page.click("header .name")
    assert "99 answers" in page.done(2) or "100 answers" in page.done(2)
    page.step(3)
    page.click("#train-reward")
    said = page.done(3, 300)
    accuracy = int(re.search(r"(\d+)\s% right on held-out labels", said)[1])
    page.step(4)
    page.value("#iterations", str(ITERATIONS))
    page.click("#train-policy")
    run = project / "runs/policy-1"
    until(lambda: checkpoint.steps(run), "a checkpoint", 600)
    served.end(signal.SIGKILL)
    command = json.loads(next(project.glob(".studio/jobs/*-train/process.json")).read_text())["command"]
    os.kill(command, signal.SIGKILL)  # and the job: it goes on from its checkpoint
    served = serve(project)
    page.open(served.url)
    page.click(".jobrow > button")
    until(lambda: checkpoint.steps(run)[-1] == ITERATIONS, "the last checkpoint", 600)
    until(lambda: "finished" in page.text("#summary-4"), "the end of the job", 120)
    page.step(5)
    page.click("#to-compare")
    page.label(COMPARED, shorter)
    page.click("header .name")
    said = page.done(5)
    wins = int(re.search(r"preferred in (\d+)\s%", said)[1])
    print(f"accuracy on held-out labels {accuracy} %, win rate over the start {wins} %")
    assert accuracy >= 70 and wins >= 65
    page.step(6)
    page.click("#next-round")
    until(lambda: "round 2" in page.text("#summary-2"), "the second round")
    page.step(2)
    page.click("#to-label")
    page.label(2, shorter)
    rows = [json.loads(line) for line in (project / "feedback/answers.jsonl").read_text().splitlines()]
    assert {row["left_by"] for row in rows if row["set"] == "round-2"} == {"runs/policy-1"}
