import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.compute.cpu.engine import CpuEngine
from mlx_ppo.compute.engine import Engine
from mlx_ppo.compute.portable import PortableEngine
from mlx_ppo.config.sections import OptimizerSection
from mlx_ppo.errors import RunError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.stages.optimizer import Optimizer

ENGINE: list[Engine] = []


@pytest.fixture(autouse=True, params=[CpuEngine, PortableEngine])
def _engine(request: pytest.FixtureRequest) -> None:
    ENGINE[:] = [request.param()]


def make(rate: float = 1e-2, total: int = 10, **section: object) -> Optimizer:
    return Optimizer(OptimizerSection.model_validate(section), learning_rate=rate, total_steps=total)


def start(seed: int = 0) -> Weights:
    generator = np.random.default_rng(seed)
    return Weights({"a.lora_a": mx.array(generator.normal(size=(3, 4)), mx.float32), "b": mx.array([0.5, -2.0])}, 2.0)


def gradients(step: int, size: float = 1.0) -> dict[str, mx.array]:
    generator = np.random.default_rng(100 + step)
    shapes = {name: array.shape for name, array in start().arrays.items()}
    return {name: mx.array(size * generator.normal(size=shape), mx.float32) for name, shape in shapes.items()}


def copies(grads: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name: mx.array(np.array(gradient)) for name, gradient in grads.items()}  # a step uses them up


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_the_first_step_is_as_long_as_the_rate(size: float) -> None:
    """mlx's default, without bias correction, would make it 3.16 times as long."""
    grads = {name: mx.sign(gradient) * size for name, gradient in gradients(0).items()}
    stepped, _ = make(rate=1e-2, eps=1e-12, gradient_clip=1e9).step(ENGINE[0], start(), copies(grads), what="x")
    for name, array in start().arrays.items():
        moved = np.array(array - stepped.arrays[name])
        np.testing.assert_allclose(moved, 1e-2 * np.array(mx.sign(grads[name])), rtol=2e-4)
    assert stepped.scale == 2.0


