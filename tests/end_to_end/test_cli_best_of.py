"""`best-of`: the table, the file for `sft`, and what is refused."""

import json
import math
import re

import numpy as np
import pytest

from mlx_ppo.best_of import Drawing, Drawn, best_of_each, choose, draw
from mlx_ppo.config.rewards import ScoreSection
from mlx_ppo.data.prompts import Prompt
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.roles import Roles, Source
from mlx_ppo.stages.rollout import Sampling

GIVEN = ("--prompts", "prompts.jsonl", "--reward", "rule.py:letters", "--max-tokens", 6)


def test_a_run_beside_the_best_of_what_it_began_from(project):
    project.done("train", project.config(rollout={"temperature": 0.5}, optimizer={"learning_rate": 0.05}))
    shown = project.done("best-of", "runs/a", "--n", 6)
    assert shown.startswith("runs/a: 6 prompts, 6 samples each of its reference, scored by letters\n")
    rows = re.findall(r"^ +(\d+|the run) +([+-]\d+\.\d{3}) +\S+ to \S+ +(-?\d+\.\d{3})$", shown, re.MULTILINE)
    assert [k for k, _, _ in rows] == ["1", "2", "4", "6", "the run"]
    scores = [float(score) for _, score, _ in rows[:4]]
    assert scores == sorted(scores) and scores[0] < scores[-1]
    assert float(rows[3][2]) == pytest.approx(math.log(6) - 5 / 6, abs=1e-3)
    assert "bound on best-of-k's" in shown and float(rows[4][2]) > 0
    found = json.loads(project.done("best-of", "runs/a", "--n", 6, "--json"))
    assert [f"{row['score']:+.3f}" for row in found["best_of"]] == [score for _, score, _ in rows[:4]]
    assert found["temperature"] == 0.5 and found["samples_of"] == "reference"
    assert f"{found['policy']['score']:+.3f}" == rows[4][1] and found["policy"]["kl_low"] < found["policy"]["kl"]
    own = json.loads(project.done("best-of", "runs/a", "--n", 4, "--json", "--policy"))
    assert own["samples_of"] == "policy" and "policy" not in own
    assert own["best_of"][0]["score"] == pytest.approx(found["policy"]["score"], rel=1e-5)  # the same four draws
    step = json.loads(project.done("best-of", "runs/a/checkpoints/000002", "--n", 6, "--json"))
    assert step["best_of"] == found["best_of"] and step["policy"]["score"] != found["policy"]["score"]


def test_penalties_of_the_run_count_and_a_reward_that_is_named_counts_alone(project):
    changes = {"score": {"truncated": "subtract", "truncated_value": 100.0}, "run": {"iterations": 1}}
    project.done("train", project.config(rollout={"max_tokens": 1}, **changes))
    given = ("best-of", "runs/a", "--n", 2, "--json")
    assert json.loads(project.done(*given))["best_of"][0]["score"] < -50
    assert json.loads(project.done(*given, "--reward", "rule.py:letters"))["best_of"][0]["score"] >= 0


