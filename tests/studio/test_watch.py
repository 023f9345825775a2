"""`mlx-ppo watch`: the live page and what it is told."""

import asyncio
import http.client
import json
import os
import time
from urllib.parse import quote

import pytest
from pages import until
from run_folders import append, cut, make, row, text_rows, write

from mlx_ppo.studio import watch
from mlx_ppo.studio.watch import Tail


class Events:
    """A stream of server-sent events, read as a browser does."""

    def __init__(self, served, path, **headers):
        self.connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        self.connection.request("GET", path, headers={**served.headers, **headers})
        self.answer = self.connection.getresponse()
        assert (self.answer.status, self.answer.getheader("content-type").split(";")[0]) == (200, "text/event-stream")

    def next(self):
        """The next event's fields."""
        fields = {}
        while True:
            line = self.answer.readline().decode().rstrip("\n")
            if line and not line.startswith((":", "retry")):
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                return {**fields, "data": json.loads(fields["data"])}

    def close(self):
        self.answer.close()
        self.connection.close()


def asked(served, path):
    answer = served.ask(path, served.headers)
    return answer.status, json.loads(answer.body)


def test_what_comes_is_sent_and_a_reconnection_misses_nothing(tmp_path, serve):
    run = make(tmp_path / "a", 3, total=9)
    served = serve(tmp_path, "watch", str(run))
    assert served.url.startswith(f"http://127.0.0.1:{served.port}/watch/a?token=")
    status, page = asked(served, "/api/watch?run=a")
    assert status == 200 and page["page"]["runs"][0]["x"] == [1, 2, 3]
    events = Events(served, f"/api/watch/events?run=a&place={page['place']}")
    first = events.next()
    assert first["event"] == "new" and first["data"][0]["rows"] == [] and first["data"][0]["state"] == "stopped"
    append(run, "metrics", [row(4)])
    second = events.next()
    assert [new["x"] for new in second["data"][0]["rows"]] == [4]
    events.close()
    append(run, "metrics", [row(5)])
    events = Events(served, "/api/watch/events?run=a", **{"Last-Event-ID": second["id"]})
    new = []
    while not new:  # the first event may come before the log is looked at again
        new = events.next()["data"][0]["rows"]
    assert [each["x"] for each in new] == [5]
    cut(run, 2)
    assert events.next()["event"] == "reset"
    events.close()
    assert asked(served, "/api/watch?run=a")[1]["page"]["runs"][0]["x"] == [1, 2]
    status, found = asked(served, "/api/watch/completions?run=a&step=2")
    assert status == 200 and [each["kind"] for each in found] == ["rollout", "best", "worst", "chance"]
    assert asked(served, "/api/watch/completions?run=a&step=x") == (200, [])


def test_several_runs_share_a_stream_and_others_are_refused(tmp_path, serve):
    runs = [make(tmp_path / name, 2) for name in "ab"]
    served = serve(tmp_path, "watch", *map(str, runs))
    events = Events(
        served, f"/api/watch/events?run=a&run=b&place={asked(served, '/api/watch?run=a&run=b')[1]['place']}"
    )
    assert len(events.next()["data"]) == 2
    append(runs[1], "metrics", [row(3)])
    new = events.next()["data"]
    assert new[0] is None and [each["x"] for each in new[1]["rows"]] == [3]
    events.close()
    for query in ("run=c", "", "run=..", "&".join(["run=a"] * 7)):
        status, said = asked(served, f"/api/watch?{query}")
        assert status == 400 and "error" in said
    assert served.ask("/api/watch?run=a", {"Host": f"127.0.0.1:{served.port}"}).status == 403


def test_the_studio_shows_runs_of_its_own_folder_only(tmp_path, serve):
    make(tmp_path / "project/runs/a", 2)
    make(tmp_path / "elsewhere", 2)
    os.symlink(tmp_path / "elsewhere", tmp_path / "project/runs/link")
    served = serve(tmp_path / "project")
    status, page = asked(served, "/api/watch?run=runs/a")
    assert status == 200 and not page["alone"]
    for name in ("../elsewhere", str(tmp_path / "elsewhere"), "runs/link", "runs", "runs/none", "\0"):
        assert asked(served, f"/api/watch?run={quote(name)}")[0] == 400


