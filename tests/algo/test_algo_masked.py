import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ppo.algo.masked import masked_mean, masked_sum, masked_variance, rescale, whiten

NAN, INF = float("nan"), float("inf")

# Counted: 1, 2, 3, 6. Sum 12, mean 3, deviations -2 -1 0 3, unbiased variance (4 + 1 + 0 + 9) / 3 = 14/3.
X = mx.array([[1.0, 2.0, NAN], [3.0, INF, 6.0]])
MASK = mx.array([[True, True, False], [True, False, True]])


def test_row_by_hand():
    assert masked_sum(X, MASK).item() == 12
    assert masked_mean(X, MASK).item() == 3
    assert masked_variance(X, MASK).item() == pytest.approx(14 / 3)
    deviation = (14 / 3) ** 0.5
    np.testing.assert_allclose(whiten(X, MASK), np.array([[-2, -1, 0], [0, 0, 3]]) / deviation, rtol=1e-6)
    # Around the mean they had, 3; masked slots 0, not the mean.
    kept = np.array([[3 - 2 / deviation, 3 - 1 / deviation, 0], [3, 0, 3 + 3 / deviation]])
    np.testing.assert_allclose(rescale(X, MASK), kept, rtol=1e-6)


def test_whiten_centres_and_rescale_does_not():
    # Known mistake: shift_mean inverted, so that advantages are never centred.
    x = mx.array(np.random.default_rng(0).normal(5.0, 3.0, (4, 50)).astype(np.float32))
    everything = mx.ones(x.shape, mx.bool_)
    assert whiten(x, everything).mean().item() == pytest.approx(0, abs=1e-6)
    assert rescale(x, everything).mean().item() == pytest.approx(x.mean().item(), rel=1e-6)
    for result in (whiten(x, everything), rescale(x, everything)):
        assert np.std(np.array(result), ddof=1) == pytest.approx(1, rel=1e-5)


def test_nothing_counted():
    none = mx.zeros(X.shape, mx.bool_)
    for reduce in (masked_sum, masked_mean, masked_variance):
        assert reduce(X, none).item() == 0
    for normalise in (whiten, rescale):
        assert normalise(X, none).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_one_counted():
    one = mx.array([[False, True, False], [False, False, False]])
    assert whiten(X, one).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert rescale(X, one).tolist() == [[0, 2, 0], [0, 0, 0]]


@pytest.mark.parametrize("value", [0.1, -100.3, 12345.678])
def test_equal_values_leave_no_rounding_for_the_scale_to_blow_up(value):
    x = mx.full((7, 13), value)
    everything = mx.ones(x.shape, mx.bool_)
    assert masked_variance(x, everything).item() == 0
    assert mx.abs(whiten(x, everything)).max().item() == 0
    assert mx.abs(rescale(x, everything) - value).max().item() == 0


def test_epsilon_is_inside_the_root():
    # Values 0 and 1e-4: mean 5e-5, unbiased variance 5e-9; 5e-5 / sqrt(5e-9 + 1e-8) = 0.408248.
    x, everything = mx.array([[0.0, 1e-4]]), mx.array([[True, True]])
    np.testing.assert_allclose(whiten(x, everything), [[-0.408248, 0.408248]], rtol=1e-4)


def test_half_precision_is_summed_in_float32():
    # Counting by ones stops at 256 in bfloat16 and at 2048 in float16.
    for dtype in (mx.bfloat16, mx.float16):
        x = mx.ones((1, 5000), dtype)
        total = masked_sum(x, mx.ones(x.shape, mx.bool_))
        assert total.dtype == mx.float32
        assert total.item() == 5000


def test_counted_nan_is_not_hidden():
    everything = mx.ones(X.shape, mx.bool_)
    assert np.isnan(masked_mean(X, everything).item())
    assert np.isnan(np.array(whiten(X, everything))).all()


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_variance, whiten, rescale])
def test_shapes_must_be_equal(function):
    with pytest.raises(ValueError, match="shapes differ: x"):
        function(mx.zeros((2, 3)), mx.ones((2, 1), mx.bool_))


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_variance, whiten, rescale])
def test_no_gradient_leaks_from_masked_slots(function):
    gradient = np.array(mx.grad(lambda x: function(x, MASK).sum())(X))
    assert np.isfinite(gradient).all()
    assert (gradient[~np.array(MASK)] == 0).all()


def test_gradient_of_the_mean():
    assert mx.grad(lambda x: masked_mean(x, MASK))(X).tolist() == [[0.25, 0.25, 0], [0.25, 0, 0.25]]


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([0.0, 50.0, -1000.0]))
def test_against_float64(rows, columns, seed, offset):
    rng = np.random.default_rng(seed)
    x = rng.normal(offset, 2.0, (rows, columns)).astype(np.float32)
    mask = rng.random((rows, columns)) < 0.6
    counted = x[mask].astype(np.float64)
    dirty = np.where(mask, x, rng.choice([NAN, INF, -INF, 3e38], x.shape)).astype(np.float32)
    arguments = mx.array(dirty), mx.array(mask)
    assert masked_sum(*arguments).item() == pytest.approx(counted.sum(), rel=1e-5, abs=1e-4)
    if len(counted) < 2:
        return
    assert masked_variance(*arguments).item() == pytest.approx(counted.var(ddof=1), rel=1e-3, abs=1e-6)
    scale = np.sqrt(counted.var(ddof=1) + 1e-8)
    expected = np.zeros(x.shape)
    expected[mask] = (counted - counted.mean()) / scale
    np.testing.assert_allclose(whiten(*arguments), expected, rtol=1e-2, atol=2e-3)
    expected[mask] += counted.mean()
    np.testing.assert_allclose(rescale(*arguments), expected, rtol=1e-5, atol=2e-3)