def test_the_file_can_be_learned_from(project):
    result = project.cli("best-of", "model", *GIVEN, "--n", 8, "--output", "best.jsonl")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (project.folder / "best.jsonl").read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in (project.folder / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        letters = sum(c.isascii() and c.isalpha() for c in row["completion"])
        assert row["score"] == pytest.approx(letters / (1 + len(row["completion"])), rel=1e-5)
    found = json.loads(project.done("best-of", "model", *GIVEN, "--n", 8, "--json"))
    assert np.mean([row["score"] for row in rows]) == pytest.approx(found["best_of"][-1]["score"], rel=1e-5)
    cut = sum(not row["finished"] for row in rows)
    assert cut and f"; {cut} were cut at 6 tokens (--only-finished leaves such out)" in result.stdout
    assert (project.folder / "best.jsonl").stat().st_mode & 0o777 == 0o600
    config = project.config("sft", data={"train": "best.jsonl"}, sft={"epochs": 1})
    assert "training examples: 6," in project.done("sft", config, "--dry-run")
    project.refused(2, "--output: best.jsonl exists", "best-of", "model", *GIVEN, "--output", "best.jsonl")


def test_chats_keep_their_messages(project, tmp_path):
    model = project.folder / "chats"
    model.mkdir()
    for file in (project.folder / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": "the film"}]
    project.jsonl("chats.jsonl", [{"messages": messages}])
    given = ("--prompts", "chats.jsonl", "--reward", "rule.py:letters", "--n", 2, "--max-tokens", 4)
    project.done("best-of", "chats", *given, "--output", "best.jsonl")
    row = json.loads((project.folder / "best.jsonl").read_text())
    assert row["prompt"] == messages and isinstance(row["completion"], str)


def test_by_a_reward_model_and_by_a_rule(project, reward_folders):
    given = ("best-of", "model", "--prompts", "prompts.jsonl", "--n", 3, "--max-tokens", 4)
    for folder in reward_folders.values():
        assert "scored by reward\n" in project.done(*given, "--reward", folder)
    project.jsonl("sums.jsonl", [{"prompt": "the film", "answer": "film"}])
    shown = project.done(*given[:2], "--prompts", "sums.jsonl", "--reward", "rule:exact", "--n", 3)
    assert "1 prompt, 3 samples each of itself, scored by exact\n" in shown and "from one prompt" in shown
    project.done("sft", project.config("sft"))
    assert "scored by letters" in project.done("best-of", "runs/a", *GIVEN, "--n", 2)


def test_what_cannot_be_done(project, reward_folders):
    command = ("best-of", "model", "--prompts", "prompts.jsonl")
    project.refused(2, "--reward: say what scores", *command)
    project.refused(2, "--reward: names nothing", *command, "--reward", "")
    project.refused(3, "nothing", *command, "--reward", "nothing")
    project.refused(2, "no rule 'nothing'", *command, "--reward", "rule:nothing")
    project.refused(2, "needs the field 'answer'", *command, "--reward", "rule:exact")
    project.refused(2, "--temperature: at 0 every sample is the same", "best-of", "model", *GIVEN, "--temperature", 0)
    project.refused(2, "--only-finished: goes with --output", "best-of", "model", *GIVEN, "--only-finished")
    project.refused(2, "no/out.jsonl can't be written", "best-of", "model", *GIVEN, "--output", "no/out.jsonl")
    project.refused(2, "give --prompt or --prompts", "best-of", "model", "--reward", "rule.py:letters")
    project.refused(3, "a reward model gives scores", "best-of", reward_folders["adapters"].parent, *GIVEN)
    assert project.cli("best-of", "model", *GIVEN, "--n", 1).exit_code == 2


def test_the_choice_among_samples():
    drawn = Drawn(
        [["a", "b", "c"], ["a", " ", ""], [" ", "\n", ""], ["a", "b", "c"]],
        [[False, True, True], [False, True, True], [True] * 3, [False] * 3],
        np.array([[1.0, 1.0, 1.0], [0.0, 5.0, 6.0], [1.0, 2.0, 3.0], [1.0, 3.0, 3.0]]),
        np.zeros((4, 3)),
    )
    assert choose(drawn, only_finished=False) == [(0, 1), (1, 0), (3, 1)]
    assert choose(drawn, only_finished=True) == [(0, 1)]
    assert [best.k for best in best_of_each(drawn)] == [1, 2, 3]


def test_the_parts_don_t_matter(trunk, texts, monkeypatch):
    class Length:
        """Scores by length, and remembers nothing."""

        def score(self, prompts, completions, records):
            return [float(len(text)) for text in completions]

    prompts = [Prompt(tuple(trunk.tokenizer.encode(text, bos=True)), text, {"prompt": text}, text) for text in texts]
    roles = Roles(trunk, Weights({}), None, [Source("length", 1.0, Length())])
    drawing = Drawing(Sampling((0, "sample"), 5, 1.0, 3, batch_size=64), ScoreSection(), with_kl=True)
    done = []
    whole = draw(roles, Weights({}), prompts, drawing)
    monkeypatch.setattr("mlx_ppo.best_of._TOGETHER", 6)
    parts = draw(roles, Weights({}), prompts, drawing, on_part=done.append)
    assert done == [6, 12, 15] and parts.texts == whole.texts and parts.finished == whole.finished
    assert parts.scores.tolist() == whole.scores.tolist() == [[len(t) for t in row] for row in whole.texts]
    np.testing.assert_allclose(parts.kl, 0.0, atol=1e-5)  # who writes is the reference
