"""What processes exchange is the same in all of them, and what it should be."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from free_ports import free_ports

from mlx_ppo.runtime.group import ALONE

SCRIPT = Path(__file__).with_name("exchanging.py")


def over_the_ring(size: int, times: int = 0) -> None:
    hosts = json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)])
    started = [subprocess.Popen([sys.executable, str(SCRIPT), str(rank), hosts, str(times)]) for rank in range(size)]
    assert [process.wait(timeout=540) for process in started] == [0] * size


def in_memory(size: int, times: int = 0) -> None:
    subprocess.run([sys.executable, str(SCRIPT), str(size), str(times)], check=True, timeout=540)


@pytest.mark.parametrize("exchange", [over_the_ring, in_memory])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_process_gets_the_same_and_the_right(size: int, exchange: Callable[[int], None]) -> None:
    exchange(size)


def test_no_system_call_of_linux_alone_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMFD", "no")
    in_memory(2)


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_closed_standard_streams_are_not_taken_for_the_memory(closed: str) -> None:
    command = shlex.join([sys.executable, str(SCRIPT), "2", "0"])
    subprocess.run(["sh", "-c", f"{command} {closed}"], check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exchange", "times"),
    [(over_the_ring, 400), (in_memory, 2_000), pytest.param(over_the_ring, 2_000, marks=pytest.mark.thorough)],
)
def test_many_reductions_on_four_processes_never_stall(exchange: Callable[[int, int], None], times: int) -> None:
    """Reported for mlx's ring, with three and more (ml-explore/mlx#4475)."""
    exchange(4, times)


JOINS_TWICE = """
import json, sys
from mlx_ppo.errors import ProcessLost, RunError
from mlx_ppo.runtime.ring import joined

for _ in range(2):
    try:
        joined(0, json.loads(sys.argv[1]), 1.0)
    except (ProcessLost, RunError) as error:
        print(error)
"""


def test_a_process_that_nobody_joins_is_told() -> None:
    """In a process of its own: mlx keeps a group, and a test before this one may have had one."""
    command = [sys.executable, "-c", JOINS_TWICE, json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)])]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    first, second = shown.stdout.splitlines()
    assert "could not be reached within 1 seconds" in first
    assert "can join other machines only once" in second


def test_a_process_by_itself_exchanges_nothing() -> None:
    arrays = {"a": mx.ones((2,))}
    assert ALONE.total(arrays) == arrays and ALONE.told([1]) == [1] and ALONE.gather([]) == [[]]
    assert ALONE.leads and list(ALONE.part(3)) == [0, 1, 2]
