"""`mlx-ppo doctor`: what it finds, what it flags, and the proof behind a wall."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import mlx_ppo
from mlx_ppo.cli import doctor, proof
from mlx_ppo.compute.cpu.blas import Blas

MAIN = "import sys; from mlx_ppo.cli.main import main; sys.exit(main())"


def as_program(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", MAIN, "doctor", *arguments],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def walled():
    command = ["unshare", "--user", "--map-root-user", "--net", "true"]
    return bool(shutil.which("unshare")) and not subprocess.run(command, capture_output=True).returncode


def test_everything_is_told_and_a_connection_is_refused():
    done = as_program("--json")
    assert done.returncode == 0, done.stderr
    found = {row["name"]: row for row in json.loads(done.stdout)}
    assert found["mlx-ppo"]["value"].startswith(f"{mlx_ppo.__version__}, Python ")
    assert "GFLOP/s" in found["matrix products"]["value"] and "GiB" in found["memory"]["value"]
    assert found["network"] == {
        "name": "network",
        "value": "a connection to 192.0.2.1 port 9 was refused before anything was sent",
        "problem": "",
        "fatal": False,
    }
    assert found["libraries"]["value"] == "7 of 7 variables keep them offline"
    assert found["mlx's temporary folder"]["value"].endswith(", private")
    plain = as_program(OPENBLAS_NUM_THREADS="1")
    assert plain.returncode == 0 and plain.stderr == ""
    assert [line.split("  ")[0] for line in plain.stdout.splitlines() if not line.startswith(" ")] == list(found)


@pytest.fixture
def shown(project, monkeypatch):
    """The report made in this process, which is not guarded, by name."""

    def run(*arguments, code=0):
        result = project.cli("doctor", "--json", *arguments)
        assert result.exit_code == code, result.output
        return {row["name"]: row for row in json.loads(result.stdout)}, result.stderr

    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    return run


def test_without_the_guard_nothing_is_tried(shown, monkeypatch):
    monkeypatch.setattr(doctor.socket, "socket", None)
    found, _ = shown()
    assert found["network"]["value"].startswith("not guarded")


def test_a_guard_with_a_hole_is_an_error(shown, monkeypatch):
    class Probe:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def settimeout(self, _):
            pass

        def connect(self, _):
            raise TimeoutError("timed out")

    monkeypatch.setattr(doctor.socket, "socket", Probe)
    monkeypatch.setattr(doctor.offline, "refusing", lambda: True)
    found, err = shown(code=4)
    assert found["network"]["value"] == "open"
    assert err == "error: a connection to 192.0.2.1 port 9 was tried (timed out), not refused\n"


def test_what_is_slow_or_open_is_flagged(shown, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "gigaflops", lambda: 60.0)
    found, _ = shown()
    assert found["matrix products"]["problem"] == "" and found["mlx's temporary folder"]["problem"] == ""
    monkeypatch.setattr(doctor, "gigaflops", lambda: 3.0)
    tmp_path.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(doctor, "default_budget", lambda: 1 << 29)
    found, _ = shown()
    assert found["matrix products"]["problem"].startswith("as slow as mlx's reference BLAS")
    assert found["mlx's temporary folder"]["problem"].startswith("others may write libraries into it")
    assert found["memory"]["problem"].startswith("less than 1 GiB for a run")
    monkeypatch.setattr(mlx_ppo, "BLAS", Blas(None, "the reference BLAS stays"))
    assert shown()[0]["matrix products"]["problem"] == "the reference BLAS stays"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    found, err = shown(code=4)
    assert err == "error: changed since mlx_ppo was imported: HF_HUB_OFFLINE\n"


def test_a_macs_display_is_told_of_and_no_others(shown, monkeypatch):
    for kind in ("CPU", "CUDA"):
        monkeypatch.setattr(doctor.device, "kind", lambda kind=kind: kind)
        assert "display" not in shown()[0]
    monkeypatch.setattr(doctor.device, "kind", lambda: "Metal")
    found = shown()[0]["display"]
    assert found["value"].endswith("AGX_RELAX_CDM_CTXSTORE_TIMEOUT is not 1")
    assert "let the display sleep" in found["problem"] and not found["fatal"]
    monkeypatch.setenv("AGX_RELAX_CDM_CTXSTORE_TIMEOUT", "1")
    assert shown()[0]["display"]["problem"] == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only mlx's Linux wheel has a slow BLAS")
def test_the_reference_blas_is_found_out():
    """As it is where OpenBLAS isn't installed."""
    hidden = "from pathlib import Path; glob = Path.glob; "
    hidden += "Path.glob = lambda self, name: [] if 'openblas' in name else glob(self, name); "
    code = "import mlx_ppo; from mlx_ppo.cli.main import main; main(['doctor', '--json'])"
    rows = {}
    for before in ("", hidden):
        done = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True)
        rows[before] = {row["name"]: row for row in json.loads(done.stdout)}["matrix products"]
    assert rows[""]["problem"] == "" and "by libscipy_openblas.so" in rows[""]["value"]
    assert "scipy-openblas32 isn't installed" in rows[hidden]["problem"]
    assert float(rows[hidden]["value"].split()[0]) < doctor._SLOW


@pytest.mark.slow
@pytest.mark.skipif(not walled(), reason="the system allows no network namespace (unshare)")
def test_the_proof():
    done = as_program("--offline-proof")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("offline proof") and "2 iterations trained in " in last
    assert last.endswith("a socket to 192.0.2.1 gets there: Network is unreachable")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="walls of Linux")
@pytest.mark.parametrize(
    ("wall", "words"),
    [
        (["/bin/sh", "-c", "echo unshare failed: Operation not permitted >&2; exit 1"],
         "the system allows no such wall here: unshare failed: Operation not permitted"),
        (["/nowhere/unshare"], "No such file or directory"),
        ([], "the wall has holes: "),
    ],
)  # fmt: skip
def test_no_proof_without_a_wall(shown, monkeypatch, wall, words):
    if not wall and not proof.look_round().up:
        pytest.skip("no interface is up outside either")
    monkeypatch.setattr(doctor, "_wall", lambda: wall)
    found, err = shown("--offline-proof", code=4)
    assert found["offline proof"]["value"] == "none" and words in found["offline proof"]["problem"]
    assert err.splitlines()[-1].startswith("error: no offline proof: ")


def test_no_proof_where_the_training_fails(shown, monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho '[[], \"unreachable\"]'\necho 'error: it is Monday' >&2\nexit 4\n")
    program.chmod(0o700)
    monkeypatch.setattr(doctor, "_wall", lambda: [])
    monkeypatch.setattr(doctor.sys, "executable", str(program))
    found, _ = shown("--offline-proof", code=4)
    words = "no offline proof: the training behind it ended with code 4: error: it is Monday"
    assert found["offline proof"]["problem"] == words
