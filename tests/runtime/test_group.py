"""What processes exchange is the same in all of them, and what it should be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_ppo.runtime import local_group
from mlx_ppo.runtime.group import ALONE

SCRIPT = Path(__file__).with_name("exchanging.py")


def exchange(size: int, times: int = 0) -> list[str]:
    hosts = json.dumps([[f"127.0.0.1:{port}"] for port in local_group._free_ports(size)])
    started = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), hosts, str(times)], stdout=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    found = [process.communicate(timeout=540)[0] for process in started]
    assert [process.returncode for process in started] == [0] * size
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_process_gets_the_same_and_the_right(size: int) -> None:
    assert len(set(exchange(size))) == 1


@pytest.mark.slow
def test_many_reductions_on_four_processes_never_stall() -> None:
    """Reported for mlx's ring with three and more (ml-explore/mlx#4475)."""
    exchange(4, times=2_000)


JOINS_TWICE = """
import sys
from mlx_ppo.errors import ProcessLost, RunError
from mlx_ppo.runtime.local_group import _free_ports, joined

for _ in range(2):
    try:
        joined(0, [[f"127.0.0.1:{port}"] for port in _free_ports(2)], 1.0)
    except (ProcessLost, RunError) as error:
        print(error)
"""


def test_a_process_that_nobody_joins_is_told() -> None:
    """In a process of its own: mlx keeps a group, and a test before this one may have had one."""
    shown = subprocess.run([sys.executable, "-c", JOINS_TWICE], capture_output=True, text=True, timeout=120, check=True)
    first, second = shown.stdout.splitlines()
    assert "could not be reached within 1 seconds" in first
    assert "can share its work only once" in second


def test_a_process_by_itself_exchanges_nothing() -> None:
    arrays = {"a": local_group.mx.ones((2,))}
    assert ALONE.total(arrays) == arrays and ALONE.told([1]) == [1] and ALONE.gather([]) == [[]]
    assert ALONE.leads and list(ALONE.part(3)) == [0, 1, 2]
