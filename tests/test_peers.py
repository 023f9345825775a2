"""The comparisons beside peers: turns are taken in order, disturbed rounds don't count, and times are what they say."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(__file__).resolve().parents[1] / "benchmarks" / "peers"
WORKER = """
import sys
sys.path.insert(0, {peers!r})
from turns import Turns
turns = Turns()
print("a library's chatter")
for number in range(9):
    task = turns.wait()
    open({journal!r}, "a").write(turns.order["name"] + task + " ")
    turns.phase("work")
    turns.done(tokens=number)
"""


@pytest.fixture
def alternation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PEERS))
    import alternate

    return alternate


def test_sides_take_turns_and_answer_with_what_they_measured(alternation: Any, tmp_path: Path) -> None:
    worker, journal = tmp_path / "worker.py", tmp_path / "journal"
    worker.write_text(WORKER.format(peers=str(PEERS), journal=str(journal)), "utf-8")
    sides = [alternation.Side(name, Path(sys.executable), str(worker), {"name": name}) for name in ("a", "b")]
    sides[1].limit = 2
    options = argparse.Namespace(only="", lock=None, threads=1, rounds=2, warm=1)
    alternation.alternate(sides, options, tmp_path, "log", tasks=("1", "2"))
    assert journal.read_text("utf-8").split() == ["a1", "b1", "a2", "b2", "a1", "b1", "a2", "b2", "a1", "a2"]
    assert [row["tokens"] for row in sides[0].rounds if row["task"] == "2"] == [1, 3, 5]
    assert set(sides[0].rounds[0]["phases"]) == {"work"} and sides[0].rounds[0]["peak_rss"] > 1 << 20
    assert b"chatter" in (tmp_path / "log.log").read_bytes()
    assert all(side.process.returncode == 0 for side in sides)


def test_a_worker_that_ends_is_named(alternation: Any, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("raise SystemExit(3)", "utf-8")
    side = alternation.Side("theirs", Path(sys.executable), str(worker), {})
    with open(tmp_path / "log", "wb") as log, pytest.raises(SystemExit, match=r"theirs ended .exit code 3"):
        side.start(1, log)
    side.end()


def test_disturbed_rounds_count_only_where_there_is_no_other(alternation: Any) -> None:
    side = alternation.Side("a", Path(), "", {}, warm=1)
    side.rounds = [{"task": "", "others": others, "number": n} for n, others in enumerate((0.0, 0.9, 0.0, 0.9))]
    assert [row["number"] for row in side.counted()] == [2] and side.disturbed == 2
    side.rounds[2]["others"] = 0.9
    assert [row["number"] for row in side.counted()] == [1, 2, 3]


def test_time_to_a_reward_is_when_the_mean_of_the_last_rounds_reaches_it(alternation: Any) -> None:
    import ppo_against_trl

    rows = [{"seconds": 2.0, "score": score} for score in (0.0, 9.0, 0.0, 4.0, 6.0, 9.0)]
    assert ppo_against_trl.time_to(rows, 5.0, 2) == (5, 10.0)
    assert ppo_against_trl.time_to(rows, 5.0, 1) == (2, 4.0)
    assert ppo_against_trl.time_to(rows, 8.0, 2) is None
