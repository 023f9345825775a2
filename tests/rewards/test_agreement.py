"""Agreement of judges with people, by hand and against other ways to compute it."""

import math

import numpy as np
import pytest

from mlx_ppo.rewards.agreement import Preferred, kappa, of_pairs, ordered_alike, spearman


def test_pairs_by_hand() -> None:
    pairs = [
        Preferred(1.0, 1.0, 0.0),  # alike
        Preferred(0.0, 0.0, 1.0),  # alike
        Preferred(0.0, 1.0, 0.0),  # not alike
        Preferred(1.0, 0.0, 0.0),  # the first that was shown, each time
        Preferred(1.0, 0.5, 0.5),
        Preferred(0.0, 0.5, 1.0),  # a tie, then the person's
        Preferred(1.0, None, 0.0),
        Preferred(1.0, 1.0, None),
    ]
    found = of_pairs(pairs)
    assert found.agrees.pairs == 6 and found.agrees.share == pytest.approx((3 + 0 + 0.5 + 0.5) / 6)
    assert found.ties == pytest.approx(2 / 6) and found.contradicts == pytest.approx(1 / 6)
    first = [0, 1, 1, 0, 0, 1, 1, 1, 0.5, 0.5, 0.5, 0]
    assert found.first_wins.pairs == 12 and found.first_wins.share == pytest.approx(sum(first) / 12)
    # said: 1, 0, 1, tie, tie, 0; by the person: 1, 0, 0, 1, 1, 0
    chance = (3 * 2 + 3 * 2) / 36
    assert found.kappa == pytest.approx((3 / 6 - chance) / (1 - chance))
    nothing = of_pairs([])
    assert nothing.agrees.pairs == 0 and nothing.kappa == 0.0 and nothing.ties == 0.0


def test_kappa() -> None:
    assert kappa([1, 0, 1, 0], [1, 0, 1, 0]) == 1.0
    assert kappa([1, 0, 1, 0], [0, 1, 0, 1]) == -1.0
    assert kappa([1, 1, 0, 0], [1, 0, 1, 0]) == 0.0
    assert kappa([1, 1], [1, 1]) == 0.0  # nothing that chance doesn't explain


def test_spearman_against_ranks_counted_one_by_one() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        one, other = generator.integers(0, 5, 12).tolist(), generator.integers(0, 7, 12).tolist()
        ranks = [
            [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]
            for values in (one, other)
        ]
        assert spearman(one, other) == pytest.approx(np.corrcoef(*ranks)[0, 1])
        pairs = [(i, j) for i in range(12) for j in range(12) if one[i] > one[j]]
        won = [(other[i] > other[j]) + 0.5 * (other[i] == other[j]) for i, j in pairs]
        assert ordered_alike(one, other) == pytest.approx(np.mean(won))
    assert spearman([1, 2, 3], [1, 100, 1000]) == pytest.approx(1.0) and spearman([1, 2, 3], [5, 5, 5]) == 0.0
    assert math.isnan(ordered_alike([3, 3], [0.1, 0.2])) and spearman([], []) == 0.0
