"""`doctor --acceptance`, in little: everything passes here, and nothing private is told."""

import getpass
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mlx_ppo.cli import acceptance
from mlx_ppo.cli.acceptance import Check
from mlx_ppo.cli.trials import Place

COMMAND = [sys.executable, "-c", "from mlx_ppo.cli.main import main; main()", "doctor"]


@pytest.mark.slow
def test_everything_passes_and_nothing_private_is_told(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "--acceptance", "--minutes", "0.3"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / acceptance.FILE).read_text("utf-8")
    checks = {check["name"]: check for check in json.loads(text)["checks"]}
    assert [line[:4] for line in done.stdout.splitlines()[:-1]] == ["PASS"] * len(checks) and len(checks) == 10
    assert all(check["passed"] for check in checks.values())
    for private in (
        socket.gethostname(),
        str(Path.home()),
        str(tmp_path),
        "/tmp/",
        str(Path(acceptance.__file__).parent),
    ):
        assert private not in text + done.stdout
    assert f"/{getpass.getuser()}" not in text
    four = checks["example, 4-bit"]["figures"]
    assert four["ratio_error"] < 0.2 and 0 < four["measured_over_planned"]["rollout"] < 1.1
    assert checks["kill and resume"]["figures"]["steps"] == [1, 2, 3, 4]
    assert not list(tmp_path.parent.glob("mlx-ppo-acceptance-*"))


def test_a_failure_is_told_and_ends_in_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    def checks(_: object) -> list[Check]:
        return [Check("one", True, "well", {}), Check("two", False, "ill", {"a": 1})]

    monkeypatch.setattr(acceptance, "_checks", checks)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(acceptance.RunError, match="1 of 2 failed: two"):
        acceptance.accept(minutes=1.0, as_json=False)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("PASS  one") and shown[1].startswith("FAIL  two")
    assert json.loads((tmp_path / acceptance.FILE).read_text())["checks"][1]["figures"] == {"a": 1}


@pytest.mark.parametrize("broken", ["[METAL] x", "memory"])
def test_peaks_over_the_plan_and_coarse_ratios_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """A run that went through, with figures that mustn't be."""
    run = tmp_path / "bfloat16"
    run.mkdir()
    row = {"step": 1, "ratio_error": 0.01, "logprob_error": 0.01, "tokens_per_second": 9.0}
    peak = 30 << 20
    if broken == "memory":
        peak *= 2
    else:
        row["ratio_error"] = 0.5
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    (run / "memory.jsonl").write_text(json.dumps({"step": 1, "rollout": peak}) + "\n")
    (run / "plan.json").write_text(json.dumps({"phases": {"rollout": {"mlx_bytes": 30 << 20, "numpy_bytes": 0}}}))
    place = Place(tmp_path, 1.0)
    monkeypatch.setattr(place, "run", lambda _: subprocess.CompletedProcess([], 0, "", ""))
    assert not acceptance._trained(place, "bfloat16", []).passed
    (run / "memory.jsonl").write_text(json.dumps({"step": 1, "rollout": 30 << 20}) + "\n")
    row["ratio_error"] = 0.01
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    assert acceptance._trained(place, "bfloat16", []).passed


