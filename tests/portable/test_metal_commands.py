"""The commands, in their own processes, with Metal's rounding."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forms import dtype_of, is_quantised
from project import Project


@pytest.fixture
def job(metal: Any, folder_in: Callable[..., Path], tmp_path: Path, form: str) -> Callable[..., Project]:
    folder = tmp_path / "project"
    folder.mkdir()
    return lambda: Project(folder, folder_in(form))


def test_train_and_plan(job: Callable[..., Project], form: str) -> None:
    """Two iterations; the first ratio is near 1, and what was sampled near what was scored.

    With checkpointing where there are 4 bits; `test_metal_rounding.py` tries the other combinations, without commands.
    """
    project, saving = job(), "on" if is_quantised(form) else "off"
    model = {"dtype": dtype_of(form)}
    ppo = {"gradient_checkpointing": saving}
    config = project.config(model=model, ppo=ppo, run={"iterations": 2})
    assert "update policy" in project.done("plan", config)
    project.done("train", config)
    rows = project.metrics()
    assert len(rows) == 2
    for row in rows:
        assert row["ratio_error"] < (1e-4 if form == "float32" else 0.1)
        assert row["logprob_error"] < (1e-4 if form == "float32" else 0.2)


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_what_comes_before_ppo(job: Callable[..., Project], form: str, kind: str) -> None:
    project = job()
    project.done(kind, project.config(kind, model={"dtype": dtype_of(form)}))
    losses = [row["loss"] for row in project.metrics() if "loss" in row]
    assert losses and all(map(math.isfinite, losses))


def test_a_process_of_its_own_rounds_too(metal: Any) -> None:
    code = "import mlx_ppo.train, mlx.core as mx; print(mx.fast.scaled_dot_product_attention.imitates)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "True\n"
