"""`doctor --acceptance`, in little: everything passes here, and nothing private is told."""

import getpass
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_ppo.cli import acceptance
from mlx_ppo.cli.acceptance import Check

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
    place = acceptance._Place(tmp_path, 1.0)
    monkeypatch.setattr(place, "run", lambda _: subprocess.CompletedProcess([], 0, "", ""))
    assert not acceptance._trained(place, "bfloat16", []).passed
    (run / "memory.jsonl").write_text(json.dumps({"step": 1, "rollout": 30 << 20}) + "\n")
    row["ratio_error"] = 0.01
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    assert acceptance._trained(place, "bfloat16", []).passed


def test_minutes_go_with_acceptance() -> None:
    done = subprocess.run([*COMMAND, "--minutes", "1"], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2 and "--minutes goes with --acceptance" in done.stderr
