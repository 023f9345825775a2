"""A run's folder as the page reads it."""

import json
import math
import os
import random
import subprocess
import sys
import time

import pytest
from run_folders import HOSTILE, append, cut, lines, make, row, text_rows, write

from mlx_ppo.bundle import example_config
from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.errors import ConfigError
from mlx_ppo.runs.folder import create_run
from mlx_ppo.runs.metrics import METRICS, NORMAL, NORMAL_SUPERVISED, SUPERVISED
from mlx_ppo.studio.figures import frontier, thinned
from mlx_ppo.studio.logs import Log
from mlx_ppo.studio.runs import RunReader, page_document
from mlx_ppo.studio.texts import changes, spread


def read(*folders):
    readers = [RunReader(folder) for folder in folders]
    for reader in readers:
        reader.update()
    return readers


def test_a_log_is_read_on_from_where_it_was_and_half_a_line_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Log(path)
    assert log.read() == (0, b"", False)
    path.write_bytes(b'{"step": 1}\n{"st')
    assert log.read() == (0, b'{"step": 1}\n', False)
    assert log.read() == (12, b"", False)
    with open(path, "ab") as file:
        file.write('ep": 2, "text": "ü\u2028"}\n'.encode())
    assert log.read() == (12, '{"step": 2, "text": "ü\u2028"}\n'.encode(), False)
    path.write_bytes(b'{"step": 1}\n')
    assert log.read() == (0, b'{"step": 1}\n', True), "shorter than what was read"
    (tmp_path / "other").write_bytes(b'{"step": 1}\n{"step": 3}\n')
    os.replace(tmp_path / "other", path)
    assert log.read() == (0, b'{"step": 1}\n{"step": 3}\n', True), "another file"
    path.unlink()
    assert log.read() == (0, b"", True)


def test_what_comes_is_told_once_and_a_cut_log_begins_anew(tmp_path):
    folder = make(tmp_path / "a", 30)
    (reader,) = read(folder)
    place = reader.place
    new = reader.since(place)
    assert new["rows"] == [] and new["iterations"] == [] and new["answers"] is None
    append(folder, "metrics", [row(31), row(32)])
    append(folder, "samples", [each for step in (31, 32) for each in text_rows(step, "best")])
    append(folder, "samples", text_rows(32, "evaluation", (), 4))
    append(folder, "health", [{"step": 32, "rule": "kl", "sentence": "KL ran away", "key": "kl.coef", "level": "warn"}])
    reader.update()
    new = reader.since(place)
    assert [each["x"] for each in new["rows"]] == [31, 32] and new["iterations"] == [31, 32]
    assert new["rows"][1]["values"]["score"] == pytest.approx(row(32)["score"], rel=1e-4)
    assert new["rows"][1]["frontier"] == [
        pytest.approx(math.sqrt(0.32), rel=1e-4),
        new["rows"][1]["values"]["score"],
        32,
    ]
    assert [found["rule"] for found in new["health"]] == ["kl"]
    assert [answer["step"] for answer in new["answers"][0]["answers"]] == [0, 25, 32]
    assert new["done"] == 32
    place = reader.place
    append(folder, "health", [{"step": 32, "rule": "ratio", "sentence": "", "key": "", "level": "warn"}])
    reader.update()
    assert [found["rule"] for found in reader.since(place)["health"]] == ["ratio"]
    place = reader.place
    cut(folder, 20)
    append(folder, "metrics", [row(21, score=9.0)])
    reader.update()
    assert reader.since(place) is None
    assert reader.x == list(range(1, 22)) and reader.columns["score"][-1] == 9.0
    assert reader.health == [] and reader.samples.iterations == list(range(1, 21))
    assert reader.since("nonsense") is None and reader.since("") is None


