import math
from itertools import combinations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ppo.algo.best_of import best_of_kl, expected_best_of


def test_row_by_hand():
    # Of 1, 2, 4 the pairs are (1, 2), (1, 4), (2, 4): their best 2, 4, 4. The order of the samples doesn't matter.
    scores = mx.array([[4.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(expected_best_of(scores, 1), [7 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(expected_best_of(scores, 2), [10 / 3, 0], rtol=1e-6)
    assert expected_best_of(scores, 3).tolist() == [4, 0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9), st.data())
def test_mean_over_all_subsets(row, data):
    k = data.draw(st.integers(1, len(row)))
    expected = np.mean([max(chosen) for chosen in combinations(row, k)])
    assert expected_best_of(mx.array([row]), k).item() == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_unbiased_for_draws_of_a_known_distribution():
    # The best of k uniform numbers is k / (k + 1) on average.
    scores = np.random.default_rng(0).random((4000, 12))
    for k in (1, 3, 8, 12):
        found = np.array(expected_best_of(scores, k))
        assert found.mean() == pytest.approx(k / (k + 1), abs=float(5 * found.std() / math.sqrt(4000)))


@pytest.mark.parametrize("k", [2, 2048, 4095])
def test_many_samples_by_exact_integers(k):
    scores = np.sort(np.random.default_rng(1).normal(size=4096))
    weights = [math.comb(i - 1, k - 1) / math.comb(4096, k) for i in range(1, 4097)]
    expected = math.fsum(weight * score for weight, score in zip(weights, scores.tolist(), strict=True))
    assert expected_best_of(scores[None], k).item() == pytest.approx(expected, rel=1e-5)


def test_a_score_without_weight_adds_nothing():
    assert expected_best_of(mx.array([[-math.inf, 1.0, 3.0]]), 3).tolist() == [3]
    assert expected_best_of(mx.array([[-math.inf, 1.0, 3.0]]), 2).tolist() == [pytest.approx(7 / 3)]
    assert expected_best_of(mx.array([[-math.inf, 1.0, 3.0]]), 1).tolist() == [-math.inf]


def test_computed_in_float32():
    assert expected_best_of(mx.array([[1.0, 2.0]], mx.bfloat16), 1).dtype == mx.float32
    assert expected_best_of(np.array([[1, 2]]), 2).tolist() == [2]


def test_refusals():
    for scores, k in ((mx.zeros((3,)), 1), (mx.zeros((2, 3)), 0), (mx.zeros((2, 3)), 4)):
        with pytest.raises(ValueError, match="N >= k >= 1"):
            expected_best_of(scores, k)
    with pytest.raises(ValueError, match="1 or more"):
        best_of_kl(0)


def test_divergence_is_a_bound_and_nearly_reached():
    """Brute force: m equally likely responses of different scores; the best of k is the i-th with known probability."""
    assert best_of_kl(1) == 0 and best_of_kl(4) == pytest.approx(math.log(4) - 0.75)
    for k in (2, 4, 16):
        for count, slack in ((2, None), (50, None), (20_000, 1e-3)):
            edges = (np.arange(count + 1) / count) ** k
            chosen = np.diff(edges)
            divergence = float((chosen * np.log(np.maximum(chosen, 1e-300) * count)).sum())
            assert divergence < best_of_kl(k)
            assert slack is None or divergence == pytest.approx(best_of_kl(k), abs=slack)
