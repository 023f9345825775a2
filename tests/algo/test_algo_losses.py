import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ppo.algo.logprobs import token_logprobs
from mlx_ppo.algo.losses import aggregate, clipped_policy_loss, clipped_value_loss, pairwise_reward_loss

NAN, INF = float("nan"), float("inf")
JUNK = [NAN, INF, -INF, 3e38, -3e38, 0.0]
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def test_policy_loss_by_hand():
    # Columns: ratio 0.5, 1, 1.2, 1.5; rows: A = 2 and A = -2. The band is [0.8, 1.28].
    ratio = mx.array([[0.5, 1.0, 1.2, 1.5]] * 2)
    advantages = mx.array([[2.0] * 4, [-2.0] * 4])
    old = mx.full(ratio.shape, -3.0)
    loss, seen = clipped_policy_loss(old + mx.log(ratio), old, advantages, **CLIP)
    np.testing.assert_allclose(seen, ratio, rtol=1e-6)
    expected = [
        [-1.0, -2.0, -2.4, -2.56],  # max(-2r, -2 clip(r)): only the gain above 1.28 is cut
        [1.6, 2.0, 2.4, 3.0],  # max(2r, 2 clip(r)): only the gain below 0.8 is cut
    ]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_policy_gradient_by_hand():
    # d(-A r)/d logp = -A r where the clip is not active, else 0.
    ratio = mx.array([[0.5, 1.0, 1.2, 1.5]] * 2)
    advantages = mx.array([[2.0] * 4, [-2.0] * 4])
    gradient = mx.grad(lambda x: clipped_policy_loss(x, mx.zeros((2, 4)), advantages, **CLIP)[0].sum())(mx.log(ratio))
    np.testing.assert_allclose(gradient, [[-1, -2, -2.4, 0], [0, 2, 2.4, 3]], rtol=1e-5)


def test_dual_clip_by_hand():
    # A = -2, c = 3: the loss 2r stops at 6, and its gradient with it. A = 2 is left alone.
    ratio, dual = mx.array([[2.0, 5.0]]), {"dual_clip": 3.0} | CLIP
    for advantage, loss, gradient in ((-2.0, [[4, 6]], [[4, 0]]), (2.0, [[-2.56, -2.56]], [[0, 0]])):
        advantages = mx.full((1, 2), advantage)

        def total(x: mx.array, advantages: mx.array = advantages) -> mx.array:
            return clipped_policy_loss(x, mx.zeros((1, 2)), advantages, **dual)[0].sum()

        result, _ = clipped_policy_loss(mx.log(ratio), mx.zeros((1, 2)), advantages, **dual)
        np.testing.assert_allclose(result, loss, rtol=1e-5)
        np.testing.assert_allclose(mx.grad(total)(mx.log(ratio)), gradient, rtol=1e-5)


def test_on_policy_the_gradient_is_minus_the_advantage():
    # Also with bands of no width, where both branches tie.
    advantages = mx.array([[1.5, -0.5, 0.0]])
    for clip in (CLIP, {"clip_low": 0.0, "clip_high": 0.0}):
        old = mx.array([[-1.0, -2.0, -3.0]])

        def total(x: mx.array, old: mx.array = old, clip: dict[str, float] = clip) -> mx.array:
            return clipped_policy_loss(x, old, advantages, **clip)[0].sum()

        assert mx.grad(total)(old).tolist() == [[-1.5, 0.5, 0]]
        assert clipped_policy_loss(old, old, advantages, **clip)[1].tolist() == [[1, 1, 1]]


def test_only_the_new_log_probabilities_carry_gradient():
    # Known mistake: the advantage (or the old log-probability, or a value target) carrying gradient.
    x = mx.array([[0.1, -0.4]])
    by_policy = mx.grad(lambda *a: clipped_policy_loss(*a, dual_clip=3.0, **CLIP)[0].sum(), argnums=(0, 1, 2))
    new, old, advantage = by_policy(x, x * 0.9, x + 1)
    assert mx.abs(new).min().item() > 0
    assert mx.abs(old).max().item() == mx.abs(advantage).max().item() == 0
    by_ratio = mx.grad(lambda a: clipped_policy_loss(a, x, x, **CLIP)[1].sum())
    assert mx.abs(by_ratio(x)).max().item() == 0
    by_value = mx.grad(lambda *a: clipped_value_loss(*a, clip=0.2)[0].sum(), argnums=(0, 1, 2))
    new, old, returns = by_value(x, x * 0.9, x + 1)
    assert mx.abs(new).min().item() > 0
    assert mx.abs(old).max().item() == mx.abs(returns).max().item() == 0


