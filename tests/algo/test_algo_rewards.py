import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ppo.algo.rewards import clip_scores, penalise_truncated, soft_overlong_penalty, token_rewards

NAN, INF = float("nan"), float("inf")


def test_rows_by_hand():
    # Finished after two tokens, its second being EOS; truncated at all four; a hole in the middle; nothing counted.
    mask = mx.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], mx.bool_)
    logprobs = mx.array([[-1.0, -2.0, NAN, INF], [-1.0] * 4, [-1.0, NAN, -1.0, 9.0], [NAN] * 4])
    reference = mx.array([[-2.0, -1.0, INF, NAN], [-1.5] * 4, [-4.0, NAN, -1.0, -INF], [INF] * 4])
    scores = mx.array([5.0, 7.0, -3.0, 100.0])
    rewards = token_rewards(scores, logprobs, reference, mask, kl_coef=0.1)
    expected = [
        [-0.1, 0.1 + 5, 0, 0],  # k1 = 1, -1; the score sits on EOS, not one past it
        [-0.05, -0.05, -0.05, -0.05 + 7],  # k1 = 0.5; a truncated response is treated the same
        [-0.3, 0, -3, 0],  # k1 = 3, 0
        [0, 0, 0, 0],
    ]
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)


def test_the_score_is_on_the_last_token_whether_finished_or_truncated():
    # Known mistake: the score placed one past EOS, so that finished and truncated responses are treated differently
    # (and the score of a truncated one falls off the end).
    n_slots = 6
    for length in range(1, n_slots + 1):
        mask = mx.arange(n_slots)[None] < length
        zeros = mx.zeros((1, n_slots))
        rewards = token_rewards(mx.array([2.0]), zeros, zeros, mask, kl_coef=0.1)
        assert rewards[0].tolist() == [2.0 if t == length - 1 else 0.0 for t in range(n_slots)]


def test_the_log_ratio_is_not_clamped():
    mask = mx.array([[True]])
    reward = token_rewards(mx.array([0.0]), mx.array([[-1.0]]), mx.array([[-501.0]]), mask, kl_coef=1.0)
    assert reward.item() == -500


def test_rewards_in_float32():
    half = mx.full((1, 2), -100.5, mx.bfloat16)
    rewards = token_rewards(mx.array([1.0], mx.float16), half, half - 1, mx.ones((1, 2), mx.bool_), kl_coef=0.001)
    assert rewards.dtype == mx.float32


def test_a_counted_nan_is_not_hidden():
    mask, zeros = mx.array([[True, True]]), mx.zeros((1, 2))
    assert np.isnan(token_rewards(mx.array([NAN]), zeros, zeros, mask, kl_coef=0.1)[0, 1].item())
    assert np.isnan(token_rewards(mx.array([1.0]), mx.array([[NAN, 0]]), zeros, mask, kl_coef=0.1)[0, 0].item())


def test_token_rewards_refusals():
    zeros, mask = mx.zeros((2, 3)), mx.ones((2, 3), mx.bool_)
    with pytest.raises(ValueError, match="shapes differ"):
        token_rewards(mx.zeros((2,)), zeros, mx.zeros((2, 1)), mask, kl_coef=0.1)
    with pytest.raises(ValueError, match="shapes differ"):
        token_rewards(mx.zeros((1,)), zeros, zeros, mask, kl_coef=0.1)


def test_no_gradient_from_masked_slots():
    mask = mx.array([[True, False]])

    def total(x: mx.array) -> mx.array:
        return token_rewards(mx.array([1.0]), x, mx.array([[0.0, NAN]]), mask, kl_coef=0.5).sum()

    assert mx.grad(total)(mx.array([[1.0, INF]])).tolist() == [[-0.5, 0]]


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**6))
def test_the_rewards_add_up(rows, slots, seed):
    # Sum of a response's rewards = its score minus kl_coef times its summed log-ratio, whatever its mask.
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, slots)) < 0.6
    logprobs, reference = rng.normal(-2, 1, (2, rows, slots))
    scores = rng.normal(0, 3, rows)
    junk = rng.choice([NAN, INF, -INF, 1e38], (rows, slots))
    rewards = np.array(
        token_rewards(
            mx.array(scores),
            mx.array(np.where(mask, logprobs, junk)),
            mx.array(np.where(mask, reference, -junk)),
            mx.array(mask),
            kl_coef=0.2,
        )
    )
    for b in range(rows):
        expected = mask[b].any() * scores[b] - 0.2 * (logprobs - reference)[b][mask[b]].sum()
        assert rewards[b].sum() == pytest.approx(expected, abs=1e-4)
    assert (rewards[~mask] == 0).all()


def test_penalise_truncated():
    scores, finished = mx.array([1.0, 2.0, NAN]), mx.array([True, False, False])
    np.testing.assert_equal(np.array(penalise_truncated(scores, finished, mode="none", value=9.0)), [1, 2, NAN])
    # A replaced score no longer matters, even where it was NaN.
    assert penalise_truncated(scores, finished, mode="replace", value=-1.0).tolist() == [1, -1, -1]
    np.testing.assert_equal(np.array(penalise_truncated(scores, finished, mode="subtract", value=0.5)), [1, 1.5, NAN])
    with pytest.raises(ValueError, match="mode must be"):
        penalise_truncated(scores, finished, mode="add", value=1.0)
    with pytest.raises(ValueError, match="shapes differ"):
        penalise_truncated(scores, mx.array([True]), mode="none", value=1.0)


def test_soft_overlong_penalty():
    # Limit 100, buffer 20: free up to 80, then -1/20 a token, full at 100 and never more.
    lengths = mx.array([0, 80, 81, 90, 99, 100, 101, 500])
    expected = [0, 0, -1 / 20, -10 / 20, -19 / 20, -1, -1, -1]
    np.testing.assert_allclose(soft_overlong_penalty(lengths, max_length=100, buffer=20), expected, rtol=1e-6)
    for buffer in (0, -1, 101):
        with pytest.raises(ValueError, match="buffer must be in"):
            soft_overlong_penalty(lengths, max_length=100, buffer=buffer)


def test_clip_scores():
    scores = mx.array([-7.0, -2.0, 0.0, 3.0, 1e30])
    assert clip_scores(scores, 2.5).tolist() == [-2.5, -2, 0, 2.5, 2.5]
    assert clip_scores(scores.astype(mx.bfloat16), 2.5).dtype == mx.float32
    # A broken score must reach the check that stops the run.
    np.testing.assert_equal(np.array(clip_scores(mx.array([NAN, INF, -INF]), 1.0)), [NAN, INF, -INF])
    for bound in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="bound must be positive"):
            clip_scores(scores, bound)
