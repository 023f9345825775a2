"""`evaluate`: tasks of lm-evaluation-harness before and after training; refused where it isn't installed."""

import json
import math
from importlib.util import find_spec

import pytest
from project import write_task

from mlx_ppo.cli import harness

installed = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval isn't installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_without_the_harness_it_is_refused(project, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    words = "lm-evaluation-harness isn't installed: pip install lm_eval"
    project.refused(2, words, "evaluate", "model", "--tasks", "kind", "--output", "new.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", ", "], "--tasks: names none"),
        (["--tasks", "kind", "--include", "nothing"], "--include: nothing isn't a folder"),
    ],
)
def test_what_is_refused_in_any_case(project, arguments, words):
    project.refused(2, words, "evaluate", "model", *arguments)


@pytest.mark.slow
@installed
def test_before_and_after(project):
    where = ("--tasks", "kind", "--include", write_task(project))
    project.done("sft", project.config("sft", sft={"epochs": 12}, optimizer={"learning_rate": 2e-2}))
    found = json.loads(project.done("evaluate", "runs/a", *where, "--output", "found.json", "--json"))
    assert json.loads((project.folder / "found.json").read_text()) == found
    assert found["base"].endswith("/model") and found["chat_template"] is False
    result = found["tasks"]["kind"]
    assert result["documents"] == 4 and set(result["figures"]) == {"acc", "acc_norm"}
    row = result["figures"]["acc"]
    assert row["difference"] == row["after"] - row["before"] and row["difference_error"] is not None
    alone = json.loads(project.done("evaluate", "model", *where, "--json"))
    assert alone["base"] is None and "before" not in alone["tasks"]["kind"]["figures"]["acc"]
    assert alone["tasks"]["kind"]["figures"]["acc"]["after"] == row["before"]
    same = project.done("evaluate", "runs/a", "--base", "runs/a", *where, "--limit", 3)
    line = next(line for line in same.splitlines() if line.startswith("kind (3, 0 shots)  acc "))
    assert line.endswith("+0.0000 ± 0.0000")
    project.refused(2, "found.json exists", "evaluate", "model", *where, "--output", "found.json")


@pytest.mark.slow
@installed
def test_tasks_that_cannot_be_read(project):

    def refused(code: int, words: str, *arguments: object) -> None:
        """Libraries may show a bar first; the last line is the error."""
        before = project.everything()
        result = project.cli(*arguments)
        assert result.exit_code == code and isinstance(result.exception, SystemExit), result.output
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and words in last and "Traceback" not in result.stderr
        assert project.everything() == before

    folder = write_task(project)
    where = ("--include", folder, "--output", "new.json")
    refused(2, "--tasks: lm_eval knows no 'kinder'", "evaluate", "model", "--tasks", "kind,kinder", *where)
    task = (folder / "kind.yaml").read_text()
    (folder / "far.yaml").write_text(task.replace("task: kind", "task: far").replace("path: json", "path: a/far-set"))
    words = "the task far: its data aren't on this machine, and nothing is fetched"
    refused(3, words, "evaluate", "model", "--tasks", "far", *where)
    (folder / "lost.yaml").write_text(task.replace("task: kind", "task: lost").replace("kind.jsonl", "lost.jsonl"))
    refused(3, "the task lost: ", "evaluate", "model", "--tasks", "lost", *where)
    sampled = task.replace("task: kind", "task: sampled").replace("multiple_choice", "generate_until")
    sampled = sampled.replace("metric: acc}, {metric: acc_norm}", "metric: exact_match}")
    (folder / "sampled.yaml").write_text(f"{sampled}generation_kwargs: {{do_sample: true, until: [x]}}\n")
    refused(2, "it asks for samples", "evaluate", "model", "--tasks", "sampled", *where)


def test_the_error_of_a_difference_by_hand():
    paired_error = pytest.importorskip("mlx_ppo.harness", exc_type=ImportError).paired_error
    # differences 1, 0, -1, 1: mean 1/4, squares 9/16 + 1/16 + 25/16 + 9/16 = 44/16, over 3, over 4
    assert paired_error([0, 1, 1, 0], [1, 1, 0, 1]) == pytest.approx(math.sqrt(44 / 16 / 3 / 4))
    with pytest.raises(ValueError, match="fewer than two"):
        paired_error([1.0], [0.0])
