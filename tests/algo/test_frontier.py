"""The tilted optimum against enumeration, and against what no policy can do better."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.algo.frontier import mixture_log_weights, tilted


def _world(seed: int, vocabulary: int = 4, length: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All responses of a small vocabulary: their reference probabilities, a policy's, and scores."""
    draws = np.random.default_rng(seed)
    count = len(list(itertools.product(range(vocabulary), repeat=length)))
    reference, policy = draws.dirichlet(np.full(count, 0.5), size=2)
    return reference, policy, draws.normal(0, 0.6, count)


def _exact(reference: np.ndarray, scores: np.ndarray, coef: float) -> tuple[float, float, float]:
    """Value, score and KL of the optimum, by enumeration."""
    weights = reference * np.exp(scores / coef)
    best = weights / weights.sum()
    score = float((best * scores).sum())
    kl = float((best * np.log(np.maximum(best, 1e-300) / np.maximum(reference, 1e-300))).sum())
    return score - coef * kl, score, kl


@pytest.mark.parametrize("coef", [0.05, 0.1, 0.5, 2.0])
def test_samples_of_the_reference_find_the_exact_optimum(coef: float) -> None:
    reference, _, scores = _world(0)
    drawn = np.random.default_rng(1).choice(len(scores), size=(4, 100_000), p=reference)
    found = tilted(mx.array(scores[drawn]), mx.zeros(drawn.shape), coef=coef)
    value, score, kl = _exact(reference, scores, coef)
    assert np.allclose(np.array(found.value), value, atol=0.02)
    assert np.allclose(np.array(found.score), score, atol=0.02)
    assert np.allclose(np.array(found.kl), kl, atol=0.1)


def test_samples_of_a_mixture_find_it_too() -> None:
    reference, policy, scores = _world(2)
    draws = np.random.default_rng(3)
    drawn = np.concatenate([draws.choice(len(scores), size=(2, 100_000), p=p) for p in (reference, policy)], axis=1)
    logs = np.log(np.maximum(np.stack([reference, policy]), 1e-30))
    weights = mixture_log_weights(mx.array(logs[0][drawn]), mx.array(logs[1][drawn]), ref_share=0.5)
    assert weights.max().item() <= np.log(2) + 1e-5
    found = tilted(mx.array(scores[drawn]), weights, coef=0.1)
    assert np.allclose(np.array(found.value), _exact(reference, scores, 0.1)[0], atol=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_no_policy_is_better_than_the_optimum(seed: int) -> None:
    reference, policy, scores = _world(seed)
    value, _, _ = _exact(reference, scores, 0.2)
    kl = (policy * np.log(np.maximum(policy, 1e-300) / reference)).sum()
    assert (policy * scores).sum() - 0.2 * kl <= value + 1e-9


def test_few_samples_bound_it_from_below() -> None:
    reference, _, scores = _world(4)
    drawn = np.random.default_rng(5).choice(len(scores), size=(4000, 8), p=reference)
    found = tilted(mx.array(scores[drawn]), mx.zeros(drawn.shape), coef=0.05)
    assert found.value.mean().item() < _exact(reference, scores, 0.05)[0]
    assert (found.effective >= 1 - 1e-5).all().item() and (found.effective <= 8 + 1e-4).all().item()


def test_what_can_be_known_at_once() -> None:
    equal = tilted(mx.full((2, 5), 3.0), mx.zeros((2, 5)), coef=0.1)
    assert np.allclose(np.array(equal.value), 3.0, atol=1e-5) and np.allclose(np.array(equal.kl), 0.0, atol=1e-5)
    assert np.allclose(np.array(equal.effective), 5.0, atol=1e-4)
    far = tilted(mx.array([[0.0, 1e4]]), mx.zeros((1, 2)), coef=0.01)  # no overflow
    assert np.allclose(np.array(far.score), 1e4) and np.isfinite(np.array(far.value)).all()
    with pytest.raises(ValueError, match="coef must be positive"):
        tilted(mx.zeros((1, 2)), mx.zeros((1, 2)), coef=0.0)
    with pytest.raises(ValueError, match="must both be"):
        tilted(mx.zeros((1, 2)), mx.zeros((2, 1)), coef=1.0)
    with pytest.raises(ValueError, match="ref_share"):
        mixture_log_weights(mx.zeros((1, 2)), mx.zeros((1, 2)), ref_share=0.0)
    assert (mixture_log_weights(mx.zeros((1, 2)), mx.ones((1, 2)), ref_share=1.0) == 0).all().item()
