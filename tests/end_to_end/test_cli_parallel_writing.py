"""`sample` and `compare` shared between processes: the same completions, whatever their number."""

import pytest
from test_cli_parallel import finished
from thorough import mostly


@pytest.mark.parametrize("processes", mostly([2, 3], (3,)))
def test_several_processes_write_what_one_writes(project, processes):
    options = ("--prompts", "prompts.jsonl", "--count", 5, "--samples", 2, "--max-tokens", 9, "--seed", 3)
    written = [finished(project, "sample", "model", *options, "--processes", count) for count in (1, processes)]
    assert written[0] == written[1] and len(written[0].splitlines()) >= 10


def test_two_models_are_compared_by_two_processes_as_by_one(project):
    project.done("train", project.config(run={"iterations": 1}))
    options = ("--reward", "rule.py:letters", "--count", 5, "--max-tokens", 9)
    shown = [finished(project, "compare", "model", "runs/a", *options, "--processes", count) for count in (1, 2)]
    assert shown[0] == shown[1] and "wins" in shown[0]


def test_more_processes_than_memory_has_room_for_are_refused(project):
    shown = project.cli("sample", "model", "--prompt", "a film", "--processes", 100_000)
    assert shown.exit_code == 2 and "error: --processes: 99999 more processes take" in shown.stderr