def test_the_log_ratio_is_bounded():
    logprobs = mx.array([[500.0, -500.0]])
    _, ratio = clipped_policy_loss(logprobs, mx.zeros((1, 2)), mx.ones((1, 2)), **CLIP)
    np.testing.assert_allclose(ratio, [[math.exp(20), math.exp(-20)]], rtol=1e-5)


def policy_loss64(logprobs, old, advantages, clip_low, clip_high, dual_clip):
    r = math.exp(min(max(logprobs - old, -20), 20))
    loss = max(-advantages * r, -advantages * min(max(r, 1 - clip_low), 1 + clip_high))
    return min(loss, -dual_clip * advantages) if dual_clip is not None and advantages < 0 else loss


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 1.5, 3.0]), st.floats(0, 0.9), st.floats(0, 2))
def test_policy_loss_against_float64(seed, dual_clip, clip_low, clip_high):
    rng = np.random.default_rng(seed)
    logprobs, old = rng.normal(-2, 1, (2, 3, 4)).astype(np.float32)
    advantages = rng.normal(0, 2, (3, 4)).astype(np.float32)
    loss, _ = clipped_policy_loss(
        *map(mx.array, (logprobs, old, advantages)), clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    expected = np.vectorize(policy_loss64)(logprobs.astype(np.float64), old, advantages, clip_low, clip_high, dual_clip)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)


def test_value_loss_by_hand():
    # V_old = 0, band [-0.5, 0.5], R = 1:
    # V = 0.2 inside: 0.5 * 0.64.  V = 0.9: band error 0.25 beats 0.01.  V = -1: error 4 beats the band's 2.25.
    # V = 2: error 1 beats the band's 0.25.
    values, zeros, returns = mx.array([[0.2, 0.9, -1.0, 2.0]]), mx.zeros((1, 4)), mx.ones((1, 4))
    loss, clipped = clipped_value_loss(values, zeros, returns, clip=0.5)
    np.testing.assert_allclose(loss, [[0.32, 0.125, 2.0, 0.5]], rtol=1e-5)
    assert clipped.tolist() == [[False, True, False, False]]
    gradient = mx.grad(lambda x: clipped_value_loss(x, zeros, returns, clip=0.5)[0].sum())(values)
    np.testing.assert_allclose(gradient, [[-0.8, 0, -2, 1]], rtol=1e-5)
    loss, clipped = clipped_value_loss(values, zeros, returns, clip=None)
    np.testing.assert_allclose(loss, [[0.32, 0.005, 2.0, 0.5]], rtol=1e-5)
    assert not clipped.any().item()


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.floats(0.01, 2))
def test_value_loss_against_float64(seed, clip):
    values, old, returns = np.random.default_rng(seed).normal(0, 1, (3, 2, 5)).astype(np.float32)
    banded = np.clip(values.astype(np.float64), old - clip, old + clip)
    expected = 0.5 * np.maximum((values - returns) ** 2, (banded - returns) ** 2)
    loss, _ = clipped_value_loss(*map(mx.array, (values, old, returns)), clip=clip)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["token-mean", "sequence-mean", "constant"])
@pytest.mark.parametrize("clip", [0.2, None])
def test_junk_in_the_padding_reaches_neither_loss_nor_gradient(mode, clip):
    # Every triple of junk values in a masked slot, beside one counted slot.
    triples = [(a, b, c) for a in JUNK for b in JUNK for c in JUNK]
    first, second, third = (mx.array([[0.3, x[i]] for x in triples]) for i in range(3))
    mask = mx.array([[True, False]] * len(triples))
    clean = mx.full((len(triples), 1), 0.3)
    for function, arguments in (
        (clipped_policy_loss, {"dual_clip": 3.0} | CLIP),
        (clipped_value_loss, {"clip": clip}),
    ):

        def total(x, y, z, mask, function=function, arguments=arguments):
            return aggregate(function(x, y, z, **arguments)[0], mask, mode=mode, denominator=10.0)

        loss, gradient = mx.value_and_grad(total)(first, second, third, mask)
        expected, expected_gradient = mx.value_and_grad(total)(clean, clean, clean, mask[:, :1])
        assert loss.item() == expected.item()
        assert mx.array_equal(gradient[:, :1], expected_gradient).item()
        assert mx.abs(gradient[:, 1]).max().item() == 0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_counted_non_finite_input_is_not_hidden(bad, position):
    arrays = [mx.zeros((1, 2)), mx.zeros((1, 2)), mx.ones((1, 2))]
    arrays[position] = mx.array([[0.0, bad]])
    mask = mx.ones((1, 2), mx.bool_)
    loss, ratio = clipped_policy_loss(*arrays, **CLIP)
    assert math.isnan(aggregate(loss, mask, mode="token-mean").item())
    assert math.isnan(ratio[0, 1].item())
    loss, _ = clipped_value_loss(*arrays, clip=0.2)
    assert math.isnan(aggregate(loss, mask, mode="token-mean").item())


