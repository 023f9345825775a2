"""The file of answers: each kept before anybody hears of it, once, and never changed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlx_ppo.errors import DataError, RunError
from mlx_ppo.studio.labels import ANSWERS, AnsweredError, Answers

LEFT = {"question": "pair:a/1", "kind": "pair", "tab": "t", "verdict": "left", "left": "x", "right": "y"}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]


def test_a_question_is_answered_once_and_again_after_undo(tmp_path: Path) -> None:
    answers, other = Answers(tmp_path), Answers(tmp_path)  # as two servers would
    answers.add(LEFT)
    with pytest.raises(AnsweredError):
        other.add({**LEFT, "verdict": "right", "tab": "u"})
    assert other.undo("u") is None  # not this tab's
    before = (tmp_path / ANSWERS).read_bytes()
    assert other.undo("t")["question"] == LEFT["question"]
    assert answers.standing() == {} and (tmp_path / ANSWERS).read_bytes().startswith(before)
    answers.add({**LEFT, "verdict": "right"})
    assert [row["verdict"] for row in other.standing().values()] == ["right"]
    assert [row["id"] for row in rows(tmp_path)] == [1, 2, 3]


def test_undo_goes_back_answer_by_answer(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    for number in (1, 2):
        answers.add({**LEFT, "question": f"pair:a/{number}"})
    assert [answers.undo("t")["question"], answers.undo("t")["question"], answers.undo("t")] == [
        "pair:a/2",
        "pair:a/1",
        None,
    ]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_line_costs_at_most_its_own_answer(tmp_path: Path, cut: int) -> None:
    answers = Answers(tmp_path)
    for number in (1, 2):
        answers.add({**LEFT, "question": f"pair:a/{number}"})
    content = (tmp_path / ANSWERS).read_bytes()
    (tmp_path / ANSWERS).write_bytes(content[:-cut])
    again = Answers(tmp_path)
    assert list(again.standing()) == ["pair:a/1"]
    if cut == 1:  # whole but for its end: it was given, so it counts once the file goes on
        with pytest.raises(AnsweredError):
            again.add({**LEFT, "question": "pair:a/2"})
    else:
        again.add({**LEFT, "question": "pair:a/2"})
        assert again.damaged == 1
    again.add({**LEFT, "question": "pair:a/3"})
    assert list(Answers(tmp_path).standing()) == ["pair:a/1", "pair:a/2", "pair:a/3"]


def test_threads_and_processes_keep_each_answer_once(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from mlx_ppo.studio.labels import *
answers = Answers(Path({str(tmp_path)!r}))
for number in range(30):
    try:
        answers.add({{**{LEFT!r}, "question": f"pair:a/{{number}}"}})
    except AnsweredError:
        pass
"""
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    threads = [threading.Thread(target=exec, args=(code, {})) for _ in range(2)]
    for thread in threads:
        thread.start()
    for each in (*threads, *started):
        each.join() if isinstance(each, threading.Thread) else each.wait()
    assert sorted(row["question"] for row in rows(tmp_path)) == sorted(f"pair:a/{number}" for number in range(30))
    assert sorted(row["id"] for row in rows(tmp_path)) == list(range(1, 31))


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from mlx_ppo.studio.labels import *
answers = Answers(Path({str(tmp_path)!r}))
for number in range(100000):
    answers.add({{**{LEFT!r}, "question": f"pair:a/{{number}}"}})
    print(number, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    said = [int(line) for line in process.stdout.read().split("\n") if line.strip()]
    process.wait()
    process.stdout.close()
    kept = len(Answers(tmp_path).standing())
    assert kept in (max(said, default=4) + 1, max(said, default=4) + 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"verdict": "maybe"}, {"verdict": None}, {"kind": "vote"}, {"question": 3},
        {"kind": "rating", "rating": 5}, {"kind": "rating", "rating": True}, {"kind": "rating", "rating": 1.0},
        {"kind": "rewrite", "better": " ", "completion": "x"}, {"kind": "rewrite", "better": "x", "completion": "x"},
        {"kind": "rewrite", "better": "\ud800", "completion": "x"},
    ],
)  # fmt: skip
def test_what_is_no_answer_is_refused_and_not_kept(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(DataError):
        Answers(tmp_path).add({**LEFT, **wrong})
    assert not (tmp_path / ANSWERS).exists()


def test_a_full_disk_is_said_and_the_answer_can_be_given_again(tmp_path: Path, monkeypatch) -> None:
    answers = Answers(tmp_path)
    answers.add(LEFT)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mlx_ppo.studio.labels.flush", full)
        with pytest.raises(RunError, match=r"cannot be written \(No space left on device\); give the answer again"):
            answers.add({**LEFT, "question": "pair:a/2"})
    with pytest.raises(AnsweredError):  # it had come to the file all the same, and counts once
        answers.add({**LEFT, "question": "pair:a/2"})
    assert list(answers.standing()) == ["pair:a/1", "pair:a/2"]