def test_a_silent_stream_shows_that_it_lives_and_one_task_follows_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.05)
    looks = []
    look = Tail._look
    monkeypatch.setattr(Tail, "_look", lambda tail: (looks.append(1), look(tail))[1])

    async def listen():
        tail = Tail(make(tmp_path / "a", 1))
        await asyncio.to_thread(tail.reader.update)
        streams = [watch._stream([tail], tail.reader.place) for _ in range(3)]
        said = [[await anext(stream) for _ in range(4)] for stream in streams]
        following = len([task for task in asyncio.all_tasks() if "Tail._follow" in repr(task)])
        for stream in streams:
            await stream.aclose()
        await asyncio.sleep(0.01)
        return said, following, len([task for task in asyncio.all_tasks() if "Tail._follow" in repr(task)])

    said, following, left = asyncio.run(asyncio.wait_for(listen(), 20))
    assert following == 1 and left == 0
    assert all(": still here\n\n" in lines[2:] for lines in said)


@pytest.mark.parametrize("arguments", [["{0}"], ["{1}", "{2}"], ["{1}", "--port", "1"]])
def test_wrong_runs_and_ports_are_said_in_a_line(tmp_path, monkeypatch, arguments):
    from click.testing import CliRunner

    from mlx_ppo.cli.main import main

    make(tmp_path / "a", 1)
    write(tmp_path / "b", "", "sft")
    places = [argument.format(tmp_path / "none", tmp_path / "a", tmp_path / "b") for argument in arguments]
    if "--port" in places:
        import socket

        with socket.create_server(("127.0.0.1", 0)) as taken:
            places[-1] = str(taken.getsockname()[1])
            result = CliRunner().invoke(main, ["watch", *places, "--no-browser"])
        assert result.exit_code == 4 and "cannot be used" in result.output
    else:
        monkeypatch.setattr(watch, "serve", lambda *_, **__: None)
        result = CliRunner().invoke(main, ["watch", *places, "--no-browser"])
        assert result.exit_code == 2
    assert result.output.startswith("error: ") and result.output.count("\n") == 1


@pytest.mark.slow
def test_a_run_is_seen_live(tmp_path, serve, browser):
    run = write(tmp_path / "a", "[run]\niterations = 9\n\n[health]\n")
    served = serve(tmp_path, "watch", str(run))
    browser.get_log("browser")
    browser.get(served.url)

    def text(selector):
        return browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    until(lambda: "Live" in text("#live"), "the page is live")
    assert "nothing logged yet" in text(".run") and text("header") == "", "there is no project to lead to"
    for step in (1, 2):
        append(run, "samples", text_rows(step, "best"))
        append(run, "metrics", [row(step)])
        until(lambda step=step: f"iteration {step} of 9" in text(".run"), f"iteration {step} is seen")
        until(lambda step=step: f"best words of iteration {step}" in text(".completions"), "its text is seen")
    until(lambda: text(".panel .at") == "latest, iteration 2", "the figure has moved on")
    assert browser.execute_script("return document.querySelectorAll('.plot canvas').length") > 20
    finding = {"step": 2, "rule": "kl", "sentence": "KL ran away", "key": "kl.coef", "level": "warn"}
    append(run, "health", [finding])
    until(lambda: "KL ran away" in text("#health"), "the rule is seen")
    cut(run, 1)
    until(lambda: "iteration 1 of 9" in text(".run"), "the page has begun anew")
    assert "KL ran away" not in text("#health")
    served.end()
    until(lambda: "Not live" in text("#live"), "the lost server is said")
    serious = [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"]
    assert [line for line in serious if "ERR_CONNECTION" not in line and "ERR_INCOMPLETE" not in line] == []


@pytest.mark.slow
def test_ten_thousand_iterations_open_within_two_seconds_live(tmp_path, serve, browser):
    served = serve(tmp_path, "watch", str(make(tmp_path / "a", 10_000)))
    browser.get(served.url)
    took = []
    for _ in range(3):  # the best of three: others may compute here too
        began = time.monotonic()
        browser.get(f"http://127.0.0.1:{served.port}/watch/a")
        until(lambda: browser.execute_script("return document.querySelectorAll('.plot canvas').length") > 20, "drawn")
        took.append(time.monotonic() - began)
    assert min(took) < 2, took


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation_on_the_page(tmp_path, serve, browser, scheme):
    from axe_core_python.selenium import Axe

    served = serve(tmp_path, "watch", str(make(tmp_path / "a", 30)))
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        browser.get(served.url)
        until(
            lambda: browser.execute_script("return document.querySelectorAll('.completions figure').length") == 4,
            "drawn",
        )
        browser.set_script_timeout(180)  # others may compute here too
        found = Axe().run(browser)["violations"]
        assert [(each["id"], [node["target"] for node in each["nodes"]][:3]) for each in found] == []
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