@pytest.mark.parametrize("count", [1, 2, 5, 59, 61, 87, 100, 1000, 1237])
def test_thinning_hides_no_peak(count):
    draw = random.Random(count)
    x = [float(at * 3 + 1) for at in range(count)]
    column = [None if draw.random() < 0.1 else float(draw.randrange(10_000)) for _ in x]
    size, places, found = thinned({"a": column}, x, 30)
    assert len(places) == len(found["a"]) <= 60 and places == sorted(set(places))
    assert (places[0], places[-1]) == (x[0], x[-1])
    assert (found["a"][0], found["a"][-1]) == (column[0], column[-1])
    assert (size == 1) == (count <= 60)
    if size == 1:
        assert found["a"] == column
        return
    for start in range(1, count - 1, size):
        rows = range(start, min(start + size, count - 1))
        shown = [value for place, value in zip(places, found["a"], strict=True) if x[rows[0]] <= place <= x[rows[-1]]]
        known = [column[at] for at in rows if column[at] is not None]
        shown = [value for value in shown if value is not None]
        assert (min(shown), max(shown)) == (min(known), max(known)) if known else shown == []


def test_points_of_the_frontier_are_iterations():
    kl, score = [-0.1, 4.0, None, 9.0, 16.0], [0.0, 1.0, 2.0, 3.0, None]
    assert frontier(kl, score, [1, 2, 3, 4, 5], 100) == [[0, 0, 1], [2, 1, 2], [3, 3, 4]]
    many = [float(at) for at in range(1000)]
    found = frontier(many, many, many, 100)
    assert (
        len(found) <= 101
        and found[-1][2] == 999
        and all(y == step and x == pytest.approx(step**0.5, rel=1e-4) for x, y, step in found)
    )


def test_changed_words():
    before, after = "a dull and long  film.", "a warm and long film indeed."
    parts = changes(before, after)
    assert parts == [
        ("=", "a "),
        ("-", "dull "),
        ("+", "warm "),
        ("=", "and long "),
        ("-", "film."),
        ("+", "film indeed."),
    ]
    assert "".join(words for kind, words in parts if kind != "-") == after
    assert changes("", "new") == [("+", "new")] and changes("same words", "same words") == [("=", "same words")]
    assert [spread(range(10), most) for most in (0, 1, 3, 20)] == [[], [9], [0, 4, 9], list(range(10))]


def test_texts_are_bounded_and_nothing_in_them_acts(tmp_path):
    folder = make(tmp_path / "a", 5, texts=HOSTILE)
    append(folder, "samples", text_rows(6, "best", HOSTILE[-1:]))
    (reader,) = read(folder)
    document = reader.document(texts=6)
    text = json.dumps(document, ensure_ascii=False)
    assert not set(text) & set("\0\x1b\u202e\u2067") and len(text) < 100_000
    assert f"({len(HOSTILE[-1]) - 1200:,} more characters)" in document["completions"]["6"][0]["completion"]
    assert document["completions"]["1"][0]["completion"] == HOSTILE[0], "what isn't shown by the page is left as it is"


@pytest.mark.parametrize("step", [0, 25, 50])
def test_answers_and_completions_are_those_of_their_step(tmp_path, step):
    (reader,) = read(make(tmp_path / "a", 50))
    assert [row["prompt"] for row in reader.samples.evaluation(step, 9)] == [f"prompt {at}" for at in range(4)]
    assert {row["step"] for row in reader.samples.evaluation(step, 9)} == {step}
    found = reader.samples.iteration(step)
    assert [row["kind"] for row in found] == ([] if step == 0 else ["rollout", "best", "worst", "chance"])
    assert {row["step"] for row in found} <= {step} and reader.samples.iterations == list(range(1, 51))


def test_runs_of_earlier_versions_have_one_response_an_iteration(tmp_path):
    rows = [each for step in (1, 2, 3) for each in text_rows(step, "rollout")]
    (reader,) = read(write(tmp_path / "a", "", samples=rows))
    assert [row["step"] for row in reader.samples.iteration(2)] == [2]


def test_every_column_is_drawn_and_told_what_is_normal(tmp_path):
    (reader,) = read(write(tmp_path / "a", "", metrics=[{"step": 1, "time": 5, **{m.key: 1.0 for m in METRICS}}]))
    figures = page_document([reader])["figures"]
    drawn = [key for figure in figures for key in (*figure["keys"], *(figure["band"] or ()))]
    assert {metric.key for metric in METRICS} - set(drawn) == {"time"}
    assert all(figure["sentence"] for figure in figures)
    assert NORMAL.keys() <= {metric.key for metric in METRICS}
    assert NORMAL_SUPERVISED.keys() == {metric.key for metric in SUPERVISED}


