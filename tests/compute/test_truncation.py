"""Which tokens may be drawn, and what is computed on such sets: against enumeration in float64, for both engines."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ppo.algo.truncation import Distribution, limited, packed, support, unpacked, words_of
from mlx_ppo.compute.choose import using
from mlx_ppo.compute.cpu import truncation as by_numpy
from mlx_ppo.compute.cpu.engine import CpuEngine
from mlx_ppo.compute.cpu.sampling import sample
from mlx_ppo.compute.engine import Engine
from mlx_ppo.compute.output_head import OutputHead
from mlx_ppo.compute.portable import PortableEngine, sampled
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk

BOUNDS = {
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "top-k and top-p": {"top_k": 20, "top_p": 0.7},
    "top-p and min-p": {"top_p": 0.9, "min_p": 0.05},
    "all three": {"top_k": 30, "top_p": 0.9, "min_p": 0.04},
    "nothing left out": {"top_k": 10_000},
}
N = 11


def scaled_of(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Logits / temperature in float32, the largest 0, as both engines have them."""
    found = logits.astype(np.float32) / np.float32(temperature)
    return found - found.max(axis=-1, keepdims=True)


def may_be_drawn(scaled: np.ndarray, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """By the definition, token by token: who is more probable, and how much of the mass they have."""
    logits = [float(value) for value in scaled]
    mass = [math.exp(value) for value in logits]
    tokens = {v for v in range(len(logits)) if mass[v] > 0 or math.isfinite(logits[v])}
    if top_k:
        tokens = {v for v in tokens if sum(other > logits[v] for other in logits) < top_k}
    total = math.fsum(mass[v] for v in tokens)
    above = {v: math.fsum(mass[u] for u in tokens if logits[u] > logits[v]) for v in tokens}
    tokens = {v for v in tokens if top_p == 1 or above[v] < top_p * total}
    return {v for v in tokens if not min_p or logits[v] >= np.float32(math.log(min_p))}


def found_sets(scaled: np.ndarray, how: Distribution) -> list[np.ndarray]:
    """[B, V] by mlx and by numpy."""
    return [np.array(support(mx.array(scaled), how)), by_numpy.support(scaled, np.exp(scaled), how)]


# Few different values, so that there are ties; whole ones, so that sums don't lie within rounding of a bound.
rows = st.lists(st.sampled_from([0.0, -1.0, -2.0, -2.5, -4.0, -9.0, -80.0, -math.inf]), min_size=1, max_size=70)
shares = st.sampled_from([0.01, 0.123, 0.5, 0.777, 0.9, 0.999, 1.0])


@settings(max_examples=300, deadline=None)
@given(rows, st.sampled_from([0, 1, 2, 3, 8, 69, 70, 500]), shares, st.sampled_from([0.0, 1e-3, 0.11, 0.3, 0.9]))
def test_sets_are_those_of_the_definition(row: list[float], top_k: int, top_p: float, min_p: float) -> None:
    scaled = np.array([[*row, 0.0]], np.float32)
    wanted = may_be_drawn(scaled[0], top_k=top_k, top_p=top_p, min_p=min_p)
    for found in found_sets(scaled, Distribution(1.0, top_k, top_p, min_p)):
        assert set(np.flatnonzero(found[0]).tolist()) == wanted
        assert found[0, scaled.argmax()], "the most probable token always"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2000), st.integers(0, 2**31), st.integers(0, 300), shares, st.sampled_from([0.0, 0.01, 0.5]))
def test_both_engines_have_the_same_sets(size: int, seed: int, top_k: int, top_p: float, min_p: float) -> None:
    """Also of large vocabularies; and a set has as much mass as was asked for, and not a token too many."""
    scaled = scaled_of(np.random.default_rng(seed).normal(scale=3.0, size=(3, size)))
    how = Distribution(1.0, top_k, top_p, min_p)
    on_device, found = found_sets(scaled, how)
    for row, one, other in zip(scaled.astype(np.float64), on_device, found, strict=True):
        if (one == other).all():
            continue
        mass = np.exp(row)  # else the bound of top_p lies within rounding of what the larger set has without its last
        larger = one if one.sum() > other.sum() else other
        among = mass[row >= np.sort(row)[::-1][min(top_k or size, size) - 1]].sum()
        rest = mass[larger].sum() - mass[larger].min()
        assert abs(larger.sum() - (one & other).sum()) == 1 and abs(rest / among - top_p) < 1e-5


