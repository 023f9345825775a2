import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ppo.algo.diagnostics import approx_kl, clip_fractions, effective_sample_size, explained_variance
from mlx_ppo.algo.losses import clipped_policy_loss

NAN, INF = float("nan"), float("inf")
MASK = mx.array([[True, True, True], [True, False, False]])


def test_explained_variance_by_hand():
    # Returns 0 2 4 6: variance 20/3. With V = 0 2 3 7 the errors R - V are 0 0 1 -1: variance 2/3. 1 - 2/20 = 0.9.
    returns = mx.array([[0.0, 2.0, 4.0], [6.0, NAN, INF]])
    values = mx.array([[0.0, 2.0, 3.0], [7.0, INF, NAN]])
    assert explained_variance(values, returns, MASK).item() == pytest.approx(0.9)
    assert explained_variance(returns, returns, MASK).item() == 1
    # A constant offset explains all the variance; a constant explains none.
    assert explained_variance(returns - 5, returns, MASK).item() == pytest.approx(1)
    assert explained_variance(mx.full((2, 3), 3.3), returns, MASK).item() == pytest.approx(0)
    assert explained_variance(-returns, returns, MASK).item() == pytest.approx(-3)


def test_explained_variance_of_equal_returns_is_zero():
    returns, values = mx.full((2, 3), 0.1), mx.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert explained_variance(values, returns, MASK).item() == 0
    assert explained_variance(values, values, mx.zeros((2, 3), mx.bool_)).item() == 0


def test_clip_fractions_by_hand():
    # Low: A < 0 and r < 0.8, one in four. High: A > 0 and r > 1.28, one in four. The others are out of the band on the
    # side where the clip has no effect; padding would count on both.
    ratio = mx.array([[0.5, 0.5, 1.5], [1.5, 0.1, 9.0]])
    advantages = mx.array([[-1.0, 1.0, 1.0], [-1.0, -1.0, 1.0]])
    low, high = clip_fractions(ratio, advantages, MASK, clip_low=0.2, clip_high=0.28)
    assert (low.item(), high.item()) == (0.25, 0.25)


def test_clip_fractions_agree_with_the_vanished_gradient():
    rng = np.random.default_rng(0)
    logprobs, advantages = (mx.array(x.astype(np.float32)) for x in rng.normal(0, 0.5, (2, 20, 30)))
    zeros, everything = mx.zeros((20, 30)), mx.ones((20, 30), mx.bool_)
    clip = {"clip_low": 0.2, "clip_high": 0.28}
    gradient = mx.grad(lambda x: clipped_policy_loss(x, zeros, advantages, **clip)[0].sum())(logprobs)
    _, ratio = clipped_policy_loss(logprobs, zeros, advantages, **clip)
    low, high = clip_fractions(ratio, advantages, everything, **clip)
    assert low.item() > 0.05 < high.item()
    assert low.item() + high.item() == pytest.approx(np.mean(np.array(gradient) == 0))


def test_approx_kl_by_hand():
    # log r = log(new/old): 0.5, -0.5, 0, 0 over the four counted tokens.
    # k1 = mean(-log r) = 0; k3 = mean(r - 1 - log r) = (e^0.5 - 1.5 + e^-0.5 - 0.5) / 4
    old = mx.array([[-1.0, -1.0, -2.0], [-3.0, NAN, 0.0]])
    new = mx.array([[-0.5, -1.5, -2.0], [-3.0, 0.0, INF]])
    k1, k3 = approx_kl(new, old, MASK)
    assert k1.item() == pytest.approx(0, abs=1e-7)
    assert k3.item() == pytest.approx((math.exp(0.5) - 1.5 + math.exp(-0.5) - 0.5) / 4, rel=1e-5)


def test_approx_kl_is_from_old_to_new():
    # Sampling the old distribution exactly (each token as often as it is likely), both are KL(old || new).
    old, new = np.array([0.5, 0.25, 0.25]), np.array([0.2, 0.2, 0.6])
    draws = np.array([[0, 0, 1, 2]])
    k1, k3 = approx_kl(mx.array(np.log(new)[draws]), mx.array(np.log(old)[draws]), mx.ones((1, 4), mx.bool_))
    divergence = (old * np.log(old / new)).sum()
    assert k1.item() == pytest.approx(divergence, rel=1e-5)
    assert k3.item() == pytest.approx(divergence, rel=1e-5)


