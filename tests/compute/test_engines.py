"""The engine of a GPU against mlx's own optimizer, against the CPU's sampling, and against the CPU's gradients."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest

from mlx_ppo.algo.truncation import Distribution
from mlx_ppo.compute.choose import using
from mlx_ppo.compute.cpu.engine import CpuEngine
from mlx_ppo.compute.cpu.sampling import sample
from mlx_ppo.compute.engine import Engine, Step
from mlx_ppo.compute.portable import PortableEngine, sampled
from mlx_ppo.models.adapters import Weights

Arrays = dict[str, mx.array]
ROUNDING = 1e-5  # relative, of a gradient that float32 sums up in another order


def drawn(seed: int, size: float = 1.0) -> Arrays:
    generator = np.random.default_rng(seed)
    shapes = {"a": (7, 5), "b": (33,), "c": (2, 3, 4)}
    return {name: mx.array(size * generator.normal(size=shape), mx.float32) for name, shape in shapes.items()}


def steps_of(engine: Engine, factor: float, decay: float) -> tuple[Arrays, dict[str, Arrays]]:
    """Weights and moments after six steps at different rates."""
    weights = drawn(0)
    moments = {name: {key: mx.zeros_like(array) for key in "mv"} for name, array in weights.items()}
    for number in range(1, 7):
        step = Step(number, 0.03 / number, factor, 0.8, 0.95, 1e-6, decay)
        weights = engine.adamw(weights, drawn(number, 10.0**-number), moments, step)
    return weights, moments


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("kind", [PortableEngine, CpuEngine])
def test_adamw_is_that_of_mlx(kind: type[Engine], factor: float, decay: float) -> None:
    """With bias correction, on gradients that the clipping has scaled."""
    weights, moments = steps_of(kind(), factor, decay)
    reference = mlx.optimizers.AdamW(0.0, betas=[0.8, 0.95], eps=1e-6, weight_decay=decay, bias_correction=True)
    expected = drawn(0)
    for number in range(1, 7):
        reference.learning_rate = 0.03 / number
        scaled = {name: factor * array for name, array in drawn(number, 10.0**-number).items()}
        expected = reference.apply_gradients(scaled, expected)
    for name, array in expected.items():
        np.testing.assert_allclose(np.array(weights[name]), np.array(array), rtol=1e-5, atol=1e-6)
        for key in "mv":
            wanted = np.array(reference.state[name][key])
            np.testing.assert_allclose(np.array(moments[name][key]), wanted, rtol=1e-5, atol=1e-7 * abs(wanted).max())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_both_engines_step_alike(decay: float) -> None:
    (weights, moments), (others, more) = (steps_of(kind(), 0.25, decay) for kind in (PortableEngine, CpuEngine))
    for name, array in weights.items():
        np.testing.assert_allclose(np.array(array), np.array(others[name]), rtol=2e-6, atol=2e-7)
        for key in "mv":
            wanted = np.array(more[name][key])
            np.testing.assert_allclose(np.array(moments[name][key]), wanted, rtol=2e-6, atol=1e-7 * abs(wanted).max())


@pytest.mark.parametrize("size", [1, 3, 511, 512, 513, 8000, 50_257])
def test_a_draw_is_never_of_a_token_without_mass(size: int) -> None:
    """Also where rounding puts it beyond the last sum, and where whole blocks have none."""
    generator = np.random.default_rng(size)
    logits = generator.normal(scale=3.0, size=(9, size)).astype(np.float32)
    logits[generator.random(logits.shape) < 0.95] = -np.inf
    logits[np.arange(9), generator.integers(0, size, 9)] = 1.0
    draws = np.array([0.0, 1 - 2**-53, 1 - 2**-24, *generator.random(6)])
    tokens, logprobs, _ = sample(logits, draws, Distribution(1.0))
    exact = np.exp(logits.astype(np.float64))
    bounds = np.cumsum(exact, axis=-1) / exact.sum(axis=-1, keepdims=True)
    rows = np.arange(9)
    assert np.isfinite(logits[rows, tokens]).all() and np.isfinite(logprobs).all()
    assert (bounds[rows, tokens] >= draws - 1e-9).all()
    assert (bounds[rows, tokens] - exact[rows, tokens] / exact.sum(axis=-1) <= draws + 1e-9).all()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("size", [1, 5, 255, 256, 257, 4000, 50_000])
def test_a_device_samples_what_numpy_does(size: int, temperature: float) -> None:
    """The same tokens, unless a draw lies within rounding of the bound between two of them."""
    generator = np.random.default_rng(size)
    logits = generator.normal(scale=3.0, size=(64, size)).astype(np.float32)
    draws = generator.random(64).astype(np.float32)
    draws[:2] = 0.0, np.nextafter(np.float32(1), np.float32(0))
    wanted, logprobs, support = sample(logits, draws, Distribution(temperature))
    *both, found_support = sampled(mx.array(logits), mx.array(draws), Distribution(temperature))
    found, found_logprobs = map(np.array, both)
    assert support is None and found_support is None
    assert found.dtype == np.int32 and found_logprobs.dtype == np.float32
    scaled = logits.astype(np.float64) / (temperature or 1.0)
    exact = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    exact /= exact.sum(axis=-1, keepdims=True)
    rows = np.arange(64)
    bounds = np.cumsum(exact, axis=-1)[rows, np.minimum(found, wanted)]
    allowed = (np.abs(bounds - draws) < 1e-6) & (temperature > 0)
    assert np.all((found == wanted) | allowed)
    assert np.mean(found == wanted) > 0.9
    np.testing.assert_allclose(found_logprobs, np.log(exact[rows, found]), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(logprobs, np.log(exact[rows, wanted]), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_give_none(bad: float, temperature: float) -> None:
    """As a log-probability, by which decoding stops."""
    logits = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
    logits[1, 17] = bad
    draws = np.full(3, 0.5, np.float32)
    assert np.isnan(sample(logits, draws, Distribution(temperature))[1][1])
    logprobs = np.array(sampled(mx.array(logits), mx.array(draws), Distribution(temperature))[1])
    assert np.isnan(logprobs[1]) and np.isfinite(logprobs[[0, 2]]).all()


@dataclass
class Recorder:
    """Stands in for an optimizer: keeps the gradients and leaves the weights as they are."""

    seen: list[dict[str, np.ndarray]] = field(default_factory=list)

    def step(
        self, engine: Engine, weights: Weights, gradients: Mapping[str, mx.array], *, what: str
    ) -> tuple[Weights, float]:
        self.seen.append({name: np.array(gradient, np.float64) for name, gradient in gradients.items()})
        return weights, 0.0


@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize(
    ("critic", "full", "layers"), [("adapters", False, 0), ("adapters", False, 1), ("model", True, 0)]
)
def test_both_engines_have_the_same_rollout_and_gradients(
    make_world: Callable[..., Any], critic: str, full: bool, layers: int, checkpointing: str
) -> None:
    found = []
    for kind in (CpuEngine, PortableEngine):
        with using(kind()):
            world = make_world(critic, full=full, layers=layers, keep=True)
        assert type(world.roles.trunk.engine) is kind
        world.policy.optimizer, world.critic.optimizer = policy, values = Recorder(), Recorder()
        world.update(epochs=1, minibatches=2, micro_batch=3, gradient_checkpointing=checkpointing)
        found.append((world.rollout.responses, policy.seen, values.seen))
    (responses, *gradients), (others, *more) = found
    assert responses == others and len(set(map(len, responses))) > 1
    for steps, other_steps in zip(gradients, more, strict=True):
        assert len(steps) == len(other_steps) == 2
        for one, other in zip(steps, other_steps, strict=True):
            assert one.keys() == other.keys() and any(array.any() for array in one.values())
            for name, array in one.items():
                assert np.linalg.norm(other[name] - array) <= ROUNDING * np.linalg.norm(array), name
