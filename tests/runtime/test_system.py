"""What the program does on macOS, played on another system."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_ppo.memory import watchdog
from mlx_ppo.memory.watchdog import danger
from mlx_ppo.runs.folder import replace_file
from mlx_ppo.runtime import system


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Darwin, with a memory pressure level of the kernel's."""
    monkeypatch.setattr(sys, "platform", "darwin")

    def sysctlbyname(name: bytes, value: Any, size: Any, new: None, length: int) -> int:
        assert name == b"kern.memorystatus_vm_pressure_level"
        value._obj.value = level[0]
        return 0

    level = [1]
    monkeypatch.setattr(system.ctypes, "CDLL", lambda _: SimpleNamespace(sysctlbyname=sysctlbyname))
    return lambda new: level.__setitem__(0, new)


def test_on_a_mac_only_the_kernels_own_judgement_of_memory_counts(
    mac: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It swaps idle programs, and counts little as available, while nothing is short."""
    monkeypatch.setattr(watchdog.psutil, "virtual_memory", lambda: SimpleNamespace(available=1, total=1 << 34))
    monkeypatch.setattr(watchdog.psutil, "swap_memory", lambda: SimpleNamespace(used=9 << 30))
    for level, found in ((1, False), (2, False), (4, True)):
        mac(level)
        assert bool(danger(0)) == found
    assert "critical memory pressure" in danger(0)


def test_on_a_mac_files_reach_the_drive_itself(
    mac: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int] = []
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(fcntl, "fcntl", lambda _, what: asked.append(what))
    replace_file(tmp_path / "a", "text")
    assert asked == [51, 51] and not synced, "the file, and the folder that names it"

    def unknown(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(fcntl, "fcntl", unknown)
    replace_file(tmp_path / "a", "other")
    assert len(synced) == 2 and (tmp_path / "a").read_text() == "other"


def test_a_mac_is_kept_awake_for_the_length_of_a_run(
    mac: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    class Process:
        def __init__(self, command: list[str]) -> None:
            started.append(command)

        def terminate(self) -> None:
            started.append("ended")

        def wait(self) -> None:
            """It does as it is told."""

    monkeypatch.setattr(subprocess, "Popen", Process)
    with system.staying_awake(False) as said:
        assert said == "" and started == []
    with system.staying_awake(True) as said:
        assert said == "" and started == [["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())]]
    assert started[1:] == ["ended"]


def test_elsewhere_that_is_said() -> None:
    with system.staying_awake(True) as said:
        assert "only macOS is kept awake" in said
    with system.staying_awake(False) as said:
        assert said == ""
