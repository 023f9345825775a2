import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ppo.algo.advantages import gae, group_advantages, length_adaptive_lambda

NAN, INF = float("nan"), float("inf")
JUNK = np.array([NAN, INF, -INF, 3e38, -3e38])


def gae64(rewards, values, mask, discount, lambdas, bootstrap):
    """The sum of equation 16 written out, sum_l (discount * lambda)^l delta_{t+l}, over the counted tokens only."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b in range(len(mask)):
        slots = np.flatnonzero(mask[b])
        v = np.append(values[b, slots].astype(np.float64), bootstrap[b])
        delta = rewards[b, slots] + discount * v[1:] - v[:-1]
        for i, t in enumerate(slots):
            powers = (discount * lambdas[b]) ** np.arange(len(slots) - i)
            advantages[b, t] = (powers * delta[i:]).sum()
            returns[b, t] = advantages[b, t] + v[i]
    return advantages, returns


def test_row_by_hand():
    # discount 0.9, lambda 0.5, so 0.45 a step.
    # delta_2 = 1 + 0 - 0.6 = 0.4;  delta_1 = 0 + 0.54 - 0.4 = 0.14;  delta_0 = -0.1 + 0.36 - 0.2 = 0.06
    # A_2 = 0.4;  A_1 = 0.14 + 0.45 * 0.4 = 0.32;  A_0 = 0.06 + 0.45 * 0.32 = 0.204;  returns = A + V
    rewards = mx.array([[-0.1, 0.0, 1.0, NAN]])
    values = mx.array([[0.2, 0.4, 0.6, INF]])
    mask = mx.array([[True, True, True, False]])
    advantages, returns = gae(rewards, values, mask, discount=0.9, gae_lambda=0.5)
    np.testing.assert_allclose(advantages, [[0.204, 0.32, 0.4, 0]], rtol=1e-5)
    np.testing.assert_allclose(returns, [[0.404, 0.72, 1.0, 0]], rtol=1e-5)
    # Bootstrap 2: delta_2 = 1 + 0.9 * 2 - 0.6 = 2.2, A_1 = 0.14 + 0.45 * 2.2 = 1.13, A_0 = 0.06 + 0.45 * 1.13 = 0.5685
    advantages, returns = gae(rewards, values, mask, discount=0.9, gae_lambda=0.5, bootstrap=mx.array([2.0]))
    np.testing.assert_allclose(advantages, [[0.5685, 1.13, 2.2, 0]], rtol=1e-5)
    np.testing.assert_allclose(returns, [[0.7685, 1.53, 2.8, 0]], rtol=1e-5)


def test_holes_are_skipped_as_if_absent():
    rewards, values = mx.array([[-0.1, 0.0, 1.0]]), mx.array([[0.2, 0.4, 0.6]])
    plain = gae(rewards, values, mx.ones((1, 3), mx.bool_), discount=0.9, gae_lambda=0.5, bootstrap=mx.array([2.0]))
    holed = gae(
        mx.array([[NAN, -0.1, INF, NAN, 0.0, 1.0, -INF]]),
        mx.array([[INF, 0.2, NAN, 3e38, 0.4, 0.6, NAN]]),
        mx.array([[False, True, False, False, True, True, False]]),
        discount=0.9,
        gae_lambda=0.5,
        bootstrap=mx.array([2.0]),
    )
    for a, b in zip(plain, holed, strict=True):
        np.testing.assert_allclose(b[0, mx.array([1, 4, 5])], a[0], rtol=1e-6)
        assert b[0, mx.array([0, 2, 3, 6])].tolist() == [0, 0, 0, 0]


def test_lambda_one_returns_are_the_discounted_rewards():
    # Whatever the values say: the critic's targets do not depend on the critic.
    rewards = mx.array([[1.0, 2.0, 4.0]])
    mask = mx.ones((1, 3), mx.bool_)
    for values in (mx.zeros((1, 3)), mx.array([[5.0, -3.0, 8.0]])):
        _, returns = gae(rewards, values, mask, discount=0.5, gae_lambda=1.0)
        np.testing.assert_allclose(returns, [[1 + 1 + 1, 2 + 2, 4]], rtol=1e-6)


def test_lambda_zero_is_one_step():
    advantages, _ = gae(
        mx.array([[0.0, 1.0]]), mx.array([[0.3, 0.5]]), mx.ones((1, 2), mx.bool_), discount=1.0, gae_lambda=0.0
    )
    np.testing.assert_allclose(advantages, [[0.2, 0.5]], rtol=1e-6)


def test_a_lambda_for_each_response():
    rewards, values = mx.array(np.random.default_rng(2).normal(size=(2, 3, 5)).astype(np.float32))
    mask = mx.ones((3, 5), mx.bool_)
    lambdas = [0.0, 0.7, 1.0]
    together, _ = gae(rewards, values, mask, discount=0.9, gae_lambda=mx.array(lambdas))
    for b, gae_lambda in enumerate(lambdas):
        row = slice(b, b + 1)
        alone, _ = gae(rewards[row], values[row], mask[row], discount=0.9, gae_lambda=gae_lambda)
        np.testing.assert_allclose(together[row], alone, rtol=1e-6)


@settings(deadline=None, max_examples=80, derandomize=True, database=None)
@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 10**6), st.sampled_from([0.3, 0.7, 1.0]), st.booleans())
def test_gae_against_the_sum_in_float64(rows, slots, seed, density, with_bootstrap):
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, slots)) < density
    rewards, values = rng.normal(0, 1, (2, rows, slots)).astype(np.float32)
    lambdas = rng.choice([0.0, 0.5, 0.95, 1.0], rows)
    discount = float(rng.choice([0.9, 1.0]))
    bootstrap = rng.normal(0, 1, rows) * with_bootstrap
    result = gae(
        mx.array(np.where(mask, rewards, rng.choice(JUNK, mask.shape))),
        mx.array(np.where(mask, values, rng.choice(JUNK, mask.shape))),
        mx.array(mask),
        discount=discount,
        gae_lambda=mx.array(lambdas),
        bootstrap=mx.array(bootstrap) if with_bootstrap else None,
    )
    for array, expected in zip(result, gae64(rewards, values, mask, discount, lambdas, bootstrap), strict=True):
        assert array.dtype == mx.float32
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5)
        assert (np.array(array)[~mask] == 0).all()


@pytest.mark.parametrize("slots", [511, 512, 513])
def test_long_responses(slots):
    rng = np.random.default_rng(5)
    rewards, values = rng.normal(0, 1, (2, 2, slots)).astype(np.float32)
    mask = np.arange(slots) < np.array([[slots], [slots - 3]])
    lambdas = np.array([0.95, 1.0])
    result = gae(mx.array(rewards), mx.array(values), mx.array(mask), discount=1.0, gae_lambda=mx.array(lambdas))
    for array, expected in zip(result, gae64(rewards, values, mask, 1.0, lambdas, np.zeros(2)), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-4)


def test_padding_changes_no_bit():
    rng = np.random.default_rng(6)
    rewards, values = (mx.array(x.astype(np.float32)) for x in rng.normal(0, 1, (2, 3, 9)))
    mask = mx.arange(9) < mx.array([[9], [4], [1]])
    plain = gae(rewards, values, mask, discount=0.99, gae_lambda=0.95)
    tail = mx.full((3, 8), NAN)
    padded = gae(
        mx.concatenate([rewards, tail], axis=1),
        mx.concatenate([values, tail], axis=1),
        mx.concatenate([mask, mx.zeros((3, 8), mx.bool_)], axis=1),
        discount=0.99,
        gae_lambda=0.95,
    )
    for a, b in zip(plain, padded, strict=True):
        assert mx.array_equal(a, b[:, :9]).item()


def test_gae_of_half_precision_is_float32():
    rewards, values = mx.full((1, 400), 0.01, mx.bfloat16), mx.zeros((1, 400), mx.bfloat16)
    _, returns = gae(rewards, values, mx.ones((1, 400), mx.bool_), discount=1.0, gae_lambda=1.0)
    assert returns.dtype == mx.float32
    np.testing.assert_allclose(returns[0, 0].item(), 400 * rewards[0, 0].item(), rtol=1e-5)


def test_no_gradient_from_masked_slots():
    mask = mx.array([[True, False, True, False]])

    def total(rewards: mx.array, values: mx.array) -> mx.array:
        advantages, returns = gae(rewards, values, mask, discount=0.9, gae_lambda=0.8)
        return (advantages + returns).sum()

    junk = mx.array([[0.1, NAN, 0.3, INF]])
    for gradient in mx.grad(total, argnums=(0, 1))(junk, junk):
        assert np.isfinite(np.array(gradient)).all()
        assert gradient[0, 1].item() == gradient[0, 3].item() == 0


def test_gae_refusals():
    good, mask = mx.zeros((2, 3)), mx.ones((2, 3), mx.bool_)
    for rewards, values, lambdas, bootstrap in (
        (mx.zeros((2, 1)), good, 0.9, None),
        (good, mx.zeros((3,)), 0.9, None),
        (good, good, mx.zeros((3,)), None),
        (good, good, mx.zeros((2, 3)), None),
        (good, good, 0.9, mx.zeros((2, 1))),
        (good, good, 0.9, mx.zeros((1,))),
    ):
        with pytest.raises(ValueError, match="shapes"):
            gae(rewards, values, mask, discount=1.0, gae_lambda=lambdas, bootstrap=bootstrap)


def test_length_adaptive_lambda():
    # alpha 0.05: length 100 -> 1 - 1/5; 40 -> 1 - 1/2; 20 and shorter -> 0; empty -> 0.
    result = length_adaptive_lambda(mx.array([100, 40, 20, 10, 0]), alpha=0.05)
    np.testing.assert_allclose(result, [0.8, 0.5, 0, 0, 0], atol=1e-6)
    for alpha in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="alpha must be positive"):
            length_adaptive_lambda(mx.array([1]), alpha=alpha)


# Group 7: scores 1, 2, 6, mean 3, deviations -2 -1 3, unbiased variance 14/2 = 7. Group 2: scores 10, 20, mean 15,
# variance 50. Group 9: alone.
SCORES = mx.array([1.0, 10.0, 2.0, 99.0, 20.0, 6.0])
GROUP = mx.array([7, 2, 7, 9, 2, 7], mx.int32)


def test_groups_by_hand():
    assert group_advantages(SCORES, GROUP, kind="dr_grpo").tolist() == [-2, -5, -1, 0, 5, 3]
    # Minus the mean of the others: 1 - 4, 10 - 20, 2 - 3.5, alone, 20 - 10, 6 - 1.5.
    assert group_advantages(SCORES, GROUP, kind="rloo").tolist() == [-3, -10, -1.5, 0, 10, 4.5]
    first, second = 7**0.5 + 1e-4, 50**0.5 + 1e-4
    expected = [-2 / first, -5 / second, -1 / first, 0, 5 / second, 3 / first]
    np.testing.assert_allclose(group_advantages(SCORES, GROUP, kind="grpo"), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_group_never_sees_another(kind):
    # Known mistake: the group mean taken over the whole batch.
    before = np.array(group_advantages(SCORES, GROUP, kind=kind))
    changed = mx.array([1.0, 10.0, 2.0, NAN, -2000.0, 6.0])
    after = np.array(group_advantages(changed, GROUP, kind=kind))
    same = np.array(GROUP) == 7
    assert (before[same] == after[same]).all()


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("value", [0.1, -1.7, 33333.3])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_equal_scores_give_exactly_zero(kind, value, size):
    scores = mx.concatenate([mx.full((size,), value), mx.array([5.0, 6.0])])
    group = mx.array([4] * size + [5, 5])
    assert group_advantages(scores, group, kind=kind)[:size].tolist() == [0.0] * size


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=16), st.integers(0, 10**6))
def test_groups_against_float64(groups, seed):
    scores = np.random.default_rng(seed).normal(3, 2, len(groups)).astype(np.float32)
    group = np.array(groups)
    expected = {"grpo": [], "dr_grpo": [], "rloo": []}
    for i, g in enumerate(group):
        members = scores[group == g].astype(np.float64)
        others = scores[(group == g) & (np.arange(len(group)) != i)].astype(np.float64)
        centred = scores[i] - members.mean()
        expected["dr_grpo"].append(centred if len(others) else 0)
        expected["grpo"].append(centred / (members.std(ddof=1) + 1e-4) if len(others) else 0)
        expected["rloo"].append(scores[i] - others.mean() if len(others) else 0)
    for kind, values in expected.items():
        result = group_advantages(mx.array(scores), mx.array(group, mx.int32), kind=kind)
        np.testing.assert_allclose(result, values, rtol=1e-3, atol=1e-4)


def test_group_refusals():
    with pytest.raises(ValueError, match="shapes differ"):
        group_advantages(SCORES, GROUP[:2], kind="rloo")
    with pytest.raises(ValueError, match=r"must be \[B\]"):
        group_advantages(SCORES[None], GROUP[None], kind="rloo")
    with pytest.raises(ValueError, match="kind must be"):
        group_advantages(SCORES, GROUP, kind="mean")
