"""The pages in a real browser: undo, reload, two tabs, kills; and what they look like to those who don't see them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pages import Page, shorter, until

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> \u202ekcab \U0001f600"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The bundled example chosen, with 40 pairs as if they had been sampled, so that no model is loaded."""
    from mlx_ppo.studio.project import Project

    folder = tmp_path / "project"
    folder.mkdir()
    Project(folder).add_example()
    rows = [
        {"id": f"{n:06}", "prompt": f"prompt {n}", "shown": f"prompt {n}", "a": f" short {n}", "b": f" far longer {n}",
         "cut": {"a": False, "b": n % 2 == 0}, "by": {"a": "models/reviews", "b": "models/reviews"}}
        for n in range(40)
    ]  # fmt: skip
    rows[0]["a"] = HOSTILE
    (folder / "feedback").mkdir()
    (folder / "feedback/round-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def standing(folder: Path) -> list[str]:
    from mlx_ppo.studio.labels import Answers

    return [row["verdict"] for row in Answers(folder / "feedback").standing().values()]


def labelling(serve, browser, folder: Path) -> tuple[Page, object]:
    served = serve(folder, "label", str(folder))
    page = Page(browser)
    page.open(served.url)
    until(lambda: page.all("#left"), "a question", 20)
    return page, served


def test_keys_answer_undo_asks_again_and_a_reload_changes_nothing(serve, browser, project: Path) -> None:
    page, _ = labelling(serve, browser, project)
    asked = page.text(".prompt")
    for key, count in (("1", 1), ("2", 2), ("t", 3), ("b", 4), ("s", 5)):
        before = page.text(".prompt")
        page.press(key)
        until(lambda before=before: page.text(".prompt") not in ("", before), "the next question", 20)
        assert len(standing(project)) == count
    assert standing(project) == ["left", "right", "tie", "bad", "skip"]
    now = page.text(".question")
    page.browser.refresh()
    assert until(lambda: page.text(".question"), "the page", 20) == now
    for left in (4, 3, 2, 1, 0):
        page.press("u")
        until(lambda left=left: len(standing(project)) == left, "undo", 20)
        until(lambda: "Taken back" in page.text("#said") and page.text(".prompt"), "the question", 20)
        time.sleep(0.1)
    until(lambda: page.text(".prompt") == asked, "the first question again", 20)
    page.press("u")
    until(lambda: "nothing to take back" in page.text("#said"), "a word", 20)


def test_two_tabs_never_answer_one_question_twice(serve, browser, project: Path) -> None:
    page, served = labelling(serve, browser, project)
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    page.open(f"http://127.0.0.1:{served.port}/label")
    until(lambda: page.all("#left"), "a question", 20)
    both = [first, browser.current_window_handle]
    for turn in range(8):
        browser.switch_to.window(both[turn % 2])
        page.label(1, shorter)
    browser.close()
    browser.switch_to.window(first)
    rows = [json.loads(line) for line in (project / "feedback/answers.jsonl").read_text().splitlines()]
    assert len({row["question"] for row in rows}) == len(rows) == 8 and len({row["tab"] for row in rows}) == 2


def test_what_a_model_wrote_is_text_and_nothing_else(serve, browser, project: Path) -> None:
    file = project / "feedback/round-1.jsonl"
    file.write_text(file.read_text().split("\n")[0] + "\n")
    from mlx_ppo.studio.jobs import Jobs

    page, _ = labelling(serve, browser, project)
    for job in Jobs(project).all():
        Jobs(project).stop(job.id)
    assert "<script>" in page.text("#left") + page.text("#right")
    assert page.browser.title == "Label · mlx-ppo studio" and not page.all(".question script, .question img")


def test_a_server_that_is_killed_loses_nothing_and_says_so(serve, browser, project: Path) -> None:
    page, served = labelling(serve, browser, project)
    page.label(3, shorter)
    served.end(signal.SIGKILL)
    page.press("1")
    until(lambda: "doesn't answer" in page.text("#said"), "a word", 20)
    assert len(standing(project)) == 3
    page, _ = labelling(serve, browser, project)
    assert "3 answered" in page.text("#figures")


def test_a_browser_that_is_killed_loses_nothing(serve, browser, project: Path, tmp_path: Path) -> None:
    from serving import open_browser

    served = serve(project, "label", str(project))
    other = open_browser(tmp_path / "profile")
    page = Page(other)
    page.open(served.url)
    page.label(3, shorter)
    for process in psutil.Process(other.service.process.pid).children(recursive=True):
        process.kill()
    other.service.process.kill()
    other.service.process.wait()
    assert len(standing(project)) == 3
    page, _ = labelling(serve, browser, project)
    page.label(1, shorter)
    assert len(standing(project)) == 4


WIDTHS, SCHEMES = (1280, 360), ("light", "dark")


@pytest.mark.slow
def test_axe_finds_nothing_and_nothing_is_wider_than_a_phone(serve, browser, project: Path) -> None:
    folder = project / ".studio/jobs/0001-train"
    folder.mkdir(parents=True)
    facts = {"kind": "train", "command": [], "shown": "mlx-ppo train x.toml", "started": "2026-01-01T00:00:00+00:00"}
    (folder / "job.json").write_text(json.dumps(facts))
    (folder / "log").write_text("run folder: runs/policy-1\nfailed\n")
    page, served = labelling(serve, browser, project)
    try:
        for scheme in SCHEMES:
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            for width in WIDTHS:
                metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
                browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
                for path in ("/", "/label", "/label?mode=rating", "/label?mode=rewrite", "/compare"):
                    page.open(f"http://127.0.0.1:{served.port}{path}")
                    until(lambda: page.text("h1"), "the page", 20)
                    time.sleep(0.3)
                    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
                    assert page.violations() == [], (path, scheme, width)
                    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, path
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.slow
def test_answers_are_kept_within_a_tenth_of_a_second_while_the_processors_are_busy(serve, project: Path) -> None:
    """The median and nine tenths of 40 answers, beside as many busy processes as there are processors."""
    served = serve(project, "label", str(project))
    headers = {**served.headers, "Content-Type": "application/json"}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    took = []
    try:
        for _ in range(40):
            path = "/api/label/next?mode=pair&set=&tab=t"
            found = json.loads(served.ask(path, headers).body)["question"]
            answer = json.dumps({"question": found["question"], "verdict": "left", "tab": "t", "seconds": 1.0})
            began = time.perf_counter()
            assert served.ask("/api/label/answer", headers, "POST", answer).status == 200
            assert served.ask(path, headers).status == 200
            took.append(time.perf_counter() - began)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    took.sort()
    print(f"answer and next question: median {took[20] * 1e3:.0f} ms, nine tenths within {took[36] * 1e3:.0f} ms")
    assert took[20] < 0.1


def test_a_job_is_seen_with_its_log_and_stopped_by_a_click(serve, browser, project: Path, monkeypatch) -> None:
    from mlx_ppo.studio.jobs import Jobs

    code = "import time\nfor n in range(600):\n    print('line', n, flush=True)\n    time.sleep(0.1)"
    monkeypatch.setattr("mlx_ppo.studio.jobs.command", lambda *_: [sys.executable, "-c", code])
    Jobs(project).start("train", ["configs/<b>.toml"])
    served = serve(project)
    page = Page(browser)
    page.open(served.url)
    until(lambda: "line 3" in page.text(".job pre"), "the log", 20)
    until(lambda: "line 30" in page.text(".job pre"), "more of the log", 20)
    assert "mlx-ppo 'configs/<b>.toml' running" in page.text(".job summary")
    page.click(".jobrow > button")
    until(lambda: "stopped" in page.text(".job summary"), "its end", 20)
    assert not Jobs(project).all()[0].running


def test_ratings_and_better_answers_by_keys(serve, browser, project: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    from mlx_ppo.studio.labels import Answers

    page, served = labelling(serve, browser, project)
    for mode, keys in (("rating", ["9", "1", "s"]), ("rewrite", [])):
        page.open(f"http://127.0.0.1:{served.port}/label?mode={mode}")
        for key in keys:
            until(lambda: page.all("#one"), "a question", 20)
            before = page.text(".prompt")
            page.press(key)
            until(lambda before=before: page.text(".prompt") not in ("", before), "the next question", 20)
    until(lambda: page.all("#better"), "a question", 20)
    before = page.text(".prompt")
    for typed in (Keys.CONTROL + "a", "1 better one, u see", Keys.CONTROL + Keys.ENTER):
        page.all("#better")[0].send_keys(typed)
    until(lambda: page.text(".prompt") not in ("", before), "the next question", 20)
    rows = list(Answers(project / "feedback").standing().values())
    assert [(row.get("rating"), row.get("verdict")) for row in rows[:3]] == [(4, None), (-4, None), (None, "skip")]
    assert len(rows) == 4 and rows[3]["better"] == " 1 better one, u see" and rows[3]["completion"].startswith(" ")


def test_a_step_that_was_opened_stays_open_when_it_is_drawn_anew(serve, browser, project: Path) -> None:
    from mlx_ppo.studio.labels import Answers

    served = serve(project)
    page = Page(browser)
    page.open(served.url)
    page.step(3)
    until(lambda: page.all("#train-reward:disabled"), "a button that waits for labels", 20)
    for at in range(2):
        row = {"question": f"pair:round-1/{at:06}", "kind": "pair", "set": "round-1", "verdict": "left", "tab": "t"}
        Answers(project / "feedback").add(
            {**row, "prompt": "p", "left": " a", "right": " b", "left_by": "m", "right_by": "m"}
        )
    until(lambda: page.all("#train-reward:not(:disabled)"), "the button", 20)
    assert page.text("#train-reward")  # what is shown


def test_the_step_after_the_last_one_done_is_the_present_one(serve, browser, project: Path) -> None:
    """Two labels are few, but a reward model that was trained on them is there to go on from."""
    from mlx_ppo.studio.project import Project

    folder = project / ".studio/jobs/0001-reward"
    folder.mkdir(parents=True)
    facts = {"kind": "reward", "command": [], "shown": "mlx-ppo reward x.toml", "started": "2026-01-01T00:00:00+00:00"}
    (folder / "job.json").write_text(json.dumps(facts))
    (folder / "status.json").write_text('{"status": 0}')
    (folder / "log").write_text("run folder: runs/reward-1\n")
    (project / "runs/reward-1/reward").mkdir(parents=True)
    (project / "runs/reward-1/report.json").write_text('{"validation": {"accuracy": 0.25}}')
    (project / "feedback/labels-1-held-out.jsonl").write_text("{}\n" * 4)
    Project(project).choose(rounds=[{"policy": "models/reviews", "reward": "0001-reward"}])
    served = serve(project)
    page = Page(browser)
    page.open(served.url)
    until(lambda: page.all("#step-4.current details[open]"), "the policy's step", 20)
    assert "can't be told from chance" in page.text("#step-4") and not page.all("#train-policy:disabled")


def test_each_way_to_label_says_what_it_asks_and_only_its_own_figures(serve, browser, project: Path) -> None:
    page, served = labelling(serve, browser, project)
    assert "100 are a good start" in page.text("#figures")
    page.label(5, shorter)
    assert "a minute" in page.text("#figures")
    page.open(f"http://127.0.0.1:{served.port}/label?mode=rating")
    until(lambda: page.all("#one"), "a question", 20)
    assert page.text("#figures") == "0 answered"
    assert "very bad" in page.text(".question") and "very good" in page.text(".question")


def test_a_line_that_stays_where_it_is_has_an_axis_around_it(serve, browser, project: Path) -> None:
    served = serve(project)
    page = Page(browser)
    page.open(served.url)
    script = "const [low, high, done] = arguments; import('/static/charts.js').then((it) => done(it.range(low, high)))"
    for value, wanted in ((0, [0, 0.1]), (1, [0.9, 1.1]), (-2, [-2.2, -1.8])):
        assert browser.execute_async_script(script, value, value) == pytest.approx(wanted), value
    assert browser.execute_async_script(script, None, None) == [None, None]


def test_a_comparison_has_its_question_and_no_ways_to_label(serve, browser, project: Path) -> None:
    served = serve(project)
    page = Page(browser)
    page.open(served.url)
    page.open(f"http://127.0.0.1:{served.port}/label?set=round-1")
    until(lambda: page.all("#left"), "a question", 20)
    assert page.text("main").startswith("Compare, blind\n") and "null" not in page.text("main")
    assert not page.all(".modes")
