import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.compute.cpu.engine import CpuEngine
from mlx_ppo.config.sections import OptimizerSection, RunSection
from mlx_ppo.errors import RunError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.runs.folder import METRICS, Run
from mlx_ppo.runtime.signals import Interrupted, Interrupts
from mlx_ppo.stages.optimizer import Optimizer
from mlx_ppo.supervised import Course, Fit, Task, drop_tokens, fit

EPOCHS, BATCHES = 4, 5


class Silent:
    def message(self, text: str) -> None: ...
    def step(self, done: int, total: int, figures: Mapping[str, float]) -> None: ...


class StopAt(Interrupts):
    """A signal that comes before some batch."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.left = batch

    def check(self) -> None:
        self.left -= 1
        if self.left == -1:
            self.received = 15
        super().check()


def target(epoch: int) -> list[mx.array]:
    generator = np.random.default_rng(epoch)
    return [mx.array(generator.normal(size=3), mx.float32) for _ in range(BATCHES)]


def loss(weights: Weights, batch: mx.array, own: Sequence[int], key: mx.array) -> mx.array:
    assert list(own) == [0]
    noise = 0.1 * mx.random.normal((3,), key=key)
    return mx.square(weights.arrays["w"] + weights.arrays["head.bias"] - batch + noise).mean()


def go(
    folder: Path, interrupts: Interrupts, *, losses: tuple[float, ...] = (4, 3, 2, 1), patience: int = 0
) -> dict[str, np.ndarray]:
    """Train; the validation losses of the epochs are given."""
    folder.mkdir(exist_ok=True)

    def validate(weights: Weights) -> dict[str, float]:
        return {"loss": float(losses[state.epoch])}

    optimizer = Optimizer(OptimizerSection(), learning_rate=0.1, total_steps=EPOCHS * BATCHES)
    state = Fit(Weights({"w": mx.zeros((3,)), "head.bias": mx.zeros(())}), optimizer)
    section = RunSection(save_every=3, keep_last=1)
    with Run(folder) as run:
        best = fit(
            Task(CpuEngine(), target, lambda _: [1], loss, validate),
            state,
            run,
            Silent(),
            interrupts,
            Course(section, EPOCHS, patience, blocks=0, validated=True),
        )
    found = {f"best/{name}": np.array(array) for name, array in best.arrays.items()}
    found |= {name: np.array(array) for name, array in state.weights.arrays.items()}
    return found | {f"optimizer/{name}": np.array(array) for name, array in state.optimizer.state().items()}


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


@pytest.mark.parametrize("batch", [0, 1, 4, 5, 7, 13, 19])
def test_interrupted_and_resumed_is_the_same_as_uninterrupted(tmp_path: Path, batch: int) -> None:
    whole = go(tmp_path / "whole", Interrupts(), losses=(4, 1, 3, 2))
    with pytest.raises(Interrupted):
        go(tmp_path / "parts", StopAt(batch), losses=(4, 1, 3, 2))
    parts = go(tmp_path / "parts", Interrupts(), losses=(4, 1, 3, 2))
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array, err_msg=name)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_the_log_has_training_and_validation_loss(tmp_path: Path) -> None:
    go(tmp_path / "run", Interrupts())
    found = rows(tmp_path / "run")
    assert [row["validation_loss"] for row in found] == [4, 3, 2, 1]
    assert [row["step"] for row in found] == [5, 10, 15, 20]
    assert all(0.1 < row["loss"] < 4 for row in found)


def test_the_best_weights_are_returned_and_patience_ends(tmp_path: Path) -> None:
    falling, bump = go(tmp_path / "a", Interrupts()), go(tmp_path / "b", Interrupts(), losses=(2, 1, 3, 4))
    np.testing.assert_array_equal(falling["best/w"], falling["w"])
    assert np.abs(bump["best/w"] - bump["w"]).max() > 0.01
    np.testing.assert_array_equal(bump["w"], falling["w"])
    go(tmp_path / "c", Interrupts(), losses=(1, 2, 3, 4), patience=1)
    assert [row["epoch"] for row in rows(tmp_path / "c")] == [1, 2, 3]


def test_a_loss_that_is_not_finite_is_not_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [*target(0)[:3], mx.array([np.nan, 0, 0])]
    monkeypatch.setattr("test_supervised.target", lambda _: batches)
    with pytest.raises(RunError, match="not finite at step 4"):
        go(tmp_path / "run", Interrupts())


def test_dropped_tokens() -> None:
    given = [[1, *([7] * 2000)], [1], [1, 7]]
    assert drop_tokens(given, 0.0, 300, "a") == given
    noisy = drop_tokens(given, 0.3, 300, "a")
    assert noisy == drop_tokens(given, 0.3, 300, "a") != drop_tokens(given, 0.3, 300, "b")
    assert [len(row) for row in noisy] == [2001, 1, 2]
    assert all(row[0] == 1 for row in noisy)
    changed = [token for token in noisy[0][1:] if token != 7]
    assert len(changed) / 2000 == pytest.approx(0.3, abs=0.04)
    assert 0 <= min(changed) < 10 and 290 <= max(changed) < 300
