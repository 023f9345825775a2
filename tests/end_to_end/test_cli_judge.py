"""Policies trained by a judge in another process: alike however it answers, saved when it is lost, and then resumed."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_cli_walls import CALLS, MAIN, reaching_out, tracer

sys.path.insert(0, str(Path(__file__).parents[1] / "rewards"))
from judges import Handler, asking_for, sensible, serving, slowly, texts

from mlx_ppo.rewards.judge_answers import ANSWERS


def judged(project, address, *, iterations=3, samples=1, name="a", every=0, **settings):
    source = {"kind": "judge", "address": address, "model": "m", "timeout": 20.0, "retries": 0, **settings}
    run = {"iterations": iterations, "name": name, "evaluate_every": every, "save_every": 2}
    ppo = {"advantage": "gae" if samples == 1 else "grpo"}
    return project.config(reward=[source], run=run, rollout={"samples_per_prompt": samples}, ppo=ppo)


def failing_after(count, answer):
    """Sensible answers to so many questions, then others."""
    seen: list[str] = []

    def one(handler: Handler, document: dict[str, Any]) -> str | None:
        seen.append("")
        return sensible(handler, document) if len(seen) <= count else answer(handler, document)

    return one


@pytest.mark.parametrize("mode", ["pointwise", "pairwise", "groupwise"])
def test_a_policy_is_trained_by_a_judge(project, mode):
    with serving() as server:
        shown = project.done("train", judged(project, server.address, mode=mode, samples=2))
        assert f"scores: the judge m at {server.address}, {mode}" in shown
        assert ("neither shows progress" in shown) == (mode != "pointwise")
        rows = project.metrics()
        assert len(rows) == 3 and all(row["unusable/judge"] == 0 for row in rows)
        assert all(row["score"] == row["score/judge"] for row in rows) and rows[0]["deviation/judge"] > 0
        assert len(server.questions) == len(set(server.questions)), "something was asked twice"
    logged = [json.loads(line) for line in (project.run() / "metrics.jsonl").read_text().splitlines()]
    assert all(row["seconds/score judge"] > 0 for row in logged)
    assert (project.run() / ANSWERS).stat().st_mode & 0o077 == 0
    project.done("verify", "runs/a")


def test_how_many_are_asked_at_once_and_how_slowly_they_answer_decides_nothing(project):
    with serving() as server:
        project.done("train", judged(project, server.address, parallel=1))
        one = project.metrics(), {n: b for n, b in project.checkpoints().items() if n.endswith("safetensors")}

    def late(handler: Handler, document: dict[str, Any]) -> str:
        time.sleep(0.03 * (len(texts(document).get("completion", "")) % 3))
        return sensible(handler, document)

    with serving(late) as server:
        project.done("train", judged(project, server.address, parallel=8, name="b"))
        two = project.metrics("b"), {n: b for n, b in project.checkpoints("b").items() if n.endswith("safetensors")}
    assert one == two


@pytest.mark.parametrize(
    ("asked", "every"),
    [(2, 0), (5, 0), (9, 0), (13, 0), (10, 1), (12, 2)],
    ids=["before training", "first iteration", "second", "last", "evaluation", "later evaluation"],
)
def test_a_judge_that_is_lost_costs_nothing(project, asked, every):
    """Wherever it is lost, the run ends as one that never lost it, and nothing is asked twice."""
    with serving() as server:
        project.done("train", judged(project, server.address, every=every, name="whole", iterations=4))
        whole = len(server.questions)
    with serving(failing_after(asked, lambda *_: None)) as server:  # then it closes without a word
        port, config = server.server_address[1], judged(project, server.address, every=every, iterations=4)
        shown = project.refused(4, f"the judge m at {server.address} was lost", "train", config, left=True)
        assert shown.rstrip().endswith("The run is saved; once the judge answers, go on with: mlx-ppo resume runs/a")
        answered = len((project.run() / ANSWERS).read_text().splitlines())
    project.refused(4, "was lost: nobody listens there", "resume", "runs/a", left=True)
    with serving(port=port) as server:
        project.done("resume", "runs/a")
        assert len(server.questions) == whole - answered
    assert project.metrics() == project.metrics("whole") and project.samples() == project.samples("whole")
    weights = {name: content for name, content in project.checkpoints().items() if "000004" in name}
    expected = {name: content for name, content in project.checkpoints("whole").items() if "000004" in name}
    assert {n for n in expected if weights.get(n) != expected[n]} <= {"000004/manifest.json", "000004/state.json"}
    project.done("verify", "runs/a")


def test_a_key_is_sent_and_kept_nowhere(project, monkeypatch):
    key = "sk-0123456789abcdef/+="
    with serving(asking_for(key)) as server:
        config = judged(project, server.address, key_env="MLX_PPO_TEST_KEY", iterations=2)
        project.refused(2, "MLX_PPO_TEST_KEY isn't set; put the judge's key in it", "train", config)
        monkeypatch.setenv("MLX_PPO_TEST_KEY", "a key")
        project.refused(2, "what MLX_PPO_TEST_KEY holds can't be sent", "train", config)
        monkeypatch.setenv("MLX_PPO_TEST_KEY", key)
        shown = project.cli("train", config)
        assert shown.exit_code == 0 and key not in shown.output
    content = {name: text for name, text in project.everything().items() if text is not None}
    assert not [name for name, text in content.items() if b"0123456789abcdef" in text]
    assert [name for name, text in content.items() if b"MLX_PPO_TEST_KEY" in text and name.endswith("run.json")]


def test_a_judge_that_is_not_there_stops_before_anything_is_made(project):
    with serving() as server:
        address = server.address
    words = f"the judge m at {address} can't be reached: nobody listens there; start its server or mend the address"
    project.refused(4, words, "train", judged(project, address))
    project.refused(4, words, "train", judged(project, address), "--dry-run")


def test_a_judge_that_talks_nonsense_stops_the_run_and_the_answers_before_are_kept(project):
    with serving(failing_after(8, lambda *_: "I'd rather not say.")) as server:
        config = judged(project, server.address, unusable=0.4)
        shown = project.refused(
            4, "questions without a usable answer; the first: no number from 0 to 10", "train", config, left=True
        )
        assert "I'd rather not say." in shown and "resume runs/a" in shown
        port = server.server_address[1]
    with serving(port=port) as server:
        project.done("resume", "runs/a")
    assert len(project.metrics()) == 3


def test_answers_of_no_use_are_said_and_logged(project):
    def sometimes(handler: Handler, document: dict[str, Any]) -> str:
        completion = texts(document).get("completion", "")
        return "hm" if len(completion) % 5 == 0 else sensible(handler, document)

    with serving(sometimes) as server:
        shown = project.done("train", judged(project, server.address, unusable=0.95, retries=1))
    rows = project.metrics()
    assert any(row["unusable/judge"] > 0 for row in rows) and all(row["unusable/judge"] < 1 for row in rows)
    assert re.search(
        r"warning: the judge m at \S+ gave no usable answer to \d of \d questions; \d completions have", shown
    )


def test_a_signal_while_a_judge_thinks_saves_the_run(project):
    with serving(failing_after(6, slowly(15.0))) as server:
        process = project.start("train", judged(project, server.address, timeout=60.0))
        while len(server.asked) < 8 and process.poll() is None:
            time.sleep(0.05)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
        assert process.returncode == 130, shown
        assert "saved. Go on with: mlx-ppo resume" in shown and time.monotonic() - began < 10
    assert project.steps() != []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"address": None}, "reward.0.address: missing"),
        ({"model": None}, "reward.0.model: missing: name the judge"),
        ({"model": "gpt-oss:120b-cloud"}, "is a model that Ollama runs elsewhere"),
        ({"address": "http://192.0.2.1:80/v1"}, "'192.0.2.1' isn't this machine's loopback address"),
        ({"address": "https://127.0.0.1:80/v1"}, "there is no TLS"),
        ({"mode": "pairwise"}, "set rollout.samples_per_prompt to 2 or more"),
        ({"mode": "groupwise"}, "set rollout.samples_per_prompt to 2 or more"),
        ({"scale": [5, 5]}, "reward.0.scale: must be the worst and the best grade"),
        ({"rubric": " "}, "reward.0.rubric: is empty"),
        ({"key_env": "sk-0123"}, "key_env: must be the name of an environment variable with the key, never the key"),
        ({"gate": True}, "a judge's 0 is a score like any other"),
        ({"path": "model"}, "path: belongs to another kind of reward"),
        ({"rule": "exact"}, "rule: belongs to another kind of reward"),
        ({"tags": ["a"]}, "tags: isn't read by a reward of kind 'judge'"),
        ({"kind": "function", "function": "rule.py:letters"}, "address: belongs to another kind of reward"),
        ({"mode": "listwise"}, "must be one of 'pointwise', 'pairwise', 'groupwise'"),
    ],
)
def test_what_does_not_go_together_is_refused(project, changes, words):
    source = {"kind": "judge", "address": "http://127.0.0.1:9/v1", "model": "m", **changes}
    source = {key: value for key, value in source.items() if value is not None}
    project.refused(2, words, "train", project.config(reward=[source]))


def test_going_back_to_the_best_evaluation_needs_more_than_comparisons(project):
    source = {"kind": "judge", "address": "http://127.0.0.1:9/v1", "model": "m", "mode": "pairwise"}
    changes = {"rollout": {"samples_per_prompt": 2}, "health": {"entropy": "best"}, "run": {"evaluate_every": 1}}
    words = "health.entropy: 'best' goes back to an evaluation, of which a judge that compares says nothing"
    project.refused(2, words, "train", project.config(reward=[source], **changes))


def test_a_flipped_bit_among_the_answers_is_found(project):
    with serving() as server:
        project.done("train", judged(project, server.address))
    file = project.run() / ANSWERS
    lines = file.read_text().splitlines()
    lines[1] = re.sub(r'"value": [\d.]+', '"value": 0.95', lines[1])
    file.write_text("\n".join(lines) + "\n")
    project.refused(4, f"{ANSWERS}:2: damaged", "verify", "runs/a")


@pytest.mark.slow
def test_two_processes_ask_as_one(project):
    with serving() as server:
        config = judged(project, server.address)
        project.done("train", config)
        alone = len(server.questions)
        server.asked.clear()
        project.done("train", config, "--set", "parallel.processes=2", "--set", "run.name=two")
        assert len(server.questions) == alone
    scores = [[row["score"] for row in project.metrics(name)] for name in ("a", "two")]
    assert scores[0][0] == scores[1][0]


@pytest.mark.slow
@pytest.mark.skipif(not tracer(), reason="strace isn't installed, or may not trace")
def test_one_address_is_connected_to_and_no_other(project):
    with serving() as server:
        config = judged(project, server.address.replace("127.0.0.1", "localhost"), iterations=1)
        trace = project.folder / "trace"
        command = [*tracer(), f"--output={trace}", sys.executable, "-c", MAIN, "train", str(config)]
        done = subprocess.run(
            [*command, "--set", "parallel.processes=1"], cwd=project.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert len(server.questions) > 0
        port = server.server_address[1]
    assert "connect" in CALLS and reaching_out(trace.read_text()) == []
    found = re.findall(
        r"connect\(\d+, \{sa_family=AF_INET6?, sin6?_port=htons\((\d+)\).*?\"([\d.:]+)\"", trace.read_text()
    )
    assert set(found) == {(str(port), "127.0.0.1")}
