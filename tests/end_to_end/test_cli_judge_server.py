"""The server of mlx-lm as a judge, with the bundled model, which writes reviews whatever it is asked, and SmolLM2."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_cli_walls import CALLS, MAIN, reaching_out, tracer

from mlx_ppo.config.addresses import parse_address
from mlx_ppo.importing.convert import import_model
from mlx_ppo.rewards.judge_answers import ANSWERS
from mlx_ppo.rewards.judge_server import JudgeServer, UselessError

REVIEWS = Path(__file__).resolve().parents[2] / "models" / "reviews"
pytestmark = pytest.mark.slow


@contextmanager
def served(model: Path, port: int = 0) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Mlx-lm's server of a model: its address, once it answers to a connection, and its process."""
    if not port:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    serve = "import mlx_ppo; from mlx_lm.server import main; main()"  # with the quick BLAS
    command = [sys.executable, "-c", serve, "--model", str(model), *where]
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=surroundings) as process:
        try:
            deadline = time.monotonic() + 240
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1", process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(REVIEWS) as (where, _):
        yield where


def test_it_answers_and_is_greedy(address: str) -> None:
    server = JudgeServer(parse_address(address), "default_model", timeout=120.0, max_tokens=64)
    said = [server.ask([{"role": "user", "content": "Which one is better, A or B?"}]) for _ in range(2)]
    assert said[0] == said[1] and said[0].strip()
    short = JudgeServer(parse_address(address), "default_model", timeout=120.0, max_tokens=2)
    with pytest.raises(UselessError, match="cut off at its 2 tokens"):
        short.ask([{"role": "user", "content": "Which one is better, A or B?"}])


def test_a_judge_that_only_writes_reviews_is_found_out(project, address):
    pairs = project.jsonl("pairs.jsonl", [{"prompt": "It was", "chosen": " good.", "rejected": " bad."}])
    where = ("--judge", address, "--model", "default_model")
    shown = project.cli("agreement", pairs, *where).stderr
    assert "error: the judge default_model at" in shown and "2 of 2 questions without a usable answer" in shown
    source = {"kind": "judge", "address": address, "model": "default_model", "answer_tokens": 32, "retries": 0}
    config = project.config(reward=[source], run={"iterations": 1}, data={"eval_count": 2})
    words = "questions without a usable answer; the first:"
    project.refused(4, words, "train", config, left=True)


@pytest.fixture(scope="module")
def instructed(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's folder in float32: mlx's quantised products are too slow on a CPU to wait for."""
    folder = tmp_path_factory.mktemp("judge") / "smollm2"
    import_model(smollm2, folder, dtype="float32")
    return folder


def compared(project: Any, address: str, **settings: Any) -> Path:
    """A run whose judge compares the two samples of a prompt, in both orders."""
    source = {"kind": "judge", "mode": "pairwise", "address": address, "model": "default_model", "timeout": 100.0}
    source |= {"rubric": "Say which of the sentences from a film review praises the film more.", "retries": 0}
    source |= {"answer_tokens": 12, "unusable": 0.99, "parallel": 1, **settings}
    rollout = {"prompts": 1, "samples_per_prompt": 2, "max_tokens": 24}
    run = {"iterations": 2, "evaluate_every": 0, "save_every": 1}
    data = {"eval_count": 1, "prompts": str(REVIEWS / "data" / "prompts-train.jsonl")}
    ppo, model = {"advantage": "grpo", "minibatches": 1}, {"path": str(REVIEWS)}
    config: Path = project.config(reward=[source], rollout=rollout, run=run, data=data, ppo=ppo, model=model)
    return config


def test_a_small_judge_that_is_killed_and_comes_back(project: Any, instructed: Path, tmp_path: Path) -> None:
    """SmolLM2 decides by chance, and often not at all: what matters is that nothing is lost, and nobody else asked."""
    trace = tmp_path / "trace"
    with served(instructed) as (address, server):
        command = [*tracer(), *([f"--output={trace}"] if tracer() else []), sys.executable, "-c", MAIN]
        command += ["train", str(compared(project, address))]
        run = subprocess.Popen(command, cwd=project.folder, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 300
        while not (project.run() / "metrics.jsonl").exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        server.kill()
        output, errors = run.communicate(timeout=200)
    assert run.returncode == 4 and "once the judge answers, go on with: mlx-ppo resume runs/a" in errors, (
        output,
        errors,
    )
    assert "Traceback" not in errors
    kept = (project.run() / ANSWERS).read_text()
    assert len(project.metrics()) == 1
    with served(instructed, port=parse_address(address).port) as (again, _):
        assert again == address
        project.done("resume", "runs/a")
    assert len(project.metrics()) == 2 and (project.run() / ANSWERS).read_text().startswith(kept)
    said = [json.loads(line) for line in (project.run() / ANSWERS).read_text().splitlines()]
    assert said and {row["value"] for row in said} <= {0.0, 0.5, 1.0, None}  # None: without a usable answer
    project.done("verify", "runs/a")
    if tracer():
        ports = set(re.findall(r"connect\([^)]*htons\((\d+)\)[^)]*127\.0\.0\.1", trace.read_text()))
        assert "connect" in CALLS and reaching_out(trace.read_text()) == []
        assert ports == {str(parse_address(address).port)}


def test_a_judge_that_stands_still_is_given_up_on(project: Any, instructed: Path) -> None:
    with served(instructed) as (address, server):
        pairs = project.jsonl("pairs.jsonl", [{"prompt": "It was", "chosen": " good.", "rejected": " bad."}])
        where = ("--judge", address, "--model", "default_model", "--timeout", 4)
        server.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        shown = project.refused(4, "can't be reached: no answer within 4 s", "agreement", pairs, *where)
        assert time.monotonic() - began < 60 and address in shown
        server.send_signal(signal.SIGCONT)