def test_numbers_at_the_edges() -> None:
    sure = np.array([[0.0, -math.inf, -math.inf], [0.0, -1e30, -200.0]], np.float32)
    for bounds in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 3, "top_p": 0.999}):
        for found in found_sets(sure, Distribution(**bounds)):
            assert found[0].tolist() == [True, False, False], "a probability of 1"
    for found in found_sets(sure, Distribution(top_k=2)):
        assert found[1].tolist() == [True, False, True], "one too small for float32 is still in order"
    ties = np.zeros((1, 40), np.float32)
    for bounds in ({"top_k": 3}, {"top_p": 0.01}, {"min_p": 0.99}):
        for found in found_sets(ties, Distribution(**bounds)):
            assert found.all(), "tokens that are equally probable are in together"
    half = np.log(np.array([[0.5, 0.25, 0.25]], np.float32) / 0.5)
    for found in found_sets(half, Distribution(top_p=0.5)):
        assert found[0].tolist() == [True, False, False], "what has the mass already takes no further token"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=100), min_size=1, max_size=1), st.integers(1, 4))
def test_bits(row: list[list[bool]], count: int) -> None:
    tokens = np.array(row * count)
    words = by_numpy.packed(tokens)
    assert words.dtype == np.uint32 and words.shape == (count, words_of(tokens.shape[1]))
    np.testing.assert_array_equal(np.array(packed(mx.array(tokens))), words)
    size = tokens.shape[1]
    np.testing.assert_array_equal(np.array(unpacked(mx.array(words), size)), tokens)
    np.testing.assert_array_equal(by_numpy.outside(words, size), ~tokens)
    for token, within in enumerate(row[0]):
        assert bool(int(words[0, token // 32]) >> (token % 32) & 1) == within


def on_device(logits: np.ndarray, draws: np.ndarray, how: Distribution) -> tuple[Any, ...]:
    tokens, logprobs, words = sampled(mx.array(logits), mx.array(draws), how)
    return np.array(tokens), np.array(logprobs), None if words is None else np.array(words)


SAMPLERS = pytest.mark.parametrize("draw", [sample, on_device])


@SAMPLERS
@pytest.mark.parametrize("name", BOUNDS)
def test_tokens_come_as_often_as_the_truncated_distribution_has_them(draw: Callable[..., Any], name: str) -> None:
    """Pearson's statistic over the set, whose tokens with few expected are taken together."""
    count, temperature = 20_000, 0.8
    logits = np.random.default_rng(1).normal(scale=1.2, size=60).astype(np.float32)
    draws = np.random.default_rng(2).random(count).astype(np.float32)
    tokens, logprobs, words = draw(np.tile(logits, (count, 1)), draws, Distribution(temperature, **BOUNDS[name]))
    scaled = scaled_of(logits, temperature)
    drawn = sorted(may_be_drawn(scaled, **BOUNDS[name]))
    assert set(tokens.tolist()) <= set(drawn)
    assert (np.flatnonzero(~by_numpy.outside(words[:1], 60)[0]) == drawn).all() and (words == words[0]).all()
    probabilities = np.zeros(60)
    probabilities[drawn] = np.exp(scaled[drawn].astype(np.float64))
    probabilities /= probabilities.sum()
    np.testing.assert_allclose(logprobs, np.log(probabilities[tokens]), rtol=1e-5, atol=1e-6)
    observed = np.bincount(tokens, minlength=60)
    common = probabilities * count >= 10
    expected = np.append(probabilities[common], probabilities[~common].sum()) * count
    found, held = np.append(observed[common], observed[~common].sum()), expected > 0
    statistic, freedom = ((found - expected)[held] ** 2 / expected[held]).sum(), held.sum() - 1
    assert freedom >= 5 and abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


@SAMPLERS
@pytest.mark.parametrize("size", [1, 2, 33, 255, 257, 5000])
def test_whatever_is_drawn_is_in_its_set(draw: Callable[..., Any], size: int) -> None:
    """Also by the first and the last number that a draw can be, and among ties."""
    generator = np.random.default_rng(size)
    for round_to in (0.01, 1.0):
        logits = np.round(generator.normal(scale=3.0, size=(64, size)) / round_to).astype(np.float32) * round_to
        draws = generator.random(64).astype(np.float32)
        draws[:32] = np.nextafter(np.float32(1), np.float32(0))
        draws[:8] = 0.0
        for bounds in BOUNDS.values():
            tokens, logprobs, words = draw(logits.astype(np.float32), draws, Distribution(0.7, **bounds))
            assert not by_numpy.outside(words, size)[np.arange(64), tokens].any()
            assert np.isfinite(logprobs).all() and (logprobs <= 0).all()


@SAMPLERS
def test_the_most_probable_token_needs_no_set(draw: Callable[..., Any]) -> None:
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    how = Distribution(0.0, top_k=3, top_p=0.5)
    tokens, _, words = draw(logits, np.full(4, 0.9, np.float32), how)
    assert not how.truncates and how.said == "temperature 0" and words is None
    assert tokens.tolist() == logits.argmax(axis=-1).tolist()


@SAMPLERS
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_give_none(draw: Callable[..., Any], bad: float) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
    logits[1, 17] = bad
    _, logprobs, words = draw(logits, np.full(3, 0.5, np.float32), Distribution(top_k=5, top_p=0.9))
    assert np.isnan(logprobs[1]) and words.shape == (3, 10)


@pytest.fixture(params=[CpuEngine, PortableEngine])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """What a CPU computes, and what a GPU would."""
    chosen: Engine = request.param()
    with using(chosen):
        yield chosen


@pytest.fixture(params=["llama", "gpt2"])
def any_trunk(request: pytest.FixtureRequest, engine: Engine, make_model: Callable[..., Path]) -> Trunk:
    return load_trunk(make_model(request.param))


class Case:
    """States, tokens and sets; and, in float64, what is to be found for them."""

    def __init__(self, trunk: Trunk, bounds: Mapping[str, Any], weights: tuple[float, float]) -> None:
        self.temperature = 0.7
        self.states = 3 * mx.random.normal((N, trunk.width), key=mx.random.key(4))
        self.by_row = np.linspace(-1.0, 2.0, N)
        head = next(trunk.base[n] for n in ("lm_head.weight", "model.wte.weight") if n in trunk.base)
        matrix = np.array(head.astype(mx.float32), np.float64)
        scaled = np.array(self.states, np.float64) @ matrix.T / self.temperature
        # the sets are another policy's, as they are once something is learned
        others = scaled + np.random.default_rng(3).normal(scale=0.5, size=scaled.shape)
        sets = np.array([[v in found for v in range(scaled.shape[1])] for found in
                         (may_be_drawn(scaled_of(row), **bounds) for row in others)])  # fmt: skip
        chosen = [np.random.default_rng(row).choice(np.flatnonzero(own)) for row, own in enumerate(sets)]
        self.tokens, self.words = mx.array(np.array(chosen, np.int32)), mx.array(by_numpy.packed(sets))
        mass = np.where(sets, np.exp(scaled - scaled.max(axis=-1, keepdims=True)), 0.0)
        p = mass / mass.sum(axis=-1, keepdims=True)
        log_p = np.log(np.where(sets, p, 1.0))
        self.logprobs, self.entropies = log_p[np.arange(N), chosen], -(p * log_p).sum(axis=-1)
        by_logits = weights[0] * (np.eye(scaled.shape[1])[chosen] - p)
        by_logits -= weights[1] * p * (log_p + self.entropies[:, None])
        self.gradient = self.by_row[:, None] * ((by_logits / self.temperature) @ matrix)

    def statistics(self, trunk: Trunk, states: mx.array, *, learning: bool) -> tuple[mx.array, mx.array]:
        given = {"temperature": self.temperature, "support": self.words, "learning": learning}
        return trunk.engine.statistics(trunk, states, self.tokens, **given)


@pytest.mark.parametrize("size", [1, 4, 11, 0])
@pytest.mark.parametrize(("learning", "weights"), [(True, (0.7, 0.0)), (False, (1.0, 0.0)), (False, (0.6, -1.3))])
@pytest.mark.parametrize("name", ["top-k", "all three", "nothing left out"])
def test_values_and_gradients(
    any_trunk: Trunk, name: str, size: int, learning: bool, weights: tuple[float, float]
) -> None:
    case = Case(any_trunk, BOUNDS[name], weights)
    any_trunk.positions = size
    scale = mx.array(case.by_row.astype(np.float32))

    def loss(states: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        found = case.statistics(any_trunk, states, learning=learning)
        total = weights[0] * found[0] if learning else weights[0] * found[0] + weights[1] * found[1]
        return (scale * total).sum(), *found

    (_, logprobs, entropies), gradient = mx.value_and_grad(loss)(case.states)
    if learning:
        entropies = mx.array(case.entropies)  # nobody reads them
    wanted = (case.logprobs, case.entropies, case.gradient)
    for found, exact in zip((logprobs, entropies, gradient), wanted, strict=True):
        np.testing.assert_allclose(np.array(found), exact, rtol=1e-4, atol=2e-5 * np.abs(exact).max())
    plain = case.statistics(any_trunk, case.states, learning=False)
    for found, exact in zip(plain, wanted, strict=False):
        np.testing.assert_allclose(np.array(found), exact, rtol=1e-4, atol=2e-5)


def test_gradients_by_finite_differences(engine: Engine, make_model: Callable[..., Path]) -> None:
    """Of log-probabilities and entropies by the logits: outside of the sets nothing changes anything."""
    logits = np.random.default_rng(5).normal(size=(4, 40)).astype(np.float32)
    sets = np.array([[v in may_be_drawn(scaled_of(row), top_k=6) for v in range(40)] for row in logits])
    tokens, words = mx.array(logits.argmax(axis=-1).astype(np.int32)), mx.array(by_numpy.packed(sets))
    head: OutputHead = engine.head  # type: ignore[attr-defined]

    def value(logits: mx.array) -> mx.array:
        logprobs, entropies = head.vocabulary(logits, tokens, words, temperature=0.9)
        return (logprobs - 0.4 * entropies).sum()

    def exact(logits: np.ndarray) -> float:
        total = 0.0
        for row, own, token in zip(logits / 0.9, sets, tokens.tolist(), strict=True):
            log_p = row - np.log(np.exp(row[own]).sum())
            total += log_p[token] + 0.4 * (np.exp(log_p[own]) * log_p[own]).sum()
        return float(total)

    gradient = np.array(mx.grad(value)(mx.array(logits)))
    assert (gradient[~sets] == 0).all() and np.abs(gradient[sets]).max() > 0.1
    step, wide = 1e-5, logits.astype(np.float64)
    for at in np.ndindex(*logits.shape):
        moved = [wide.copy(), wide.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        assert gradient[at] == pytest.approx((exact(moved[0]) - exact(moved[1])) / (2 * step), abs=2e-5)


@pytest.mark.parametrize("size", [4, 0])
@pytest.mark.parametrize("entropy", [0.0, 0.5])
def test_a_head_that_learns_has_the_gradient_of_the_limited_logits(any_trunk: Trunk, size: int, entropy: float) -> None:
    case = Case(any_trunk, BOUNDS["all three"], (1.0, 0.0))
    scale = mx.array(case.by_row.astype(np.float32))

    def gradients(positions: int | None) -> dict[str, np.ndarray]:
        def loss(arrays: dict[str, mx.array]) -> mx.array:
            with any_trunk.using(Weights(arrays)):
                if positions is None:
                    logits = limited(any_trunk.logits(case.states), case.words) / case.temperature
                    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                    logprobs = mx.take_along_axis(log_p, case.tokens[:, None], axis=-1)[:, 0]
                    held = mx.where(mx.isneginf(logits), 0.0, log_p)
                    entropies = -(mx.exp(log_p) * held).sum(axis=-1)
                else:
                    any_trunk.positions = positions
                    logprobs, entropies = case.statistics(any_trunk, case.states, learning=not entropy)
            return (scale * (mx.sin(logprobs) + entropy * entropies)).sum()

        return {name: np.array(array) for name, array in mx.grad(loss)(dict(any_trunk.base)).items()}

    whole, chunked = gradients(None), gradients(size)
    assert sum(bool(array.any()) for array in whole.values()) == 1
    for name, array in whole.items():
        np.testing.assert_allclose(chunked[name], array, rtol=1e-4, atol=2e-5 * max(1e-9, np.abs(array).max()))


def test_what_is_changed_is_checked() -> None:
    how = Distribution(0.8, 5, 0.9, 0.1).changed({"top_k": 0, "min_p": 0.0})
    assert how == (0.8, 0, 0.9, 0.0) and how.bounds == {"top_p": 0.9} and how.said == "temperature 0.8, top-p 0.9"
    out_of_range = {
        "top_k": (-1, 2.5),
        "top_p": (0.0, 1.1, math.nan),
        "min_p": (1.0, -0.1, math.nan),
        "temperature": (-1.0, math.nan),
    }
    for name, values in out_of_range.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name} "):
                how.changed({name: value})
    with pytest.raises(TypeError, match="no 'topp'"):
        how.changed({"topp": 0.5})