@pytest.mark.parametrize("coarse", [False, True])
def test_float32_is_judged_by_what_the_chip_multiplies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coarse: bool
) -> None:
    """In TF32 (CUDA, Macs from the M5 on) a healthy ratio was off by 0.002."""
    (tmp_path / "float32").mkdir()
    row = {"step": 1, "ratio_error": 0.002, "logprob_error": 0.0, "tokens_per_second": 9.0}
    (tmp_path / "float32/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    (tmp_path / "float32/memory.jsonl").write_text(json.dumps({"step": 1, "rollout": 30 << 20}) + "\n")
    phases = {"rollout": {"mlx_bytes": 30 << 20, "numpy_bytes": 0}}
    (tmp_path / "float32/plan.json").write_text(json.dumps({"phases": phases}))
    place = Place(tmp_path, 1.0)
    monkeypatch.setattr(place, "run", lambda _: subprocess.CompletedProcess([], 0, "", ""))
    monkeypatch.setattr(acceptance.device, "multiplies_coarsely", lambda: coarse)
    assert acceptance._trained(place, "float32", []).passed == coarse


# Stands for a run: it logs an iteration, writes on its screen without end, and, told to, saves when that is closed.
RUN = """
import os, signal, subprocess, sys, time
folder, what = sys.argv[1:]
os.makedirs(folder + "/closed/checkpoints")
if what == "leaves somebody":
    subprocess.Popen(["sleep", "99.125"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
if what != "loses all":
    signal.signal(signal.SIGHUP, lambda *_: (os.mkdir(folder + "/closed/checkpoints/000001"), sys.exit()))
if what == "is deaf":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
open(folder + "/closed/metrics.jsonl", "w").write("{}\\n")
while True:
    try:
        print("x" * 10000, flush=True)
    except OSError:
        time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("saves", "saved after iteration 1; no processes are left"),
        ("loses all", "NOT saved after iteration 1; no processes are left"),
        ("leaves somebody", "saved after iteration 1; 1 processes are left"),
        ("is deaf", "cut after 4 s, its share of the time"),
    ],
)
def test_a_terminal_is_really_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, said: str) -> None:
    place = Place(tmp_path, 1.0)
    place.limit = 48.0
    monkeypatch.setattr(place, "train", lambda *_: [sys.executable, "-c", RUN, str(tmp_path), what])
    check = acceptance._tried("closed terminal", acceptance._closed, place)
    assert said in check.said and check.passed == (what == "saves")
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] == ["sleep", "99.125"] and what == "leaves somebody":
            process.kill()


def test_what_takes_longer_than_its_share_is_cut(tmp_path: Path) -> None:
    place = Place(tmp_path, 1.0)
    place.limit = 12.0

    def sleeping(place: Place) -> Check:
        with place.started(["sleep", "1000"]) as process:
            place.until("x", 1, process)
        raise AssertionError

    assert acceptance._tried("x", lambda place: place.run(["sleep", "1000"]), place) == Check(
        "x",
        False,
        "cut after 1 s, its share of the time: it hangs, or this machine is too slow for it",
        {"cut_after_seconds": 1.0},
    )
    assert acceptance._tried("x", sleeping, place).said.startswith("cut after 1 s")


@pytest.mark.parametrize(("minutes", "limit"), [(0.3, 20), (10, 40), (15, 60)])
def test_all_shares_together_are_the_limit_and_the_long_run_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, limit: int
) -> None:
    shares: dict[str, float] = {}
    place = Place(tmp_path, minutes)

    def begin(name: str, _: object, place: Place, *given: object) -> Check:
        tried(name, lambda _: Check("", False, "ill", {}), place)
        shares[name] = place.share
        return Check(name, False, "ill", {})

    tried = acceptance._tried
    monkeypatch.setattr(acceptance, "_tried", begin)
    monkeypatch.setattr(acceptance, "_machine", lambda _: Check("machine", True, "", {}))
    found = {check.name: check for check in acceptance._checks(place)}
    assert place.limit == 60 * limit and sum(shares.values()) == pytest.approx(place.limit)
    assert shares["a long run"] > 60 * minutes
    assert found["example, 4-bit"].passed is False
    monkeypatch.setattr(acceptance.device, "kind", lambda: "CUDA")
    four = {check.name: check for check in acceptance._checks(place)}["example, 4-bit"]
    assert four.passed is None and four.said == "quantised models are not promised on CUDA: ill"


def test_growth_is_told_from_longer_responses() -> None:
    """Peaks follow the lengths of responses; arrays that stay, and memory outside of them, show by themselves."""
    rows = [{"seconds": 2.0, "tokens_per_second": 100.0} for _ in range(43)]
    memory = [{"update policy": 100 + step, "update step": 50} for step in range(43)]
    found = acceptance._growth(rows, memory, [10**9] * 200)
    assert found == {"arrays_last_over_first": 1.0, "resident_more_mb": 0.0, "pace_last_over_first": 1.0}
    leaking = [{**row, "update step": 50 + step} for step, row in enumerate(memory)]
    assert acceptance._growth(rows, leaking, [])["arrays_last_over_first"] > 1.2
    slower = [{"seconds": 2.0 + step / 43, "tokens_per_second": 100.0 / (1 + step / 86)} for step in range(43)]
    found = acceptance._growth(slower, memory, [10**9 + step * 10**6 for step in range(200)])
    assert found["pace_last_over_first"] > 1.2 and found["resident_more_mb"] == 150.0


def test_longer_than_a_quarter_of_an_hour_is_refused() -> None:
    done = subprocess.run([*COMMAND, "--acceptance", "--minutes", "16"], capture_output=True, text=True)
    assert done.returncode == 2 and "16.0 is not in the range 0<x<=15" in done.stderr


def test_minutes_go_with_acceptance() -> None:
    done = subprocess.run([*COMMAND, "--minutes", "1"], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2 and "--minutes goes with --acceptance" in done.stderr
