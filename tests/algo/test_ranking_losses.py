"""Losses on rankings and pairs: against every order by enumeration, finite differences, junk in the padding."""

from collections.abc import Sequence
from itertools import permutations

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.algo.losses import (
    all_pairs_loss,
    direct_preference_loss,
    kahneman_tversky_loss,
    pairwise_reward_loss,
    plackett_luce_loss,
)

LOSSES = [plackett_luce_loss, all_pairs_loss]


def order_probability(scores: np.ndarray, order: Sequence[int]) -> float:
    """Of drawing the responses in this order, each by the softmax over those that are left."""
    found = 1.0
    for place in range(len(order)):
        left = np.exp(scores[list(order[place:])])
        found *= left[0] / left.sum()
    return float(found)


def one_row(scores: np.ndarray, goodness: Sequence[float]) -> tuple[mx.array, mx.array, mx.array]:
    return mx.array(scores[None], mx.float32), mx.array([list(goodness)]), mx.ones((1, len(goodness)), mx.bool_)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_plackett_luce_is_the_likelihood_of_the_order_and_all_orders_sum_to_one(count: int) -> None:
    scores = np.random.default_rng(count).normal(0, 2, count)
    total = 0.0
    for order in permutations(range(count)):
        goodness = np.empty(count)
        goodness[list(order)] = np.arange(count)[::-1]
        loss, choices = plackett_luce_loss(*one_row(scores, goodness))
        assert choices.item() == count - 1
        assert loss.item() == pytest.approx(-np.log(order_probability(scores, order)), abs=1e-4)
        total += float(np.exp(-np.array(loss)[0]))
    assert total == pytest.approx(1, abs=1e-5)


def reference(kind: str, scores: np.ndarray, goodness: np.ndarray) -> float:
    """By loops in float64."""
    total, pairs = 0.0, 0
    for i in range(len(scores)):
        behind = [j for j in range(len(scores)) if goodness[j] < goodness[i]]
        pairs += len(behind)
        if kind == "all_pairs_loss":
            total += sum(np.log1p(np.exp(scores[j] - scores[i])) for j in behind)
        else:
            total += np.log1p(sum(np.exp(scores[j] - scores[i]) for j in behind))
    return total / max(pairs, 1) if kind == "all_pairs_loss" else total


