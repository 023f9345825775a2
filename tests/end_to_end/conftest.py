"""A small project for every test of the command line."""

import os
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from project import Project


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
