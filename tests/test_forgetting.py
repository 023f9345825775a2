"""Losses of a text by its parts, in windows, and the interval of their difference."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.data.passages import ENGLISH, Passage, Passages, load_passages
from mlx_ppo.forgetting import Losses, difference, losses, windows
from mlx_ppo.models.adapters import Weights


@pytest.mark.parametrize("size", [2, 3, 5, 8, 100])
@pytest.mark.parametrize("length", [2, 7, 8, 9, 40])
def test_every_token_is_predicted_once_from_half_a_window_at_least(size, length):
    passage = Passage((1, *range(10, 9 + length)), (-1, *range(length - 1)))
    found = windows([passage], size, 1000, bos=1)
    assert [part for window in found for part in window.parts] == list(range(length - 1))
    for number, window in enumerate(found):
        assert len(window.tokens) <= size and window.tokens[0] == 1 and window.start >= 1
        assert len(window.tokens) - window.start == len(window.parts)
        assert number == 0 or window.start >= size // 2
        own = [token - 10 for token in window.tokens[window.start :]]
        assert own == list(window.parts)
    plain = windows([passage], size, 1000, bos=None)
    assert [w.tokens[w.start :] for w in plain] == [w.tokens[w.start :] for w in found]
    assert all(w.tokens[0] == passage.tokens[w.parts[0] + 1 - w.start] for w in plain)


def test_the_rest_is_left_out():
    passages = [Passage(tuple(range(6)), (-1, 0, 0, 0, 0, 0)), Passage(tuple(range(6)), (-1, 1, 1, 1, 1, 1))]
    found = windows(passages, 4, 8, bos=None)
    assert sum(part == 0 for window in found for part in window.parts) == 5
    assert sum(part == 1 for window in found for part in window.parts) == 1
    asked = Passage(tuple(range(12)), (-1,) * 10 + (0, 0))
    assert [window.parts for window in windows([asked], 4, 100, bos=None)] == [(0, 0)]


def test_losses_are_the_model_s_own(trunk, make_adapters):
    """Against whole logits in float64, text by text; one window and rows of different lengths in a batch."""
    rows = [(1, 5, 9, 200, 7), (1, 40, 41), (1, 8, 250, 30, 31, 32, 33)]
    parts = [(-1, 0, 0, 1, 1), (-1, -1, 2), (-1, *[3] * 6)]
    text = Passages(tuple(map(Passage, rows, parts)), 5, "rows")
    weights = make_adapters(trunk)
    found = losses(trunk, weights, windows(text.passages, 100, 1000, bos=1), text)
    expected = np.zeros(5)
    for row, own in zip(rows, parts, strict=True):
        with trunk.using(weights):
            logits = np.array(trunk.model(mx.array([row])).astype(mx.float32), np.float64)[0]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for at in range(1, len(row)):
            if own[at] >= 0:
                expected[own[at]] -= logprobs[at - 1, row[at]]
    np.testing.assert_allclose(found.nats, expected, rtol=1e-4, atol=1e-4)
    assert found.tokens.tolist() == [2, 2, 1, 6, 0]
    assert found.mean == pytest.approx(expected.sum() / 11, rel=1e-4)
    base = losses(trunk, Weights({}), windows(text.passages, 100, 1000, bos=1), text)
    assert difference(base, found).parts == 4 and abs(difference(base, found).mean) > 1e-3
    assert difference(found, found)[:3] == (0, 0, 0)


def test_small_windows_cost_context_and_nothing_else(trunk):
    text = load_passages(ENGLISH, trunk.tokenizer)
    wide, narrow = (losses(trunk, Weights({}), windows(text.passages, size, 300, bos=1), text) for size in (1000, 16))
    assert wide.tokens.tolist() == narrow.tokens.tolist() and 0 < wide.tokens.sum() < 300
    assert abs(wide.mean - narrow.mean) < 1.0 and wide.mean != narrow.mean


def test_the_interval_by_hand_and_by_simulation():
    before = Losses(np.array([10.0, 20.0, 5.0, 0.0]), np.array([5.0, 10.0, 5.0, 0.0]))
    after = Losses(np.array([12.0, 21.0, 6.0, 0.0]), before.tokens)
    found = difference(before, after)  # d = 2, 1, 1 over 5, 10, 5 tokens: D = 0.2, residuals 1, -1, 0
    assert found.mean == pytest.approx(0.2) and found.parts == 3
    assert found.high - found.mean == pytest.approx(1.96 * math.sqrt(1.5 * 2) / 20)
    one = difference(*(Losses(each.nats[:1], each.tokens[:1]) for each in (before, after)))
    assert one.mean == pytest.approx(0.4) and math.isnan(one.low)
    generator, covered = np.random.default_rng(0), 0
    for _ in range(400):
        counts = generator.integers(20, 200, 40).astype(float)
        paired = counts * generator.normal(0.05, 0.1, 40) + np.sqrt(counts) * generator.normal(size=40)
        low, high = difference(Losses(0 * paired, counts), Losses(paired, counts))[1:3]
        covered += low <= 0.05 <= high
    assert 0.90 <= covered / 400 <= 0.98
