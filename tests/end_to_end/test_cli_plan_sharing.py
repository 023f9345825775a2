"""`plan --processes` and `plan --hosts`: a table of what is computed, from what was measured."""

import json

import pytest
from test_cli_parallel import finished

SMALL = {"rollout": {"prompts": 4, "max_tokens": 4}}


def test_processes_of_this_machine_and_what_they_exchange_is_tried(project):
    found = json.loads(finished(project, "plan", project.config(**SMALL), "--processes", 3, "--json"))
    assert [row["processes"] for row in found["computed"]] == [1, 2, 3, 4, 8]
    line = found["line"]
    assert line["measured"] and 0 < line["milliseconds"] < 1e4 and line["gigabits"] > 0
    alone, two = found["computed"][:2]
    assert alone["exchanging"] == 0 and two["exchanging"] > 0 and two["sent_mb"] > 0
    assert alone["computing"] == pytest.approx(sum(found["measured_seconds"].values()), rel=0.02)


def test_machines_by_their_line(project):
    hosts = project.folder / "hosts.json"
    hosts.write_text('[["203.0.113.1:5000"], ["203.0.113.2:5000"]]')
    shown = project.done("plan", project.config(**SMALL), "--hosts", hosts, "--bandwidth", 10)
    assert "10.00 Gbit/s, 0.200 ms (as said, or the default)" in shown and "computed" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bandwidth", 1), "--bandwidth and --latency go with"),
        (("--hosts", "hosts.json", "--processes", 2), "exclude each other"),
        (("--processes", 2, "--measure"), "leave out the other options"),
        (("--hosts", "nowhere.json"), "nowhere.json: cannot be read"),
    ],
)
def test_what_does_not_go_together_is_refused(project, options, words):
    result = project.cli("plan", project.config(), *options)
    assert result.exit_code == 2 and words in result.stderr
