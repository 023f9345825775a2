"""A small project for every test of the command line."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from project import Project

from mlx_ppo.compute.cpu.engine import CpuEngine
from mlx_ppo.compute.engine import Capabilities
from mlx_ppo.compute.portable import PortableEngine
from mlx_ppo.models.trunk import Trunk


@pytest.fixture
def project(tmp_path: Path, model_folder: Path) -> Project:
    """A project with the tiny llama."""
    folder = tmp_path / "project"
    folder.mkdir()
    return Project(folder, model_folder)


@pytest.fixture(scope="session")
def reward_folders(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    """Reward models trained through the command line, by placement."""
    made = {}
    for placement, train in (("adapters", "lora"), ("folder", "full")):
        folder = tmp_path_factory.mktemp(f"reward_{placement}")
        project = Project(folder, model_folder)
        project.done("reward", project.config("reward", model={"train": train}, reward_training={"epochs": 6}))
        made[placement] = project.run() / "reward"
    return made


@pytest.fixture(autouse=True)
def _no_global_random_draws() -> Iterator[None]:
    """Results must not depend on mlx's global generator: give it another state before each test."""
    mx.random.seed(int.from_bytes(os.urandom(4), "big"))
    yield


_found: dict[object, Capabilities] = {}


@pytest.fixture(autouse=True)
def _tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine tries with a model that is loaded, tried once for equal models: most commands load the tiny llama.

    The trials were most of what such a command computes; tests/compute is about them. Subprocesses still do each.
    """

    def trying(capabilities: Callable[..., Capabilities]) -> Callable[..., Capabilities]:
        def once(engine: Any, body: Trunk, *, checked: bool) -> Capabilities:
            if not checked:
                return capabilities(engine, body, checked=False)
            key = (capabilities, *vars(engine).items(), *_identity(body))
            if key not in _found:
                _found[key] = capabilities(engine, body, checked=True)
            return _found[key]

        return once

    for kind in (CpuEngine, PortableEngine):
        monkeypatch.setattr(kind, "capabilities", trying(kind.capabilities))


def _identity(body: Trunk) -> tuple[object, ...]:
    """Of a model: configuration, modules, tokens, and every weight."""
    weights = hashlib.blake2b()
    for name, array in body.base.items():
        weights.update(f"{name} {array.dtype} {array.shape}".encode())
        weights.update(np.asarray(mx.view(array.reshape(-1), mx.uint8)).tobytes())
    return (Path(body.name) / "config.json").read_bytes(), str(body.model), body.vocab_size, weights.digest()
