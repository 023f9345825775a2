"""What a stranger's folder or request may hold: each gets an answer, in one line, and never stops the page."""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from run_folders import make
from serving import Served

from mlx_ppo.errors import ConfigError, RunError
from mlx_ppo.studio.api import Studio
from mlx_ppo.studio.jobs import Jobs
from mlx_ppo.studio.labels import Answers
from mlx_ppo.studio.lines import Lines

DEEP = "[" * 100_000
PAIR = {"id": "000001", "prompt": "p", "shown": "p", "a": "x", "b": "y", "cut": {"a": False, "b": False},
        "by": {"a": "m", "b": "m"}}  # fmt: skip
KEPT = {"id": 1, "question": "pair:round-1/000001", "kind": "pair", "set": "round-1", "prompt": "p", "left": "x",
        "right": "y", "left_by": "m", "right_by": "m", "verdict": "left", "tab": "t"}  # fmt: skip
JOB = {"kind": "train", "command": ["x"], "shown": "x", "started": "2020-01-01T00:00:00"}
RECORD = {"format": 1, "command": "train", "versions": {"mlx-ppo": "0.2.0"}}
PIPE = None  # in place of a file's content
MODEL = {"models/m/config.json": "{}", "models/m/a.safetensors": ""}


def _without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


# What stands in which file of the project; the page of the project and the questions are asked for each.
FILES: dict[str, dict[str, object]] = {
    "record pipe": {"runs/b/run.json": PIPE},
    "record deep": {"runs/b/run.json": DEEP},
    "record command": {"runs/b/run.json": {**RECORD, "command": float("nan")}},
    "tokenizer pipe": {**MODEL, "models/m/tokenizer_config.json": PIPE},
    "tokenizer deep": {**MODEL, "models/m/tokenizer_config.json": DEEP},
    "tokenizer number": {**MODEL, "models/m/tokenizer_config.json": "3"},
    "prompts pipe": {"prompts/f/train.jsonl": PIPE},
    "choices rounds": {".studio/project.json": '{"rounds": 5}'},
    "choices round": {".studio/project.json": '{"rounds": [1], "model": "models/reviews"}'},
    "choices deep": {".studio/project.json": DEEP},
    "choices NaN": {".studio/project.json": '{"temperature": NaN, "seed": 1}'},
    "choices seed": {".studio/project.json": '{"model": "m", "prompts": "p", "rounds": [{"policy": "m"}]}'},
    "choices outside": {".studio/project.json": '{"model": "../m", "prompts": "/etc", "seed": 1, "rounds": []}'},
    "job empty": {".studio/jobs/0009-train/job.json": "{}"},
    "job time": {".studio/jobs/0009-train/job.json": {**JOB, "started": "x"}},
    "job deep": {".studio/jobs/0009-train/job.json": DEEP},
    "job pipe": {".studio/jobs/0009-train/job.json": PIPE},
    "job log pipe": {".studio/jobs/0009-train/job.json": JOB, ".studio/jobs/0009-train/log": PIPE},
    "job status": {".studio/jobs/0009-train/job.json": JOB, ".studio/jobs/0009-train/status.json": '{"status": "x"}'},
    "job process": {
        ".studio/jobs/0009-train/job.json": JOB,
        ".studio/jobs/0009-train/process.json": '{"parent": -5, "command": 1e30}'},
    "pairs id": {"feedback/round-1.jsonl": _without(PAIR, "id")},
    "pairs cut": {"feedback/round-1.jsonl": {**PAIR, "cut": 3}},
    "pairs by": {"feedback/round-1.jsonl": _without(PAIR, "by")},
    "pairs text": {"feedback/round-1.jsonl": {**PAIR, "a": "\ud800"}},
    "pairs states": {"feedback/round-1.jsonl": {**PAIR, "states": {"a": "!", "b": "AAAA"}}},
    "pairs deep": {"feedback/round-1.jsonl": DEEP},
    "pairs pipe": {"feedback/round-1.jsonl": PIPE},
    "answers verdict": {"feedback/round-1.jsonl": PAIR, "feedback/answers.jsonl": _without(KEPT, "verdict")},
    "answers by": {"feedback/round-1.jsonl": PAIR, "feedback/answers.jsonl": _without(KEPT, "left_by")},
    "answers kind": {"feedback/round-1.jsonl": PAIR, "feedback/answers.jsonl": {**KEPT, "kind": [1]}},
    "answers seconds": {"feedback/round-1.jsonl": PAIR, "feedback/answers.jsonl": {**KEPT, "seconds": "x"}},
    "answers set": {"feedback/round-1.jsonl": PAIR, "feedback/answers.jsonl": {**KEPT, "set": [1]}},
    "answers deep": {"feedback/answers.jsonl": DEEP},
    "answers pipe": {"feedback/answers.jsonl": PIPE},
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """A project whose name has a space and letters beyond ASCII, with the example, and its server."""
    folder = tmp_path_factory.mktemp("hostile") / "Prüfung zwei"
    folder.mkdir()
    studio = Studio(folder)
    studio.project.add_example()
    put(folder, "feedback/round-1.jsonl", "")
    served = Served(folder)
    yield served, folder
    assert served.process.stdout is not None
    served.process.send_signal(2)
    assert "Traceback" not in served.process.stdout.read()
    assert served.end() == 0


def put(folder: Path, name: str, content: object) -> None:
    """A file of the project; pairs have so many good ones behind them that nothing is sampled."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if content is PIPE:
        os.mkfifo(path)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        more = [json.dumps({**PAIR, "id": f"{at:06}"}) for at in range(2, 30)] if "round-1" in name else []
        path.write_text("\n".join([text, *more, ""]))


def answered(served: Served, path: str, body: str | None = None) -> tuple[int, Any]:
    """Status and JSON; a refusal is one line without a word of Python."""
    answer = served.ask(path, served.headers, "GET" if body is None else "POST", body)
    value = json.loads(answer.body)
    assert answer.status in (200, 400, 404, 409), (path, answer.status)
    if answer.status != 200:
        assert value["error"] and "\n" not in value["error"] and "Traceback" not in value["error"]
    return answer.status, value


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_the_project_stops_its_page(project, name: str) -> None:
    served, folder = project
    kept = (folder / ".studio/project.json").read_text()
    try:
        for file, content in FILES[name].items():
            put(folder, file, content)
        answered(served, "/api/project")
        for query in ("mode=pair&set=compare-x&tab=t", "mode=pair&set=&tab=t"):
            if "choices" in name or "feedback" in next(iter(FILES[name])):
                answered(served, f"/api/label/next?{query}")
        for kind in ("pairs", "ratings"):
            answered(served, "/api/reward", json.dumps({"kind": kind, "epochs": 1, "rate": 0.1}))
        answered(served, "/api/label/undo", '{"tab": "t"}')
        answered(served, "/api/jobs/0009-train/log")
    finally:
        for file in FILES[name]:
            (folder / file).unlink(missing_ok=True)
        put(folder, "feedback/round-1.jsonl", "")
        for place in ("runs/b", "models/m", "prompts/f", ".studio/jobs/0009-train"):
            shutil.rmtree(folder / place, ignore_errors=True)
        (folder / ".studio/project.json").write_text(kept)
    assert answered(served, "/api/project")[0] == 200


LOGS = {
    "metrics deep": ("metrics", '{"step": 1, "score": ' + DEEP),
    "metrics infinite": ("metrics", '{"step": Infinity, "score": 1}'),
    "samples NaN": ("samples", '{"step": 7, "kind": "best", "prompt": "a", "completion": "b", "score": NaN}'),
    "samples step": ("samples", '{"step": 1' + "0" * 6000 + ', "kind": "best"}'),
    "health": ("health", '{"step": 1e400, "rule": 3, "sentence": null}'),
}


@pytest.mark.parametrize("name", LOGS)
def test_no_line_of_a_log_stops_the_page_of_a_run(project, name: str) -> None:
    served, folder = project
    run = make(folder / "runs/b", 2)
    try:
        log, line = LOGS[name]
        with open(run / f"{log}.jsonl", "a") as file:
            file.write(line + "\n")
        status, found = answered(served, "/api/watch?run=runs/b")
        assert status == 200 and found["page"]["runs"][0]["count"] == 2
        assert answered(served, "/api/watch/completions?run=runs/b&step=7")[0] == 200
    finally:
        shutil.rmtree(run)


def test_names_that_no_text_can_have_are_left_out(project) -> None:
    served, folder = project
    for name in (b"runs/\xff", b"runs/a\nb#?%41"):
        os.makedirs(os.fsencode(folder) + b"/" + name)
        with open(os.fsencode(folder) + b"/" + name + b"/run.json", "w") as file:
            json.dump(RECORD, file)
    assert [run["path"] for run in answered(served, "/api/project")[1]["runs"]] == ["runs/a\nb#?%41"]
    assert answered(served, "/api/watch?run=runs/a%0Ab%23%3F%2541")[0] == 200


BIG = "1" + "0" * 3000
REQUESTS = [
    ("/api/model", DEEP), ("/api/model", '{"model": "\\ud800"}'), ("/api/none", "{}"), ("/api/project", "{}"),
    ("/api/prompts", '{"name": "x", "text": "a\\ud800\\nb\\nc"}'),
    ("/api/prompts", '{"name": "x", "text": "{\\"prompt\\": NaN}\\nb"}'),
    ("/api/prompts", json.dumps({"name": "x", "text": '{"prompt": ' + DEEP + "\nb"})),
    ("/api/prompts", '{"name": "x", "path": "~nobody-at-all/x"}'), ("/api/import", '{"name": "x", "path": "--help"}'),
    ("/api/import", '{"name": "x", "path": "a\\u0000b"}'), ("/api/import", '{"name": "x", "path": "~nobody-at-all/x"}'),
    ("/api/choose", f'{{"prompts": "reviews", "max_tokens": 4, "temperature": {BIG}}}'),
    ("/api/train", f'{{"iterations": 4, "kl": {BIG}, "rate": 1}}'),
    ("/api/train", '{"iterations": 4, "kl": NaN, "rate": Infinity}'),
    ("/api/label/answer", '{"question": {}, "tab": 1}'),
]  # fmt: skip
ASKED = ["/api/watch?run=" + "a" * 5000, "/api/watch?run=%ff", "/api/none", "/api/label/next?mode=pair&set=%00&tab=t"]


def test_no_request_is_answered_with_more_than_a_line(project) -> None:
    served, _ = project
    for path, body in REQUESTS:
        answer = served.ask(path, served.headers, "POST", body)
        assert 400 <= answer.status < 500, (path, body[:60], answer.status)
        assert "\n" not in json.loads(answer.body)["error"]
    for path in ASKED:
        assert answered(served, path)[0] in (400, 404), path[:60]


def test_labels_are_not_written_where_a_link_leads(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine\n")
    (tmp_path / "feedback").mkdir()
    (tmp_path / "feedback/answers.jsonl").symlink_to(outside)
    with pytest.raises(RunError, match="cannot be written"):
        Answers(tmp_path / "feedback").add({"question": "q", "kind": "pair", "verdict": "left", "tab": "t"})
    assert outside.read_text() == "mine\n"


@pytest.mark.parametrize("name", [".studio", "feedback", "configs", "prompts"])
def test_a_project_is_not_written_where_a_link_leads(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(RunError, match="leads out of the project's folder"):
        Studio(tmp_path / "project")


def test_a_file_larger_than_any_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(OSError, match="too large"):
        Lines(tmp_path / "a.jsonl").read()


def _stopped(folder: Path, log: str) -> Jobs:
    put(folder, ".studio/jobs/0001-train/job.json", JOB)
    put(folder, ".studio/jobs/0001-train/status.json", '{"status": 130}')
    put(folder, ".studio/jobs/0001-train/log", log)
    return Jobs(folder)


@pytest.mark.parametrize("run", ["/etc", "runs/../../x", "--allow-config-change", "runs/a\0b", "models"])
def test_a_job_has_no_run_outside_the_projects(tmp_path: Path, run: str) -> None:
    assert _stopped(tmp_path, f"run folder: {run}").get("0001-train").run is None
    assert _stopped(tmp_path, "run folder: runs/a").get("0001-train").run == "runs/a"


def test_no_click_runs_the_code_of_whoever_made_the_folder(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def score(prompts, completions, records):\n    return [0.0] * len(prompts)\n")
    config = '[model]\npath = "m"\n[data]\nprompts = "p.jsonl"\n[[reward]]\nkind = "function"\npath = "r.py"\n'
    put(tmp_path, "runs/a/run.json", RECORD)
    put(tmp_path, "runs/a/config.toml", config.replace('path = "r.py"', f'function = "{tmp_path}/r.py:score"'))
    _stopped(tmp_path, "run folder: runs/a")
    with pytest.raises(ConfigError, match="runs Python code of its own"):
        Studio(tmp_path).resume("0001-train")


def test_a_clock_that_was_set_back_leaves_no_job_running(tmp_path: Path) -> None:
    put(tmp_path, ".studio/jobs/0001-train/job.json", {**JOB, "started": "2090-01-01T00:00:00"})
    assert Jobs(tmp_path).get("0001-train").state == "killed"


def test_prompts_are_there_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    """As a kill between the two files leaves them."""
    from mlx_ppo.studio import project

    made, real = project.Project(tmp_path), project.replace_file

    def killed(path: Path, text: str) -> None:
        if path.name == project.TRAIN:
            raise KeyboardInterrupt
        real(path, text)

    monkeypatch.setattr(project, "replace_file", killed)
    monkeypatch.setattr(project.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        made.add_prompts("mine", "a\nb\nc", chat=False)
    monkeypatch.undo()
    assert made.prompts() == {}
    assert made.add_prompts("mine", "a\nb\nc", chat=False) == (2, 1) and made.prompts() == {"mine": (2, 1)}


def test_chosen_prompts_that_are_gone_are_one_line(tmp_path: Path) -> None:
    studio = Studio(tmp_path)
    studio.project.add_example()
    shutil.rmtree(tmp_path / "prompts/reviews")
    with pytest.raises(ConfigError, match="not there any more"):
        studio._order("round-1", 0, studio.project.choices())


def test_clicks_in_two_servers_come_after_one_another(serve, tmp_path: Path) -> None:
    """Two tabs add the same; the one that comes second is told so."""
    studio, servers = Studio(tmp_path), [serve(tmp_path), serve(tmp_path)]
    body = '{"name": "mine", "text": "a\\nb\\nc"}'
    with ThreadPoolExecutor(2) as pool:
        with studio.project.alone():
            asked = [pool.submit(each.ask, "/api/prompts", each.headers, "POST", body) for each in servers]
            done, _ = wait(asked, 1.0)
            assert not done and not (tmp_path / "prompts/mine").exists()
        assert sorted(each.result().status for each in asked) == [200, 400]


def test_what_labels_say_is_private(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        Answers(tmp_path / "feedback").add({"question": "q", "kind": "pair", "verdict": "left", "tab": "t"})
        Studio(tmp_path).project.choose(max_tokens=3)
    finally:
        os.umask(before)
    for name in ("feedback", ".studio"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0, name