def test_losses_are_float32():
    half = mx.full((1, 2), -1.5, mx.bfloat16)
    for loss in (
        clipped_policy_loss(half, half, half, **CLIP)[0],
        clipped_value_loss(half, half, half, clip=0.2)[0],
        pairwise_reward_loss(half[0], half[0]),
        aggregate(half, mx.ones((1, 2), mx.bool_), mode="sequence-mean"),
    ):
        assert loss.dtype == mx.float32


def test_pairwise_by_hand():
    # Lead 0: log 2. Lead log 3: sigmoid 3/4. Lead -200: the loss is 200, not inf.
    chosen, rejected = mx.array([1.0, math.log(3), -100.0]), mx.array([1.0, 0.0, 100.0])
    expected = [math.log(2), -math.log(3 / 4), 200]
    np.testing.assert_allclose(pairwise_reward_loss(chosen, rejected), expected, rtol=1e-6)
    # A margin of 1 asks for a lead of 1.
    np.testing.assert_allclose(pairwise_reward_loss(chosen + 1, rejected, margin=1.0), expected, rtol=1e-6)
    np.testing.assert_allclose(
        pairwise_reward_loss(chosen + mx.array([0.0, 2.0, 1.0]), rejected, margin=mx.array([0.0, 2.0, 1.0])),
        expected,
        rtol=1e-5,
    )
    # Centering 0.1: (1 + 1)^2 = 4, log(3)^2, 0.
    expected = [math.log(2) + 0.4, -math.log(3 / 4) + 0.1 * math.log(3) ** 2, 200]
    np.testing.assert_allclose(pairwise_reward_loss(chosen, rejected, centering=0.1), expected, rtol=1e-6)


def test_pairwise_gradient():
    # -sigmoid(-lead): finite at both ends.
    gradient = mx.grad(lambda x: pairwise_reward_loss(x, mx.zeros((3,))).sum())(mx.array([-200.0, 0.0, 200.0]))
    np.testing.assert_allclose(gradient, [-1, -0.5, 0], atol=1e-6)


# Counted: 1 2 3 | 10 | none. Token sum 16 over 4 tokens; sequence means 2 and 10 over 2 responses.
LOSS = mx.array([[1.0, 2.0, 3.0], [10.0, NAN, INF], [NAN, NAN, NAN]])
MASK = mx.array([[True, True, True], [True, False, False], [False, False, False]])


def test_aggregate_by_hand():
    assert aggregate(LOSS, MASK, mode="token-mean").item() == 4
    assert aggregate(LOSS, MASK, mode="sequence-mean").item() == 6
    assert aggregate(LOSS, MASK, mode="constant", denominator=32).item() == 0.5
    assert aggregate(LOSS, MASK, mode="token-mean", denominator=8).item() == 2
    assert aggregate(LOSS, MASK, mode="sequence-mean", denominator=mx.array(3.0)).item() == 4


def test_aggregate_of_nothing_is_zero_and_has_no_gradient():
    none = mx.zeros(LOSS.shape, mx.bool_)
    for mode, denominator in (("token-mean", None), ("sequence-mean", None), ("constant", 5.0)):
        value, gradient = mx.value_and_grad(
            lambda x, mode=mode, denominator=denominator: aggregate(x, none, mode=mode, denominator=denominator)
        )(LOSS)
        assert value.item() == 0
        assert mx.abs(gradient).max().item() == 0


