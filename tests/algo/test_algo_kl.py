import json
import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ppo.algo.kl import AdaptiveKL, FixedKL, kl_estimate


def test_row_by_hand():
    # k1 = -1 - -3 = 2; k2 = 4/2; k3 = e^-2 - 1 + 2. And the other way round: -2, 2, e^2 - 1 - 2.
    logprobs, ref_logprobs = mx.array([[-1.0, -3.0]]), mx.array([[-3.0, -1.0]])
    assert kl_estimate(logprobs, ref_logprobs, kind="k1").tolist() == [[2, -2]]
    assert kl_estimate(logprobs, ref_logprobs, kind="k2").tolist() == [[2, 2]]
    expected = [[math.exp(-2) + 1, math.exp(2) - 3]]
    np.testing.assert_allclose(kl_estimate(logprobs, ref_logprobs, kind="k3"), expected, rtol=1e-6)


def test_expectation_is_the_divergence():
    # Brute force over the whole distribution: E_p[k1] = E_p[k3] = KL(p || q), exactly, in this direction.
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    divergence = (p * np.log(p / q)).sum()
    assert divergence != pytest.approx((q * np.log(q / p)).sum(), rel=0.02)
    for kind in ("k1", "k3"):
        estimate = kl_estimate(mx.array(np.log(p)), mx.array(np.log(q)), kind=kind)
        assert (p * np.array(estimate)).sum() == pytest.approx(divergence, rel=1e-5)


def test_k3_keeps_its_digits_where_it_is_small():
    # Near 1e-6, where exp(-k1) - 1 + k1 would be off by several percent.
    d = np.array([0.0013, 0.0017, 0.0023], np.float32)
    estimate = kl_estimate(mx.array(-d), mx.zeros(3), kind="k3")
    np.testing.assert_allclose(estimate, np.expm1(d.astype(np.float64)) - d, rtol=1e-3)


def test_computed_in_float32():
    logprobs = mx.array([[-100.5]], mx.bfloat16)
    estimate = kl_estimate(logprobs, mx.array([[-100.25]], mx.float32), kind="k1")
    assert estimate.dtype == mx.float32
    assert kl_estimate(logprobs, logprobs, kind="k2").dtype == mx.float32


def test_estimate_refusals():
    with pytest.raises(ValueError, match="shapes differ"):
        kl_estimate(mx.zeros((2, 3)), mx.zeros((3,)), kind="k1")
    with pytest.raises(ValueError, match="kind must be"):
        kl_estimate(mx.zeros((2, 3)), mx.zeros((2, 3)), kind="k4")


def test_adaptive_by_hand():
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    controller.update(6.6, 100)  # error 0.1: 0.1 * (1 + 0.1 * 100/1000)
    assert controller.coef == pytest.approx(0.101)
    controller.update(60.0, 500)  # error 9, clipped to 0.2: * (1 + 0.2 * 0.5)
    assert controller.coef == pytest.approx(0.101 * 1.1)
    controller.update(-3.0, 500)  # error -1.5, clipped to -0.2: * (1 - 0.2 * 0.5)
    assert controller.coef == pytest.approx(0.101 * 1.1 * 0.9)
    controller.update(6.0, 500)  # on target
    assert controller.coef == pytest.approx(0.101 * 1.1 * 0.9)


def test_fixed_stays():
    controller = FixedKL(0.05)
    controller.update(1e9, 512)
    assert controller.coef == 0.05


@pytest.mark.parametrize("make", [FixedKL, lambda coef: AdaptiveKL(coef, 6.0, 10_000)])
def test_state_survives_json_bit_for_bit(make):
    controller = make(0.1)
    for kl in (7.3, 2.9, 11.0):
        controller.update(kl, 64)
    other = make(0.5)
    other.load(json.loads(json.dumps(controller.state())))
    assert other.coef == controller.coef
    controller.update(3.3, 64)
    other.update(3.3, 64)
    assert other.coef == controller.coef


def test_a_bad_observation_leaves_the_coefficient_alone():
    controller = AdaptiveKL(0.1, target=6.0, horizon=100)
    for kl in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="observed_kl must be finite"):
            controller.update(kl, 10)
    # 1 - 0.2 * 500/100 = 0, and negative beyond.
    with pytest.raises(ValueError, match="n_samples must be in"):
        controller.update(0.0, 500)
    assert controller.coef == 0.1


def test_controller_refusals():
    for coef in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="coef must be finite"):
            FixedKL(coef)
        with pytest.raises(ValueError, match="coef must be finite"):
            AdaptiveKL(coef, 6.0, 100)
        for controller in (FixedKL(0.1), AdaptiveKL(0.1, 6.0, 100)):
            with pytest.raises(ValueError, match="coef must be finite"):
                controller.load({"coef": coef})
    for target, horizon in ((0.0, 1.0), (1.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="must be positive"):
            AdaptiveKL(0.1, target, horizon)


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 499)), max_size=20))
def test_adaptive_stays_positive_and_moves_the_right_way(observations):
    controller = AdaptiveKL(0.1, target=6.0, horizon=100)
    for kl, n_samples in observations:
        before = controller.coef
        controller.update(kl, n_samples)
        assert controller.coef > 0
        assert (controller.coef - before) * (kl - 6.0) >= 0
