"""Rules through the command line: trained by, compared by, refused."""

import pytest

NUMBER = {"kind": "rule", "rule": "number"}
NEVER = {"kind": "rule", "rule": "regex", "pattern": r"\A(?:(?:.|\s)+)+(?!.|\s)\b\B", "limit": 0.3, "weight": 0.1}


def sums(project):
    return project.jsonl("prompts.jsonl", [{"prompt": f"{a} and {b}", "answer": a + b} for a in (1, 2) for b in (1, 3)])


def test_a_policy_is_trained_by_rules_and_compared_by_them(project):
    sums(project)
    words = {"kind": "rule", "rule": "length", "least": 2, "unit": "characters", "weight": 0.5}
    project.done("train", project.config(reward=[NUMBER, words], data={"eval_count": 4}))
    rows = project.metrics()
    assert len(rows) == 3
    for row in rows:
        assert row["score"] == pytest.approx(row["score/number"] + 0.5 * row["score/length"], abs=1e-5)
        assert row["score/length"] > 0
    assert "judged by the rule 'number'" in project.done("compare", "model", "runs/a")
    assert "judged by the rule 'exact'" in project.done("compare", "model", "runs/a", "--reward", "rule:exact")
    project.refused(2, "no rule 'nmber'", "compare", "model", "runs/a", "--reward", "rule:nmber")
    project.refused(2, "pattern: missing", "compare", "model", "runs/a", "--reward", "rule:regex")


def test_a_gate_that_is_closed_leaves_nothing(project):
    sums(project)
    gate = {"kind": "rule", "rule": "regex", "pattern": "never written", "gate": True, "weight": 0.0}
    letters = {"kind": "function", "function": "rule.py:letters"}
    project.done("train", project.config(run={"iterations": 1}, reward=[letters, gate], data={"eval_count": 2}))
    (row,) = project.metrics()
    assert row["score/letters"] > 0 and row["score"] == 0 and row["score/regex"] == 0


def test_a_check_that_never_ends_is_reported_and_the_run_goes_on(project):
    config = project.config(
        run={"iterations": 1}, reward=[NEVER], rollout={"max_tokens": 40, "prompts": 2}, data={"eval_count": 1}
    )
    shown = project.cli("train", config)
    assert shown.exit_code == 0, shown.output
    assert "scored" in shown.output and "completions 0 as their check was ended" in shown.output
    assert len(project.metrics()) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rule": None}, "reward.0.rule: missing"),
        ({"rule": "nmber"}, "Did you mean 'number'?"),
        ({"tags": ["a"]}, "tags: isn't read by rule 'number'"),
        ({"pattern": "("}, "pattern: isn't a regular expression"),
        ({"timeout": 1.0}, "a rule has 'limit'"),
        ({"rule": "regex"}, "pattern: missing"),
        ({"rule": "length"}, "most: missing"),
        ({"rule": "length", "least": 3, "most": 2}, "least: more than the 2"),
        ({"rule": "format", "tags": ["a", "a"]}, "tags: must be different names"),
        ({"kind": "function", "rule": None, "function": "rule.py:letters", "limit": 1.0}, "limit: isn't read by"),
        ({"field": "right"}, "rule 'number' needs the field 'right' of the prompts"),
    ],
)
def test_what_does_not_go_together_is_refused(project, changes, words):
    sums(project)
    source = {key: value for key, value in {**NUMBER, **changes}.items() if value is not None}
    project.refused(2, words, "train", project.config(reward=[source], data={"eval_count": 4}), "--dry-run")