def step_gradient(weight, features, tokens, old, advantages, mask, mode, denominator):
    def total(weight):
        logprobs = token_logprobs(features @ weight, tokens, temperature=0.9)
        loss, _ = clipped_policy_loss(logprobs, old, advantages, dual_clip=3.0, **CLIP)
        return aggregate(loss, mask, mode=mode, denominator=denominator)

    return np.array(mx.grad(total)(weight))


@pytest.mark.parametrize("mode", ["token-mean", "sequence-mean", "constant"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_micro_batches_add_up_to_the_step(mode, size):
    # Known mistake: the mean of micro-batch means instead of the step's own denominator. Lengths differ, and one
    # response is empty; only the sum with the step's denominator is the whole batch's gradient.
    rng = np.random.default_rng(7)
    lengths = np.array([9, 1, 4, 0, 7, 2, 9, 3])
    mask = np.arange(9) < lengths[:, None]
    features = mx.array(rng.normal(size=(8, 9, 6)).astype(np.float32))
    weight = mx.array(rng.normal(size=(6, 5)).astype(np.float32))
    tokens = np.where(mask, rng.integers(0, 5, (8, 9)), -100)
    old, advantages = (np.where(mask, x, NAN).astype(np.float32) for x in rng.normal(-1.6, 1, (2, 8, 9)))
    data = features, *map(mx.array, (tokens, old, advantages, mask))
    denominator = {"token-mean": float(mask.sum()), "sequence-mean": 7.0, "constant": 72.0}[mode]
    whole = step_gradient(weight, *data, mode, denominator if mode == "constant" else None)
    parts = [step_gradient(weight, *(x[i : i + size] for x in data), mode, denominator) for i in range(0, 8, size)]
    assert np.isfinite(whole).all()
    assert np.abs(whole).max() > 0.01
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-4, atol=1e-6)


def test_aggregate_refusals():
    for mode in ("token-mean", "sequence-mean", "constant"):
        with pytest.raises(ValueError, match="shapes differ"):
            aggregate(LOSS, MASK[:, :1], mode=mode, denominator=4.0)
    with pytest.raises(ValueError, match="mode must be"):
        aggregate(LOSS, MASK, mode="mean")
    with pytest.raises(ValueError, match="needs a denominator"):
        aggregate(LOSS, MASK, mode="constant")
    for denominator in (0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="denominator must be positive"):
            aggregate(LOSS, MASK, mode="token-mean", denominator=denominator)


def test_loss_refusals():
    good, bad = mx.zeros((2, 3)), mx.zeros((2, 1))
    for position in range(3):
        arrays = [good] * 3
        arrays[position] = bad
        with pytest.raises(ValueError, match="shapes differ"):
            clipped_policy_loss(*arrays, **CLIP)
        with pytest.raises(ValueError, match="shapes differ"):
            clipped_value_loss(*arrays, clip=None)
    with pytest.raises(ValueError, match="shapes differ"):
        pairwise_reward_loss(good[0], bad[0])
    with pytest.raises(ValueError, match="shapes differ"):
        pairwise_reward_loss(good[0], good[0], margin=mx.zeros((2,)))
    for clip_low, clip_high in ((-0.1, 0.2), (0.2, -0.1)):
        with pytest.raises(ValueError, match="must not be negative"):
            clipped_policy_loss(good, good, good, clip_low=clip_low, clip_high=clip_high)
    with pytest.raises(ValueError, match="dual_clip must be over 1"):
        clipped_policy_loss(good, good, good, dual_clip=1.0, **CLIP)
    with pytest.raises(ValueError, match="clip must be positive"):
        clipped_value_loss(good, good, good, clip=0.0)


def test_losses_compile():
    # The training step is compiled: no function may look at a value.
    @mx.compile
    def step(logprobs, old, advantages, mask, denominator):
        loss, ratio = clipped_policy_loss(logprobs, old, advantages, dual_clip=3.0, **CLIP)
        value, _ = clipped_value_loss(logprobs, old, advantages, clip=0.2)
        return aggregate(loss + value, mask, mode="sequence-mean", denominator=denominator), ratio

    arguments = mx.array([[0.1, NAN]]), mx.array([[0.2, INF]]), mx.array([[1.0, NAN]]), mx.array([[True, False]])
    for denominator in (2.0, 4.0):
        # r = e^-0.1; -r + 0.5 * 0.9^2
        expected = (-math.exp(-0.1) + 0.405) / denominator
        assert step(*arguments, mx.array(denominator))[0].item() == pytest.approx(expected, rel=1e-5)
