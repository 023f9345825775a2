"""The server of mlx-lm as a judge, with the bundled model, which writes reviews whatever it is asked."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_ppo.config.addresses import parse_address
from mlx_ppo.rewards.judge_server import JudgeServer, UselessError

REVIEWS = Path(__file__).resolve().parents[2] / "models" / "reviews"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(REVIEWS), *where]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 240
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


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
