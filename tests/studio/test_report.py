"""`mlx-ppo report`: one file, below 1 MB, that asks for nothing and lets no text act."""

import base64
import hashlib
import json
import re
import time

import pytest
from click.testing import CliRunner
from run_folders import HOSTILE, append, make, row, text_rows, write
from thorough import mostly

from mlx_ppo.cli.main import main
from mlx_ppo.studio.report import LARGEST
from mlx_ppo.studio.server import STATIC

AXE = ((1280, "light"), (360, "dark"))
MINUS = "\u2212"
KEYS = {"left": "\ue012", "right": "\ue014", "end": "\ue010", "enter": "\ue007", "tab": "\ue004"}


def reported(tmp_path, *runs, name="report.html"):
    path = tmp_path / name
    result = CliRunner().invoke(main, ["report", *map(str, runs), "--output", str(path)])
    assert result.exit_code == 0, result.output
    assert result.output == f"{path}\n"
    return path


def data_of(path):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"))[1]
    )


def test_the_policy_lets_only_its_own_scripts_run(tmp_path):
    text = reported(tmp_path, make(tmp_path / "a", 3, texts=HOSTILE)).read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    parts = re.findall(r"<(?:script|style)(?: type=\"module\")?>(.*?)</(?:script|style)>", text, re.DOTALL)
    assert len(parts) == 3
    hashes = {f"sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}" for part in parts}
    assert hashes == set(re.findall(r"sha256-[^']*", policy))
    assert len(re.findall(r"<script", text)) == 3 and "MIT License" in text
    outside = text.replace("http://www.w3.org/2000/svg", "").split('id="data"')[0]
    assert not re.search(r"(?:src|href)=\"(?!data:,)", outside)


def test_a_name_can_not_leave_its_place(tmp_path):
    path = reported(tmp_path, make(tmp_path / "<b>&\u202e", 2))
    assert "<title>&lt;b&gt;&amp;\\u202e</title>" in path.read_text("utf-8")
    assert data_of(path)["runs"][0]["name"] == "<b>&\\u202e"


def test_long_texts_that_need_escapes_stay_below_the_bound(tmp_path):
    """Escapes make a text six times as long; it is cut shorter, and says so, rather than there being no report."""
    bad = "\0<é" * 1200
    run = make(tmp_path / ("x" * 200), 200, texts=tuple(bad + f"{at} " * 600 for at in range(3)))
    append(
        run,
        "health",
        [{"step": step, **dict.fromkeys(("rule", "sentence", "key", "level"), bad)} for step in range(300)],
    )
    path = reported(tmp_path, run)
    assert path.stat().st_size < LARGEST and "\0" not in path.read_text("utf-8")
    (shown,) = data_of(path)["runs"]
    assert len(shown["answers"]) == 4 and shown["answers"][0]["prompt"] == "prompt 0"
    assert shown["answers"][0]["answers"][0]["parts"][0][1].endswith(" more characters)")
    assert len(shown["health"]) == 200 and all(each["rule"].endswith(" more characters)") for each in shown["health"])


@pytest.mark.parametrize(
    "score", [float("nan"), float("inf"), "<b>", [1], 10**400], ids=["nan", "inf", "text", "list", "huge"]
)
def test_a_score_that_is_no_number_is_none(tmp_path, score):
    run = make(tmp_path / "a", 1)
    append(run, "samples", [{"step": 2, "kind": "best", "prompt": "p", "completion": "c", "score": score}])
    assert data_of(reported(tmp_path, run))["runs"][0]["completions"]["2"][0]["score"] is None