def test_runs_of_every_kind_are_shown(tmp_path):
    empty = write(tmp_path / "empty", "[run]\niterations = 9\n")
    rows = [{"step": 40 * at, "epoch": at, "loss": 1 / at, "validation_loss": 2 / at} for at in (1, 2, 3)]
    sft = write(tmp_path / "sft", "[sft]\nepochs = 3\n", "sft", metrics=rows)
    odd = [
        {"step": 1, "score": float("nan"), "kl": "x", "new": 1e999},
        {"step": 2, "score": True},
        {"step": 3, "kl": 2, "score": 10**400},
    ]
    old = write(tmp_path / "old", "not TOML", metrics=[*odd, {"step": 10**400}])
    for folder, state, done in ((empty, "empty", 0), (sft, "finished", 3), (old, "stopped", 3)):
        page = page_document(read(folder))
        (run,) = page["runs"]
        json.dumps(page, allow_nan=False)
        assert (run["state"], run["done"], run["rules"]) == (state, done, False)
    assert [figure["title"] for figure in page_document(read(sft))["figures"]] == ["Training loss", "Validation loss"]
    assert page_document(read(sft))["runs"][0]["x"] == [1, 2, 3], "epochs"
    assert page_document(read(old))["runs"][0]["columns"]["kl"] == [None, None, 2]
    with pytest.raises(ConfigError, match="no figure in common"):
        page_document(read(sft, old))
    with pytest.raises(ConfigError, match=r"not a run folder. Did you mean '.*sft'"):
        RunReader(tmp_path / "sft2")


@pytest.mark.parametrize("back", [False, True])
def test_a_collapsed_run_is_called_so_while_it_is(tmp_path, back):
    config = read_config(TrainConfig, example_config())
    folder = create_run(config, tmp_path, "a")
    lost = {"entropy": 0.1, "kl": 290.0, "length": 40.0, "finished": 0.0}
    rows = [row(step, **(lost if 5 < step < (30 if back else 99) else {})) for step in range(1, 60)]
    (folder / "metrics.jsonl").write_text(lines(rows))
    assert not page_document(read(folder))["runs"][0]["collapsed"], "no rule has spoken"
    append(folder, "health", [{"step": 9, "rule": "kl", "sentence": "KL ran away", "key": "kl.coef", "level": "warn"}])
    assert page_document(read(folder))["runs"][0]["collapsed"] == (not back)


def test_a_run_is_running_while_its_process_lives(tmp_path):
    folder = make(tmp_path / "a", 3, total=5)
    (reader,) = read(folder)
    assert reader.state()["state"] == "stopped"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        (folder / "lock").write_text(f"{process.pid}\n")
        assert reader.state()["state"] == "running"
        process.communicate(b"\n")
    assert reader.state()["state"] == "stopped"


def test_memory_is_held_against_the_plan(tmp_path):
    (reader,) = read(make(tmp_path / "a", 3))
    assert reader.columns["share/rollout"] == [0.5, 0.5, 0.5]
    assert reader.columns["planned"] == [100 / 1024] * 3 and "share/load" not in reader.columns


def test_names_tell_runs_apart(tmp_path):
    page = page_document(read(make(tmp_path / "x/a", 1), make(tmp_path / "y/a", 1)))
    assert [run["name"] for run in page["runs"]] == ["x/a", "y/a"]


def test_ten_thousand_iterations_are_read_within_two_seconds_of_computing(tmp_path):
    folder = make(tmp_path / "a", 10_000)
    began = time.process_time()
    (reader,) = read(folder)
    page = page_document([reader])
    text = json.dumps(page)
    assert time.process_time() - began < 2
    (run,) = page["runs"]
    assert run["count"] == 10_000 and run["every"] > 1 and len(run["x"]) <= 600 and len(text) < 500_000