RANKS = [[3.0, 1.0, 2.0, 0.0], [2.0, 2.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0], [5.0, 5.0, 5.0, 5.0], [0.5, -1.0, 0.0, 0.0]]
HOW_MANY = [4, 4, 4, 3, 2]


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_any_length_with_ties_and_junk_in_the_padding(loss) -> None:
    scores = np.random.default_rng(1).normal(0, 3, (5, 4))
    mask = np.arange(4)[None, :] < np.array(HOW_MANY)[:, None]
    clean = [reference(loss.__name__, scores[r, :n], np.array(RANKS[r][:n])) for r, n in enumerate(HOW_MANY)]
    for junk in (0.0, np.nan, np.inf, -1e30):
        dirty, ranks = np.where(mask, scores, junk), np.where(mask, RANKS, junk)

        def total(given: mx.array, ranks: np.ndarray = ranks) -> mx.array:
            return loss(given, mx.array(ranks, mx.float32), mx.array(mask))[0].sum()

        found, counted = loss(mx.array(dirty, mx.float32), mx.array(ranks, mx.float32), mx.array(mask))
        np.testing.assert_allclose(np.array(found), clean, rtol=1e-5, atol=1e-6)
        expected = [1, 1, 1, 0, 1] if loss is all_pairs_loss else [3, 3, 2, 0, 1]
        assert np.array(counted).tolist() == expected
        gradient = np.array(mx.grad(total)(mx.array(dirty, mx.float32)))
        assert np.isfinite(gradient).all()
        assert not gradient[~mask].any(), "what is padding learns nothing"
        assert not gradient[3].any(), "responses that are all equally good teach nothing"


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_finite_differences(loss) -> None:
    generator, step = np.random.default_rng(2), 1e-5
    for ranks in RANKS:
        scores = generator.normal(0, 2, 4)
        given, goodness, mask = one_row(scores, ranks)

        def total(given: mx.array, goodness: mx.array = goodness, mask: mx.array = mask) -> mx.array:
            return loss(given, goodness, mask)[0].sum()

        found = mx.grad(total)(given)
        slopes = [
            (reference(loss.__name__, scores + nudge, np.array(ranks))
             - reference(loss.__name__, scores - nudge, np.array(ranks))) / (2 * step)
            for nudge in step * np.eye(4)
        ]  # fmt: skip
        np.testing.assert_allclose(np.array(found)[0], slopes, atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_two_responses_are_a_pair_and_far_scores_overflow_nothing(loss) -> None:
    for chosen, rejected in ((1.5, -0.25), (-400.0, 400.0), (3e4, -3e4)):
        alone = pairwise_reward_loss(mx.array([chosen]), mx.array([rejected]))
        for row, ranks in (([chosen, rejected], [2, 1]), ([rejected, chosen], [1, 2])):
            found, _ = loss(*one_row(np.array(row), ranks))
            assert found.item() == pytest.approx(alone.item(), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_must_agree(loss) -> None:
    with pytest.raises(ValueError, match="shape"):
        loss(mx.zeros((2, 3)), mx.zeros((2, 2)), mx.ones((2, 3), mx.bool_))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_direct_preference_loss_by_its_formula_and_its_gradient(kind, smoothing) -> None:
    rng = np.random.default_rng(5)
    chosen, rejected = rng.normal(0, 3, 6), rng.normal(0, 3, 6)
    beta = 0.3

    def expected(lead: np.ndarray) -> np.ndarray:
        if kind == "ipo":
            return (lead - 1 / (2 * beta)) ** 2
        sigma = 1 / (1 + np.exp(-beta * lead))
        return -(1 - smoothing) * np.log(sigma) - smoothing * np.log(1 - sigma)

    def loss(first: mx.array, second: mx.array) -> mx.array:
        return direct_preference_loss(first, second, beta=beta, kind=kind, label_smoothing=smoothing)

    given = mx.array(chosen, mx.float32), mx.array(rejected, mx.float32)
    np.testing.assert_allclose(np.array(loss(*given)), expected(chosen - rejected), rtol=1e-4)
    by_chosen, by_rejected = mx.grad(lambda *each: loss(*each).sum(), (0, 1))(*given)
    slope = (expected(chosen - rejected + 1e-5) - expected(chosen - rejected - 1e-5)) / 2e-5
    np.testing.assert_allclose(np.array(by_chosen), slope, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.array(by_rejected), -slope, rtol=1e-3, atol=1e-5)
    far = mx.array([1e4, -1e4])
    assert np.isfinite(np.array(loss(far, -far))).all()


def test_direct_preference_loss_refuses_what_is_out_of_range() -> None:
    pair = mx.zeros((2,)), mx.zeros((2,))
    for given in ({"beta": 0.0}, {"beta": 0.1, "label_smoothing": 0.5}, {"beta": 0.1, "kind": "hinge"}):
        with pytest.raises(ValueError):
            direct_preference_loss(*pair, **given)
    with pytest.raises(ValueError):
        direct_preference_loss(mx.zeros((2,)), mx.zeros((3,)), beta=0.1)


def test_kahneman_tversky_loss_by_its_formula_and_its_gradient() -> None:
    gained, good = np.array([2.0, -1.0, 0.5, 1e4, -1e4, 1e4]), np.array([True, True, False, True, True, False])
    beta, moved, weight = 0.3, 0.7, 1.5

    def expected(values: np.ndarray) -> np.ndarray:
        value = 1 / (1 + np.exp(np.clip(-beta * np.where(good, values - moved, moved - values), -700, 700)))
        return np.where(good, 1.0, weight) * (1 - value)

    def loss(values: mx.array) -> mx.array:
        return kahneman_tversky_loss(values, mx.array(good), moved, beta=beta, bad_weight=weight)

    given = mx.array(gained, mx.float32)
    np.testing.assert_allclose(np.array(loss(given)), expected(gained), rtol=1e-4, atol=1e-6)
    slope = (expected(gained + 1e-5) - expected(gained - 1e-5)) / 2e-5
    np.testing.assert_allclose(np.array(mx.grad(lambda values: loss(values).sum())(given)), slope, rtol=1e-3, atol=1e-5)


def test_kahneman_tversky_loss_refuses_what_is_out_of_range() -> None:
    pair = mx.zeros((2,)), mx.array([True, False])
    for moved, given in ((0.0, {"beta": 0.0}), (-0.1, {"beta": 0.1}), (0.0, {"beta": 0.1, "bad_weight": 0.0})):
        with pytest.raises(ValueError):
            kahneman_tversky_loss(*pair, moved, **given)
    with pytest.raises(ValueError):
        kahneman_tversky_loss(mx.zeros((3,)), pair[1], 0.0, beta=0.1)