def test_lines_stand_out_from_their_background():
    """At least 3 to 1, as WCAG 2.2 has it for graphics (1.4.11); axe doesn't look into a canvas."""

    def light(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def colours(name, form):
        return re.findall(form, (STATIC / name).read_text("utf-8"))

    backs = colours("style.css", r"--card: (#\w{6});")
    lines = colours("panels.css", r"--series-(\d): (#\w{6});")
    assert len(backs) == 2 and [number for number, _ in lines] == [*"012345"] * 2
    for at, (_, colour) in enumerate(lines):
        high, low = sorted((light(colour), light(backs[at // 6])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3, colour


@pytest.mark.slow
def test_long_runs_stay_below_a_megabyte(tmp_path):
    texts = tuple(f"{at} " + "ü word " * 300 for at in range(4))
    runs = [make(tmp_path / name, 3000, texts=texts) for name in "abc"]
    path = reported(tmp_path, *runs)
    assert path.stat().st_size < LARGEST
    for run in data_of(path)["runs"]:
        assert run["every"] > 1 and run["x"][0] == 1 and run["x"][-1] == 3000
        assert run["iterations"][-1] == 3000 and run["iterations_logged"] == 3000 and len(run["completions"]) > 5


def test_errors_are_one_line_and_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make(tmp_path / "runs/a", 2)
    assert CliRunner().invoke(main, ["report", str(run)]).output == "a-report.html\n"
    before = (tmp_path / "a-report.html").read_bytes()
    for arguments, code, said in (
        ([str(run)], 2, "error: a-report.html: already there; name another file with --output"),
        ([str(tmp_path)], 2, f"error: {tmp_path}: not a run folder"),
        ([str(run), "--output", "none/there.html"], 4, "error: none/there.html: cannot be written"),
    ):
        result = CliRunner().invoke(main, ["report", *arguments])
        assert result.exit_code == code and result.output.startswith(said) and result.output.count("\n") == 1
    assert (tmp_path / "a-report.html").read_bytes() == before and not (tmp_path / "none").exists()
    (run / "run.json").write_text("[]")
    assert CliRunner().invoke(main, ["report", str(run), "--output", "b.html"]).exit_code == 4


def looked(browser, path):
    """Open a report; what its console said."""
    browser.get_log("browser")
    browser.get(path.as_uri())
    return [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"]


def ask(browser, script, *arguments):
    return browser.execute_script(f"return {script}", *arguments)


@pytest.mark.slow
def test_in_a_browser_it_asks_for_nothing_and_shows_hostile_texts(tmp_path, browser):
    folder = make(tmp_path / "a", 30, texts=HOSTILE)
    finding = {"step": 9, "rule": "kl", "sentence": f"KL ran away {HOSTILE[0]}", "key": "kl.coef", "level": "warn"}
    append(folder, "health", [finding])
    path = reported(tmp_path, folder)
    assert looked(browser, path) == []
    assert ask(browser, "performance.getEntriesByType('resource').length") == 0
    figures = data_of(path)["figures"]
    assert ask(browser, "document.querySelectorAll('.plot canvas').length") == len(figures) > 20
    assert ask(browser, "window.hacked") is None and ask(browser, "document.querySelectorAll('img').length") == 0
    shown = ask(browser, "document.querySelector('.completions').textContent")
    assert HOSTILE[0] in shown
    assert f"KL ran away {HOSTILE[0]}." in ask(browser, "document.querySelector('.findings').textContent")
    answers = ask(browser, "document.querySelector('#prompts').textContent")
    for text in (HOSTILE[0], "before \\u202egnitset\\u202c after \\u2067isolated", "null \\x00 bell", HOSTILE[3]):
        assert text in answers
    assert ask(browser, "document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_keys_read_figures_tables_and_completions(tmp_path, browser):
    looked(browser, reported(tmp_path, make(tmp_path / "a", 30)))
    active = browser.switch_to.active_element
    reached = []
    for _ in range(12):
        active.send_keys(KEYS["tab"])
        active = browser.switch_to.active_element
        reached.append(active.get_attribute("class") or active.tag_name)
        if "plot" in reached[-1]:
            break
    assert reached[-1] == "plot"
    said = active.get_attribute("aria-valuetext")
    assert said.startswith("latest, iteration 30: score ")
    active.send_keys(KEYS["left"], KEYS["left"])
    assert active.get_attribute("aria-valuetext").startswith(
        f"iteration 28: score {row(28)['score']:+.3f}".replace("-", MINUS)
    )
    active.send_keys(KEYS["tab"])
    table = browser.switch_to.active_element
    assert table.text == "Table"
    table.send_keys(KEYS["enter"])
    time.sleep(0.2)
    cells = ask(browser, "[...document.querySelectorAll('.table tbody tr')].map((row) => row.textContent)")
    assert len(cells) == 30 and cells[0].startswith("30") and f"{row(30)['score']:+.3f}".replace("-", MINUS) in cells[0]
    slider = browser.find_element("id", "of-iteration")
    assert "best words of iteration 30" in ask(browser, "document.querySelector('.completions').textContent")
    slider.send_keys(KEYS["left"])
    time.sleep(0.2)
    assert "best words of iteration 29" in ask(browser, "document.querySelector('.completions').textContent")


@pytest.mark.slow
@pytest.mark.parametrize("look", mostly([(1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")], AXE))
def test_axe_finds_no_violation(tmp_path, browser, look):
    from axe_core_python.selenium import Axe

    width, scheme = look
    folder = make(tmp_path / "a", 30)
    append(folder, "health", [{"step": 9, "rule": "kl", "sentence": "KL ran away", "key": "kl.coef", "level": "warn"}])
    other = write(tmp_path / "b", "", metrics=[row(1)], samples=text_rows(1, "rollout"))
    path = reported(tmp_path, folder, other)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        looked(browser, path)
        ask(browser, "document.querySelectorAll('details').forEach((each) => { each.open = true })")
        time.sleep(0.5)
        browser.set_script_timeout(180)  # others may compute here too
        found = Axe().run(browser)["violations"]
        assert [(each["id"], [node["target"] for node in each["nodes"]][:3]) for each in found] == []
        assert ask(browser, "document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_ten_thousand_iterations_open_within_two_seconds(tmp_path, browser):
    path = reported(tmp_path, make(tmp_path / "a", 10_000))
    took = []
    for _ in range(3):  # the best of three: others may compute here too
        began = time.monotonic()
        looked(browser, path)
        assert ask(browser, "document.querySelectorAll('.plot canvas').length") > 20
        took.append(time.monotonic() - began)
    assert min(took) < 2
