"""Judges beside people's own labels, and judges of comparisons, through the command line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "rewards"))
from judges import Handler, asking_for, sensible, serving, texts

PAIRS = [
    {"prompt": f"q {number}", "chosen": "long answer " * (1 + number % 3), "rejected": "short"} for number in range(12)
]
PAIRS += [{"prompt": f"r {number}", "chosen": "x", "rejected": "much longer"} for number in range(4)]


def told(project: Any, *arguments: object) -> dict[str, Any]:
    return json.loads(project.done("agreement", *arguments, "--json"))


def test_pairs(project):
    file = project.jsonl("pairs.jsonl", PAIRS)
    with serving() as server:
        found = told(project, file, "--judge", server.address, "--model", "m")
        assert found["pairs"] == 16 and found["questions"] == 32 and found["unusable"] == 0
        assert found["agreement"]["share"] == 12 / 16 and found["ties"] == 0
        assert found["agreement"]["low"] == pytest.approx(0.505, abs=1e-3)  # Wilson's, by hand
        assert found["first_shown_wins"]["share"] == 0.5 and found["order_decides"] == 0
        assert [document["max_tokens"] for document in server.asked] == [8] + 32 * [256]  # the trial is a short one
        assert found["requests"] == 32 and found["seconds_a_question"] > 0 and 0 < found["kappa"] < 1
        assert len({texts(document)["A"] for document in server.asked[1:][::2]}) > 1
        shown = project.done("agreement", file, "--judge", f"{server.address}#m", "--count", 8, "--seed", 1)
        assert "8 pairs, the judge m at" in shown and "Cohen's kappa" in shown and "seconds a question" in shown
        graded = told(project, file, "--judge", server.address, "--model", "m", "--mode", "pointwise")
        assert graded["mode"] == "pointwise" and "kappa" not in graded and graded["questions"] == 32


def test_a_judge_that_takes_what_it_is_shown_first(project):
    file = project.jsonl("pairs.jsonl", PAIRS)
    with serving(lambda *_: "A") as server:
        found = told(project, file, "--judge", server.address, "--model", "m")
    assert found["first_shown_wins"]["share"] == 1.0 and found["order_decides"] == 1.0
    assert found["agreement"]["share"] == 0.5 and found["ties"] == 1.0 and found["kappa"] == 0.0


def test_ratings_and_answers_of_no_use(project):
    rows = [{"text": "x" * number, "rating": number} for number in range(1, 9)]
    file = project.jsonl("rated.jsonl", rows)

    def mostly(handler: Handler, document: dict[str, Any]) -> str:
        return "hm" if texts(document).get("completion") == "xxx" else sensible(handler, document)

    with serving(mostly) as server:
        found = told(project, file, "--judge", server.address, "--model", "m")
        assert found["texts"] == 8 and found["unusable"] == 1 and found["rank_correlation"] == pytest.approx(1.0)
        assert found["ordered_alike"] == 1.0
        scaled = told(project, file, "--judge", server.address, "--model", "m", "--scale", 0, 5, "--rubric", "Kind?")
        assert scaled["unusable"] == 1 + 3  # 6, 7 and 8 are beyond the scale
        assert server.asked[-1]["messages"][0]["content"].startswith("Kind?")
        words = "has ratings, which are compared with grades"
        project.refused(2, words, "agreement", file, "--judge", server.address, "--model", "m", "--mode", "pairwise")


def test_a_function_and_a_rule_instead_of_a_judge(project):
    file = project.jsonl("pairs.jsonl", PAIRS)
    (project.folder / "long.py").write_text("def long(completions):\n    return [len(text) for text in completions]\n")
    found = told(project, file, "--reward", "long.py:long")
    assert found["reward"] == "the function long of long.py" and found["pairs"] == 16 and found["ties"] == 0
    assert found["agreement"]["share"] == 12 / 16 and "requests" not in found
    rows = [{"text": "x" * number, "rating": number if number < 5 else 0} for number in range(1, 6)]
    rated = project.jsonl("rated.jsonl", rows)
    found = told(project, rated, "--reward", "long.py:long")
    assert found["texts"] == 5 and found["rank_correlation"] == pytest.approx(0.0)  # ranks 2 3 4 5 1, by hand
    assert found["ordered_alike"] == 6 / 10
    sums = [{"prompt": "1 + 1?", "answer": "2", "chosen": "It is 2.", "rejected": "It is 3."}]
    sums += [{"prompt": "1 + 2?", "answer": "3", "chosen": "Four", "rejected": "Five"}]
    shown = project.done("agreement", project.jsonl("sums.jsonl", sums), "--reward", "rule:number")
    assert "2 pairs, the rule 'number'" in shown and "prefers neither on         50.0%" in shown
    assert "75.0% (95 % interval" in shown and "seconds" not in shown
    project.refused(2, "answer", "agreement", file, "--reward", "rule:number")


def test_a_reward_model_instead_of_a_judge(project, reward_folders):
    for placement, base in (("adapters", ("--model", "model")), ("folder", ())):
        found = told(project, "ratings.jsonl", "--reward", reward_folders[placement], *base)
        report = json.loads((reward_folders[placement].parent / "report.json").read_text())["training"]
        assert found["texts"] == 8 and found["rank_correlation"] > 0.5
        assert found["ordered_alike"] == pytest.approx(report["accuracy_all"])  # the same pairs, in another way
    words = "these are adapters for a trunk; give the trunk's folder as the model"
    project.refused(3, words, "agreement", "ratings.jsonl", "--reward", reward_folders["adapters"])


def test_a_judge_that_asks_for_a_key(project, monkeypatch):
    file = project.jsonl("pairs.jsonl", PAIRS)
    with serving(asking_for("a-secret/key")) as server:
        where = ("--judge", f"{server.address}#m")
        project.refused(4, "asks for a key; name the variable", "agreement", file, *where)
        project.refused(2, "MY_KEY isn't set", "agreement", file, *where, "--key-env", "MY_KEY")
        monkeypatch.setenv("MY_KEY", "another/key")
        shown = project.refused(4, "HTTP 401", "agreement", file, *where, "--key-env", "MY_KEY")
        assert "another" not in shown and "Bearer [key]" in shown
        monkeypatch.setenv("MY_KEY", "a-secret/key")
        assert told(project, file, *where, "--key-env", "MY_KEY")["agreement"]["share"] == 12 / 16


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "give either a judge's address or, by --reward"),
        (["--judge", "http://127.0.0.1:9/v1#m", "--reward", "rule:exact"], 2, "give either a judge's address"),
        (["--reward", "rule:exact", "--key-env", "X"], 2, "--key-env: isn't read with --reward rule:exact"),
        (["--reward", "rule:exact", "--model", "model"], 2, "--model: isn't read with --reward rule:exact"),
        (["--reward", "nothing"], 3, "nothing"),
        (
            ["--judge", "http://127.0.0.1:9/v1#m", "--key-env", "sk-12"],
            2,
            "key_env: must be the name of an environment",
        ),
        (["--judge", "http://127.0.0.1:9/v1"], 2, "--judge: which model? Write ADDRESS#MODEL"),
        (["--judge", "http://192.0.2.1:9/v1#m"], 2, "isn't this machine's loopback address"),
        (["--judge", "model", "--model", "m"], 2, "isn't an http address"),
        (["--judge", "http://127.0.0.1:9/v1#m", "--model", "n"], 2, "name one"),
        (["--judge", "http://127.0.0.1:9/v1#m", "--scale", 3, 2], 2, "scale: must be the worst"),
        (["--judge", "http://127.0.0.1:9/v1#m", "--scale", "nan", 2], 2, "two finite numbers"),
        (["--judge", "http://127.0.0.1:9/v1#m", "--column", "x"], 2, "must be NAME=COLUMN"),
        (["--judge", "http://127.0.0.1:9/v1#m"], 4, "can't be reached: nobody listens there"),
        (["--judge", "http://127.0.0.1:9/v1#a:cloud"], 2, "Ollama runs elsewhere"),
        (["--judge", "http://127.0.0.1:9/v1#m", "--as", "ratings"], 3, "rating"),
    ],
)
def test_what_is_refused(project, arguments, code, words):
    project.refused(code, words, "agreement", project.jsonl("pairs.jsonl", PAIRS), *arguments)


def test_other_files(project):
    with serving() as server:
        where = ("--judge", f"{server.address}#m")
        project.refused(3, "no such file", "agreement", "nothing.jsonl", *where)
        same = project.jsonl("same.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}])
        project.refused(3, "same.jsonl:1: 'chosen' and 'rejected' are the same", "agreement", same, *where)
        arena = [{"prompt": "p", "response_a": "aaaa", "response_b": "b", "winner": "model_a"}]
        found = told(project, project.jsonl("arena.jsonl", arena), *where)
        assert found["agreement"]["share"] == 1.0 and found["pairs"] == 1


def test_a_comparison_is_judged_by_a_server(project):
    project.done("train", project.config(run={"iterations": 1}))
    options = ("--count", 4, "--max-tokens", 6)
    with serving() as server:
        shown = project.done(
            "compare", "model", "runs/a", "--judge", f"{server.address}#m", "--criterion", "Longer?", *options
        )
        assert f"4 prompts, judged by the judge m at {server.address}, asked in both orders: Longer?" in shown
        assert "the order alone decides 0.0% of its answers" in shown and "runs/a wins" in shown
        assert server.asked[-1]["messages"][0]["content"].startswith("Longer?")
        both = project.done(
            "compare", "model", "runs/a", "--judge", f"{server.address}#m", "--reward", "rule.py:letters", *options
        )
        assert "both judges prefer the same one in" in both
        source = {"kind": "judge", "address": server.address, "model": "own", "rubric": "Is it long?", "retries": 0}
        project.done("train", project.config(run={"iterations": 1, "name": "b"}, reward=[source]))
        shown = project.done("compare", "model", "runs/b", *options)
        assert "judged by the judge own at" in shown and shown.count("Is it long?") == 1
    project.refused(2, "which model?", "compare", "model", "runs/a", "--judge", server.address)
    project.refused(4, "nobody listens there", "compare", "model", "runs/a", "--judge", f"{server.address}#m")


def test_a_comparison_by_a_judge_that_asks_for_a_key(project, monkeypatch):
    given = ("compare", "model", "model", "--prompts", "prompts.jsonl", "--count", 4, "--max-tokens", 6)
    with serving(asking_for("a-secret/key")) as server:
        where = ("--judge", f"{server.address}#m")
        project.refused(4, "asks for a key; name the variable that holds it by 'key_env'", *given, *where)
        project.refused(2, "MY_KEY isn't set; put the judge's key in it", *given, *where, "--key-env", "MY_KEY")
        monkeypatch.setenv("MY_KEY", "two words")
        shown = project.refused(2, "what MY_KEY holds can't be sent", *given, *where, "--key-env", "MY_KEY")
        assert "two words" not in shown
        monkeypatch.setenv("MY_KEY", "another/key")
        shown = project.refused(4, "HTTP 401", *given, *where, "--key-env", "MY_KEY")
        assert "another" not in shown and "Bearer [key]" in shown
        shown = project.refused(2, "must be the name of an environment variable", *given, *where, "--key-env", "sk-12")
        assert "sk-12" not in shown
        monkeypatch.setenv("MY_KEY", "a-secret/key")
        before = project.everything()
        shown = project.cli(*given, *where, "--key-env", "MY_KEY")
        assert shown.exit_code == 0 and "wins 50.0%" in shown.output and "a-secret" not in shown.output
        assert project.everything() == before
    words = "--key-env: goes with --judge ADDRESS#MODEL"
    for judge in ((), ("--judge", "model")):
        project.refused(2, words, *given, *judge, "--reward", "rule.py:letters", "--key-env", "MY_KEY")


def test_pairs_without_a_usable_answer_are_ties(project):
    with serving(
        lambda _, document: "hm" if "A" in texts(document) and texts(document)["prompt"] == "it was" else "A"
    ) as server:
        arguments = ("--judge", f"{server.address}#m", "--count", 6, "--max-tokens", 6)
        shown = project.done("compare", "model", "model", "--prompts", "prompts.jsonl", *arguments)
        assert "2 of its 12 answers can't be used; their pairs count as ties" in shown
