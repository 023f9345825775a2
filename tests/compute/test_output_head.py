"""Log-probabilities by chunks of positions, against float64 and against the logits of all at once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.compute import output_head
from mlx_ppo.compute.choose import using
from mlx_ppo.compute.cpu.engine import CpuEngine
from mlx_ppo.compute.cpu.vocabulary import vocabulary_statistics
from mlx_ppo.compute.engine import Engine
from mlx_ppo.compute.output_head import OutputHead
from mlx_ppo.compute.portable import PortableEngine
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk

N, TEMPERATURE, CAP = 11, 0.7, 2.0
SIZES = [1, 4, 11, 0]
BY_ROW = np.linspace(-1.0, 2.0, N)


@pytest.fixture(params=["llama", "qwen2", "gemma2", "gpt2"])
def any_trunk(request: pytest.FixtureRequest, engine: Engine, make_model: Callable[..., Path]) -> Trunk:
    """An untied head, a tied one, one whose logits are capped, and an embedding of another name."""
    return load_trunk(make_model(request.param))


@pytest.fixture
def tokens() -> mx.array:
    return mx.array(np.random.default_rng(2).integers(0, 304, N).astype(np.int32))


@pytest.fixture(params=[CpuEngine, PortableEngine])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """What a CPU computes, and what a GPU would."""
    chosen: Engine = request.param()
    with using(chosen):
        yield chosen


def head_statistics(
    trunk: Trunk, states: mx.array, tokens: mx.array, *, temperature: float, learning: bool = False
) -> tuple[mx.array, mx.array]:
    return trunk.engine.statistics(trunk, states, tokens, temperature=temperature, learning=learning)


def states_for(trunk: Trunk) -> mx.array:
    return mx.random.normal((N, trunk.width), key=mx.random.key(4))


def exact(trunk: Trunk, states: mx.array, tokens: mx.array, weights: tuple[float, float]) -> tuple[np.ndarray, ...]:
    """Log-probabilities, entropies, and the gradient of a weighted sum of both by the states, in float64."""
    capped = "gemma" in type(trunk.model).__module__
    names = ("lm_head.weight", "model.embed_tokens.weight", "model.wte.weight")
    name = next(name for name in names if name in trunk.base)
    head = np.array(trunk.base[name].astype(mx.float32), np.float64)
    logits = np.array(states, np.float64) @ head.T
    slope = np.ones_like(logits)
    if capped:
        bent = np.tanh(logits / CAP)
        logits, slope = bent * CAP, 1 - bent**2
    scaled = logits / TEMPERATURE
    scaled -= scaled.max(axis=-1, keepdims=True)
    log_p = scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
    p, entropies = np.exp(log_p), -(np.exp(log_p) * log_p).sum(axis=-1)
    chosen = np.eye(logits.shape[-1])[np.array(tokens)]
    by_logits = weights[0] * (chosen - p) - weights[1] * p * (log_p + entropies[:, None])
    gradient = BY_ROW[:, None] * ((by_logits * slope / TEMPERATURE) @ head)
    return (log_p * chosen).sum(axis=-1), entropies, gradient


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("learning", "weights"), [(True, (0.7, 0.0)), (False, (1.0, 0.0)), (False, (0.6, -1.3))])
def test_values_and_gradients(
    any_trunk: Trunk, tokens: mx.array, size: int, learning: bool, weights: tuple[float, float]
) -> None:
    """Whether the gradient was announced, and so is of the log-probabilities alone, or not."""
    states, scale = states_for(any_trunk), mx.array(BY_ROW.astype(np.float32))
    any_trunk.positions = size

    def loss(states: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        found = head_statistics(any_trunk, states, tokens, temperature=TEMPERATURE, learning=learning)
        total = weights[0] * found[0] if learning else weights[0] * found[0] + weights[1] * found[1]
        return (scale * total).sum(), *found

    (_, logprobs, entropies), gradient = mx.value_and_grad(loss)(states)
    expected = exact(any_trunk, states, tokens, weights)
    if learning:
        entropies = mx.array(expected[1])  # nobody reads them
    for found, wanted in zip((logprobs, entropies, gradient), expected, strict=True):
        np.testing.assert_allclose(np.array(found), wanted, rtol=1e-4, atol=2e-5 * np.abs(wanted).max())
    for found, wanted in zip(
        head_statistics(any_trunk, states, tokens, temperature=TEMPERATURE), expected, strict=False
    ):
        np.testing.assert_allclose(np.array(found), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("entropy", [0.0, 0.5])
def test_a_head_that_learns_has_its_own_gradient(any_trunk: Trunk, tokens: mx.array, size: int, entropy: float) -> None:
    """All of the model's weights are trained: those that the head reads, and others that it doesn't."""
    given = states_for(any_trunk)
    norm = "model.norm.weight" if "model.norm.weight" in any_trunk.base else "model.ln_f.weight"

    def gradients(positions: int | None) -> dict[str, np.ndarray]:
        def loss(arrays: dict[str, mx.array]) -> mx.array:
            own = {name: array for name, array in arrays.items() if name != "states"}
            with any_trunk.using(Weights(own)):
                states = arrays["states"] + arrays[norm]
                if positions is None:
                    logits = any_trunk.logits(states)
                    found = vocabulary_statistics(logits, tokens, temperature=TEMPERATURE)
                else:
                    any_trunk.positions = positions
                    found = head_statistics(any_trunk, states, tokens, temperature=TEMPERATURE, learning=not entropy)
            return (mx.array(BY_ROW.astype(np.float32)) * (mx.sin(found[0]) + entropy * found[1])).sum()

        found = mx.grad(loss)({**any_trunk.base, "states": given})
        return {name: np.array(array) for name, array in found.items()}

    whole, chunked = gradients(None), gradients(size)
    assert np.abs(whole["states"]).max() > 0
    moved = {name for name, array in whole.items() if array.any()} - {"states", norm}
    assert len(moved) == 1, "the head's own weight"
    for name, array in whole.items():
        np.testing.assert_allclose(chunked[name], array, rtol=1e-4, atol=2e-5 * np.abs(whole[moved.copy().pop()]).max())


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("learning", [True, False])
def test_half_precision_keeps_its_type(
    make_model: Callable[..., Path], tokens: mx.array, engine: Engine, dtype: mx.Dtype, learning: bool
) -> None:
    trunk = load_trunk(make_model(), dtype=str(dtype).removeprefix("mlx.core."))
    states = states_for(trunk).astype(dtype)

    def loss(states: mx.array) -> tuple[mx.array, mx.array]:
        logprobs, _ = head_statistics(trunk, states, tokens, temperature=TEMPERATURE, learning=learning)
        return (mx.array(BY_ROW.astype(np.float32)) * logprobs).sum(), logprobs

    found = []
    for trunk.positions in (4, 11):
        (_, logprobs), gradient = mx.value_and_grad(loss)(states)
        assert logprobs.dtype == mx.float32 and gradient.dtype == dtype
        found.append((np.array(logprobs), np.array(gradient.astype(mx.float32))))
    expected = exact(trunk, states.astype(mx.float32), tokens, (1.0, 0.0))
    for logprobs, gradients in found:
        np.testing.assert_allclose(logprobs, expected[0], atol=0.05)
        np.testing.assert_allclose(gradients, expected[2], atol=0.03 * np.abs(expected[2]).max())


@pytest.mark.parametrize(("positions", "expected"), [(0, [11]), (100, [11]), (11, [11]), (10, [6, 5]), (4, [4, 4, 3])])
def test_chunks_are_about_equal(
    trunk: Trunk, tokens: mx.array, monkeypatch: pytest.MonkeyPatch, positions: int, expected: list[int]
) -> None:
    seen: list[int] = []
    real = type(trunk.engine.head).vocabulary  # type: ignore[attr-defined]

    def noted(self: OutputHead, logits: mx.array, *given: mx.array, **named: float) -> tuple[mx.array, mx.array]:
        seen.append(len(logits))
        return real(self, logits, *given, **named)

    monkeypatch.setattr(type(trunk.engine.head), "vocabulary", noted)  # type: ignore[attr-defined]
    monkeypatch.setattr(trunk, "positions", positions)
    head_statistics(trunk, states_for(trunk), tokens, temperature=1.0)
    assert seen == expected


def test_by_default_as_many_as_make_64_megabytes(
    trunk: Trunk, tokens: mx.array, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert output_head._TOGETHER == 64_000_000
    monkeypatch.setattr(output_head, "_TOGETHER", 4 * 304 * 3)
    assert OutputHead()._together(trunk, states_for(trunk)) == 3


def test_a_nan_stays_in_its_row(engine: Engine, trunk: Trunk, tokens: mx.array) -> None:
    states = mx.where(mx.arange(N)[:, None] == 5, mx.nan, states_for(trunk))
    found = mx.grad(lambda x: head_statistics(trunk, x, tokens, temperature=1.0, learning=True)[0].sum())(states)
    assert np.isnan(np.array(found)).any(axis=1).tolist() == [row == 5 for row in range(N)]


@pytest.mark.parametrize("learning", [False, True])
def test_no_states_at_all(engine: Engine, trunk: Trunk, learning: bool) -> None:
    """A batch of empty responses has none."""
    found = head_statistics(trunk, mx.zeros((0, 32)), mx.zeros(0, mx.int32), temperature=1.0, learning=learning)
    assert [array.shape for array in found] == [(0,), (0,)]


@pytest.mark.parametrize(("kind", "name"), [("llama", "lm_head.weight"), ("qwen2", "model.embed_tokens.weight")])
def test_a_plain_heads_gradient_lies_as_the_matrix(
    make_model: Callable[..., Path], tokens: mx.array, kind: str, name: str
) -> None:
    """A transposed one would be copied by the optimizer, and added to the embedding's element by element."""
    with using(CpuEngine()):
        trunk = load_trunk(make_model(kind))

    def loss(arrays: dict[str, mx.array]) -> mx.array:
        with trunk.using(Weights(arrays)):
            states = trunk.inner.embed_tokens(tokens)
            return head_statistics(trunk, states, tokens, temperature=TEMPERATURE)[0].sum()

    gradient = mx.grad(loss)(dict(trunk.base))[name]
    assert np.array(gradient).any()
    assert np.asarray(gradient).flags.c_contiguous
