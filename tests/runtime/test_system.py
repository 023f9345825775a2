"""What the program does on macOS, played on another system."""

import fcntl
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_ppo.cli import doctor
from mlx_ppo.compute import device
from mlx_ppo.memory import budget as budgets
from mlx_ppo.memory import watchdog
from mlx_ppo.memory.phases import Phase
from mlx_ppo.memory.plan import Plan
from mlx_ppo.memory.watchdog import danger
from mlx_ppo.runs.folder import replace_file
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.runtime import system


@dataclass
class Mac:
    """What it says of itself."""

    level: int = 1  # of the kernel's memory pressure
    chip: dict[str, Any] = field(default_factory=lambda: {"device_name": "Apple M3", "architecture": "applegpu_g15s"})
    recommended: int = 12 << 30  # bytes of its memory for Metal
    wired: list[int] = field(default_factory=lambda: [0])  # limits that were set


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Mac:
    """Darwin with Metal: what the kernel, the chip and mlx answer."""
    played = Mac()

    def sysctlbyname(name: bytes, value: Any, size: Any, new: None, length: int) -> int:
        assert name == b"kern.memorystatus_vm_pressure_level"
        value._obj.value = played.level
        return 0

    def set_wired_limit(limit: int) -> int:
        played.wired.append(limit)
        return played.wired[-2]

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(system.ctypes, "CDLL", lambda _: SimpleNamespace(sysctlbyname=sysctlbyname))
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    told = "max_recommended_working_set_size"
    monkeypatch.setattr(mx, "device_info", lambda: {**played.chip, told: played.recommended})
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    return played


def test_on_a_mac_only_the_kernels_own_judgement_of_memory_counts(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    """It swaps idle programs, and counts little as available, while nothing is short."""
    monkeypatch.setattr(watchdog.psutil, "virtual_memory", lambda: SimpleNamespace(available=1, total=1 << 34))
    monkeypatch.setattr(watchdog.psutil, "swap_memory", lambda: SimpleNamespace(used=9 << 30))
    for level, found in ((1, False), (2, False), (4, True)):
        mac.level = level
        assert bool(danger(0)) == found
    assert "critical memory pressure" in danger(0)


def test_a_macs_budget_is_of_what_is_free_and_of_what_metal_recommends(
    mac: Mac, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What psutil calls available there counts what can be reclaimed."""
    for available, budget in ((8 << 30, 6 << 30), (40 << 30, int(0.9 * (12 << 30)))):
        memory = SimpleNamespace(available=available, total=48 << 30)
        monkeypatch.setattr(budgets.psutil, "virtual_memory", lambda memory=memory: memory)
        monkeypatch.setattr(budgets, "cgroup_room", lambda: None)
        assert budgets.default_budget() == budget


@pytest.mark.parametrize(("resident", "wired"), [(2 << 30, 3 << 30), (20 << 30, int(0.9 * (12 << 30)))])
def test_weights_are_wired_for_the_length_of_a_run_but_never_the_whole_working_set(
    mac: Mac, resident: int, wired: int
) -> None:
    phase = Phase("rollout", {"weights": resident}, {"caches": 1 << 20}, 0)
    with pytest.raises(ValueError), budgets.keeping_to(Plan(Choices(1, 1, 1, False), (phase,), None)):
        assert mac.wired == [0, wired]
        raise ValueError
    assert mac.wired == [0, wired, 0]


def test_a_macs_chip_decides_what_counts_as_exact_and_as_resident(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the M5 on, float32 products are in TF32 unless that is switched off."""
    assert (device.kind(), device.name(), device.working_set()) == ("Metal", "Apple M3", 12 << 30)
    assert not device.arrays_are_resident() and not device.multiplies_coarsely()
    mac.chip["architecture"] = "applegpu_g17s"
    assert device.multiplies_coarsely()
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    assert not device.multiplies_coarsely()


def test_sizes_of_ended_children_are_in_bytes_on_a_mac(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux and macOS give them in other units. Source: getrusage(2) of both."""
    monkeypatch.setattr(system.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=5 << 30))
    assert system.most_held_by_children() == 5 << 30
    monkeypatch.setattr(sys, "platform", "linux")
    assert system.most_held_by_children() == 5 << 40


def test_doctor_tells_of_a_mac(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_PPO_ENGINE", raising=False)  # of tests that run with another engine
    monkeypatch.setattr(doctor, "_products", lambda: doctor.Finding("matrix products", "not measured"))
    found = {finding.name: finding for finding in doctor._findings()}
    assert found["device"].value == "Metal, Apple M3"
    assert found["engine"].value == "portable: mlx computes by Metal"
    assert "let the display sleep" in found["display"].problem


def test_on_a_mac_files_reach_the_drive_itself(mac: Mac, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


def test_a_mac_is_kept_awake_for_the_length_of_a_run(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
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
