import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.algo.logprobs import entropy, token_logprobs

NAN, INF = float("nan"), float("inf")


def log_softmax64(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_row_by_hand():
    # Weights 1, 3, 4 out of 8: log(1/8), log(3/8), log(4/8).
    logits = mx.log(mx.array([[[1.0, 3.0, 4.0]] * 3]))
    expected = [[math.log(1 / 8), math.log(3 / 8), math.log(4 / 8)]]
    np.testing.assert_allclose(token_logprobs(logits, mx.array([[0, 1, 2]]), temperature=1.0), expected, rtol=1e-6)
    # Temperature 1/2 squares the weights: 1, 9, 16 out of 26.
    expected = [[math.log(1 / 26), math.log(9 / 26), math.log(16 / 26)]]
    np.testing.assert_allclose(token_logprobs(logits, mx.array([[0, 1, 2]]), temperature=0.5), expected, rtol=1e-6)


def test_temperature_gives_the_distribution_that_was_sampled():
    # Known mistake: old log-probabilities taken before temperature was applied. Frequencies tell which it is.
    logits = mx.array([0.0, 1.0, 2.5])
    draws = mx.random.categorical(logits / 0.7, num_samples=40_000, key=mx.random.key(0))
    seen = np.bincount(np.array(draws), minlength=3) / 40_000
    stated = mx.exp(token_logprobs(mx.stack([logits] * 3)[None], mx.array([[0, 1, 2]]), temperature=0.7))
    np.testing.assert_allclose(stated[0], seen, atol=0.01)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_against_float64(temperature, offset):
    rng = np.random.default_rng(1)
    logits = (rng.normal(0, 4, (3, 5, 11)) + offset).astype(np.float32)
    tokens = rng.integers(0, 11, (3, 5))
    reference = log_softmax64(logits.astype(np.float64) / temperature)
    expected = np.take_along_axis(reference, tokens[..., None], -1)[..., 0]
    result = token_logprobs(mx.array(logits), mx.array(tokens), temperature=temperature)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    expected = -(np.exp(reference) * reference).sum(-1)
    np.testing.assert_allclose(entropy(mx.array(logits), temperature=temperature), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_logits_are_normalised_in_float32():
    logits = mx.random.normal((2, 3, 5000), key=mx.random.key(3)).astype(mx.bfloat16)
    tokens = mx.array([[0, 1, 2], [3, 4, 4999]])
    result = token_logprobs(logits, tokens, temperature=1.0)
    assert result.dtype == mx.float32
    reference = log_softmax64(np.array(logits.astype(mx.float32)))
    expected = np.take_along_axis(reference, np.array(tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    np.testing.assert_allclose(entropy(logits, temperature=1.0), -(np.exp(reference) * reference).sum(-1), rtol=1e-5)


def test_entropy_by_hand():
    # Four equal entries: log 4. One left of two: 0.
    assert entropy(mx.zeros((1, 1, 4)), temperature=1.0).item() == pytest.approx(math.log(4))
    assert entropy(mx.array([[[2.0, -INF]]]), temperature=1.0).item() == 0


def test_excluded_entries_have_finite_gradients():
    logits = mx.array([[[0.5, -INF, 1.0]]])
    for function in (
        lambda x: entropy(x, temperature=0.8).sum(),
        lambda x: token_logprobs(x, mx.array([[2]]), temperature=0.8).sum(),
    ):
        gradient = np.array(mx.grad(function)(logits))
        assert np.isfinite(gradient).all()
        assert gradient[0, 0, 1] == 0


@pytest.mark.parametrize("token", [-1, -100, 7, 2**31 - 1])
def test_tokens_outside_the_vocabulary_are_nan_and_never_an_index(token):
    logits = mx.random.normal((1, 2, 7), key=mx.random.key(0))
    result = token_logprobs(logits, mx.array([[3, token]]), temperature=1.0)
    assert np.isfinite(result[0, 0].item())
    assert np.isnan(result[0, 1].item())


def test_gradient_by_hand_and_junk_tokens():
    # d log p_a / d z = (onehot_a - p) / temperature; the slot with a junk token is not counted and has none.
    logits = mx.log(mx.array([[[1.0, 3.0], [1.0, 1.0]]]))
    mask = mx.array([[True, False]])

    def total(x: mx.array) -> mx.array:
        return mx.where(mask, token_logprobs(x, mx.array([[1, -5]]), temperature=2.0), 0.0).sum()

    odds = math.sqrt(3)
    p = odds / (1 + odds)
    np.testing.assert_allclose(mx.grad(total)(logits), [[[-(1 - p) / 2, (1 - p) / 2], [0, 0]]], rtol=1e-6)


def test_slots_do_not_touch_each_other():
    logits = mx.array([[[0.0, 1.0], [NAN, INF], [2.0, 0.0]]])
    result = np.array(token_logprobs(logits, mx.array([[0, 0, 0]]), temperature=1.0))
    assert np.isfinite(result[0, [0, 2]]).all()
    assert np.isfinite(np.array(entropy(logits, temperature=1.0))[0, [0, 2]]).all()


def test_refusals():
    logits = mx.zeros((2, 3, 5))
    with pytest.raises(ValueError, match="shapes differ"):
        token_logprobs(logits, mx.zeros((2, 1), mx.int32), temperature=1.0)
    for temperature in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="temperature must be positive"):
            token_logprobs(logits, mx.zeros((2, 3), mx.int32), temperature=temperature)
        with pytest.raises(ValueError, match="temperature must be positive"):
            entropy(logits, temperature=temperature)