@pytest.mark.parametrize("section", [{}, {"weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3}])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_five_steps_are_those_of_float64_adamw(section: dict[str, float], schedule: str) -> None:
    optimizer = make(rate=0.03, total=5, schedule=schedule, warmup_steps=2, **section)
    weights, settings = start(), {"beta1": 0.9, "beta2": 0.999, "eps": 1e-5, "weight_decay": 0.0, **section}
    exact = {name: np.array(array, np.float64) for name, array in weights.arrays.items()}
    m = {name: np.zeros_like(array) for name, array in exact.items()}
    v = {name: np.zeros_like(array) for name, array in exact.items()}
    for step in range(5):
        grads = gradients(step)
        weights, norm = optimizer.step(ENGINE[0], weights, copies(grads), what="x")
        wide = {name: np.array(gradient, np.float64) for name, gradient in grads.items()}
        expected_norm = math.sqrt(sum((gradient**2).sum() for gradient in wide.values()))
        assert norm == pytest.approx(expected_norm, rel=1e-5)
        factor = min(1.0, 1.0 / expected_norm)
        progress = (step - 2) / 3
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[schedule]
        rate = 0.03 * (step + 1) / 2 if step < 2 else 0.03 * decay
        for name, gradient in wide.items():
            clipped = factor * gradient
            m[name] = settings["beta1"] * m[name] + (1 - settings["beta1"]) * clipped
            v[name] = settings["beta2"] * v[name] + (1 - settings["beta2"]) * clipped**2
            m_hat = m[name] / (1 - settings["beta1"] ** (step + 1))
            v_hat = v[name] / (1 - settings["beta2"] ** (step + 1))
            decayed = exact[name] * (1 - rate * settings["weight_decay"])
            exact[name] = decayed - rate * m_hat / (np.sqrt(v_hat) + settings["eps"])
    for name, array in exact.items():
        np.testing.assert_allclose(np.array(weights.arrays[name]), array, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25, 0, 0]),
        ({"schedule": "cosine"}, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0, 0]),
        ({"warmup_steps": 2}, [0.5, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup_steps": 2}, [0.5, 1, 1, 0.5, 0, 0]),
        ({"schedule": "linear", "warmup_steps": 9}, [1 / 9, 2 / 9, 3 / 9, 4 / 9, 5 / 9, 6 / 9]),
    ],
)
def test_rates(section: dict[str, object], expected: list[float]) -> None:
    optimizer = make(rate=0.2, total=4, **section)
    assert [optimizer.rate(step) for step in range(6)] == pytest.approx([0.2 * share for share in expected])


def test_clipping_is_by_the_global_norm() -> None:
    """Of all arrays together, so that their direction stays."""
    grads = {"a.lora_a": mx.full((3, 4), 3.0), "b": mx.array([4.0, 0.0])}
    norm = math.sqrt(12 * 9 + 16)
    optimizer = make(gradient_clip=0.5)
    _, seen = optimizer.step(ENGINE[0], start(), copies(grads), what="x")
    assert seen == pytest.approx(norm)
    for name, gradient in grads.items():
        moment = np.array(optimizer.state()[f"m/{name}"])
        np.testing.assert_allclose(moment, 0.1 * np.array(gradient) * 0.5 / norm, rtol=1e-5)
    small = make(gradient_clip=100.0)
    small.step(ENGINE[0], start(), copies(grads), what="x")
    np.testing.assert_allclose(np.array(small.state()["m/b"]), [0.4, 0.0], rtol=1e-6, err_msg="below the bound")


@pytest.mark.parametrize("after", [0, 1, 3])
def test_resuming_is_bit_exact(after: int) -> None:
    section = {"schedule": "cosine", "weight_decay": 0.01, "warmup_steps": 2}
    whole, weights = make(**section), start()
    for step in range(6):
        if step == after:
            saved = {name: np.array(array) for name, array in whole.state().items()}
            held = {name: np.array(array) for name, array in weights.arrays.items()}
        weights, _ = whole.step(ENGINE[0], weights, gradients(step), what="x")
    resumed = make(**section)
    resumed.load({name: mx.array(array) for name, array in saved.items()}, after)
    again = start().holding({name: mx.array(array) for name, array in held.items()})
    assert bool(saved) == (after > 0)
    for step in range(after, 6):
        again, _ = resumed.step(ENGINE[0], again, gradients(step), what="x")
    assert resumed.steps == whole.steps == 6
    for name, array in weights.arrays.items():
        np.testing.assert_array_equal(np.array(again.arrays[name]), np.array(array))
    assert resumed.state().keys() == whole.state().keys()
    for name, array in whole.state().items():
        np.testing.assert_array_equal(np.array(resumed.state()[name]), np.array(array))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("earlier", [0, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float, earlier: int) -> None:
    optimizer, weights = make(), start()
    for step in range(earlier):
        weights, _ = optimizer.step(ENGINE[0], weights, gradients(step), what="x")
    arrays = {name: np.array(array) for name, array in weights.arrays.items()}
    state = {name: np.array(array) for name, array in optimizer.state().items()}
    bad = gradients(9)
    bad["a.lora_a"] = mx.where(mx.arange(4) == 2, value, bad["a.lora_a"])
    with pytest.raises(RunError, match="the critic's gradient is not finite"):
        optimizer.step(ENGINE[0], weights, bad, what="critic")
    assert optimizer.steps == earlier
    assert optimizer.state().keys() == state.keys()
    for before, now in ((arrays, weights.arrays), (state, optimizer.state())):
        for name, array in before.items():
            np.testing.assert_array_equal(np.array(now[name]), array)


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_gradients_that_lie_transposed_are_stepped_as_others_are(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mlx makes them for a linear layer's matrix; one of three axes too."""
    monkeypatch.setattr("mlx_ppo.compute.cpu.optimizer._PIECE", piece)
    generator = np.random.default_rng(3)
    draw = {name: generator.normal(size=shape).astype(np.float32) for name, shape in (("a", (6, 5)), ("c", (2, 3, 4)))}
    found = []
    for transposed in (False, True):
        weights, optimizer = Weights({name: mx.zeros(array.shape) for name, array in draw.items()}), make()
        for _ in range(2):
            grads = {name: mx.array(array.T).T if transposed else mx.array(array) for name, array in draw.items()}
            mx.eval(grads)
            weights, norm = optimizer.step(ENGINE[0], weights, dict(grads), what="x")
        found.append((weights.arrays, norm))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    for name in draw:
        np.testing.assert_allclose(np.array(found[0][0][name]), np.array(found[1][0][name]), rtol=1e-6)
        assert np.asarray(found[1][0][name]).flags.c_contiguous, "a resumed run's would, and products differ by that"


def test_one_array_as_two_weights_gradient() -> None:
    """As of two biases that are added to the same states; the new weights of one must not fall on the other's."""
    same, other = mx.array([3.0, -4.0]), mx.array([0.0, 1.0])
    weights = Weights({name: mx.zeros((2,)) for name in ("a", "b", "c")})
    optimizer = make(rate=0.5, gradient_clip=1e9)
    stepped, _ = optimizer.step(ENGINE[0], weights, {"a": same, "b": same, "c": other}, what="x")
    np.testing.assert_allclose(np.array(optimizer.state()["m/b"]), [0.3, -0.4], rtol=1e-6)
    for name, expected in (("a", [-0.5, 0.5]), ("b", [-0.5, 0.5]), ("c", [0.0, -0.5])):
        np.testing.assert_allclose(np.array(stepped.arrays[name]), expected, rtol=1e-4)
        assert not np.array(weights.arrays[name]).any(), "the old weights stay"