def test_approx_kl_has_no_gradient_from_padding():
    junk = mx.array([[-1.0, -1.0, -2.0], [-3.0, NAN, -INF]])
    gradient = mx.grad(lambda x: approx_kl(x, junk, MASK)[1])(junk - 0.5)
    # d/dx (r - 1 - log r) / 4 = (r - 1) / 4 with r = e^-0.5.
    expected = np.where(np.array(MASK), (math.exp(-0.5) - 1) / 4, 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_effective_sample_size_by_hand():
    # Ratios 1 1 1 3: 36 / (4 * 12) = 0.75. All the same: 1. One outweighs the rest: 1/4.
    assert effective_sample_size(mx.array([[1.0, 1, 1], [3, NAN, 1e30]]), MASK).item() == pytest.approx(0.75)
    assert effective_sample_size(mx.array([[0.3, 0.3, 0.3], [0.3, INF, 7]]), MASK).item() == pytest.approx(1)
    # Rounding must not carry it past 1, as six times 1.3 would.
    assert effective_sample_size(mx.full((1, 6), 1.3), mx.ones((1, 6), mx.bool_)).item() == 1
    weights = mx.array([[1e-8, 1e-8, math.exp(20)], [1e-8, 1, 1]])
    assert effective_sample_size(weights, MASK).item() == pytest.approx(0.25)


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 5.0])
def test_padding_is_not_averaged_in(junk):
    # Known mistake: diagnostics averaged over padding. Twice as many padded slots change nothing.
    rng = np.random.default_rng(4)
    x, y = rng.normal(0, 0.3, (2, 3, 4)).astype(np.float32)
    mask = np.arange(4) < np.array([[4], [2], [1]])

    def all_of(x, y, mask):
        x, y, mask = map(mx.array, (x, y, mask))
        clip = {"clip_low": 0.1, "clip_high": 0.1}
        ratio = mx.exp(x - y)
        results = (
            explained_variance(x, y, mask),
            *clip_fractions(ratio, y, mask, **clip),
            *approx_kl(x, y, mask),
            effective_sample_size(ratio, mask),
        )
        return [r.item() for r in results]

    def padded(a, fill):
        return np.concatenate([np.where(mask, a, fill), np.full((3, 9), fill)], axis=1).astype(a.dtype)

    expected = [
        all_of(x[mask][None], y[mask][None], mask[mask][None]),
        all_of(padded(x, junk), padded(y, 2.0), padded(mask, False)),
    ]
    assert np.isfinite(expected[0]).all()
    np.testing.assert_allclose(expected[1], expected[0], rtol=1e-5, atol=1e-7)


def test_nothing_counted():
    x, none = mx.full((2, 3), NAN), mx.zeros((2, 3), mx.bool_)
    results = (
        explained_variance(x, x, none),
        *clip_fractions(x, x, none, clip_low=0.2, clip_high=0.2),
        *approx_kl(x, x, none),
        effective_sample_size(x, none),
    )
    assert [r.item() for r in results] == [0] * 6


def test_shapes_must_be_equal():
    x, y, mask = mx.zeros((2, 3)), mx.zeros((2, 1)), mx.ones((2, 3), mx.bool_)
    for call in (
        lambda: explained_variance(x, y, mask),
        lambda: clip_fractions(x, y, mask, clip_low=0.2, clip_high=0.2),
        lambda: approx_kl(x, y, mask),
        lambda: effective_sample_size(y, mask),
    ):
        with pytest.raises(ValueError, match="shapes differ"):
            call()


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(st.integers(1, 30), st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 5.0]))
def test_bounds(count, seed, spread):
    rng = np.random.default_rng(seed)
    log_ratio = np.clip(rng.normal(0, 1, (1, count)) * spread, -20, 20)
    everything = mx.ones((1, count), mx.bool_)
    size = effective_sample_size(mx.array(np.exp(log_ratio)), everything).item()
    assert 0 < size <= 1
    weights = np.exp(log_ratio)
    assert size == pytest.approx(weights.sum() ** 2 / (count * (weights**2).sum()), rel=1e-4)
    _, k3 = approx_kl(mx.array(log_ratio), mx.zeros((1, count)), everything)
    assert k3.item() >= 0
