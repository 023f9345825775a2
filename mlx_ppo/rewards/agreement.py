"""How often a judge says what people said, on their own feedback."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlx_ppo.rewards.verdicts import Rate, verdict

Labels = Sequence[int | float]


class Preferred(NamedTuple):
    """A pair that a person has judged, and what the judge said of it; each of three may be a half, for a tie."""

    person: float  # 1 where the second of the two is the better one, as they were shown first
    plain: float | None  # the judge's, in that order; None where nothing could be used
    swapped: float | None  # the judge's, with the other one first: 1 where what is then the second is better

    @property
    def known(self) -> bool:
        """Whether both answers could be used."""
        return self.plain is not None and self.swapped is not None

    @property
    def judge(self) -> float:
        """What both orders say together: a half where they contradict each other."""
        assert self.plain is not None and self.swapped is not None
        return verdict(self.plain - self.swapped)


class Agreement(NamedTuple):
    """What pairs show of a judge."""

    agrees: Rate  # a tie counts half
    ties: float  # share of the pairs on which the judge prefers neither
    kappa: float  # Cohen's, of both one's choice of the first, the second, or neither
    first_wins: Rate  # of all answers: how often what was shown first is preferred, a tie counting half
    contradicts: float  # share of the pairs of which each order has its own winner


def of_pairs(pairs: Sequence[Preferred]) -> Agreement:
    """Agreement on the pairs of which both answers could be used."""
    known = [pair for pair in pairs if pair.known]
    said = [pair.judge for pair in known]
    agrees = Rate.of([1 - abs(pair.person - judge) for pair, judge in zip(known, said, strict=True)])
    first = [1 - value for pair in known for value in (pair.plain, pair.swapped) if value is not None]
    count = max(len(known), 1)
    return Agreement(
        agrees,
        sum(value == 0.5 for value in said) / count,
        kappa([pair.person for pair in known], said),
        Rate.of(first),
        sum(pair.plain == pair.swapped != 0.5 for pair in known) / count,
    )


def kappa(one: Labels, other: Labels) -> float:
    """Cohen's kappa of two people's labels: (agreement - that by chance) / (1 - that by chance); 0 for nothing.

    Source: Cohen 1960, Educational and Psychological Measurement 20(1), 37-46.
    """
    count = len(one)
    if not count:
        return 0.0
    same = sum(a == b for a, b in zip(one, other, strict=True)) / count
    chance = sum(list(one).count(label) * list(other).count(label) for label in {*one, *other}) / count**2
    return (same - chance) / (1 - chance) if chance < 1 else 0.0


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; 0 where either doesn't vary.

    Source: Spearman 1904, The American Journal of Psychology 15(1), 72-101.
    """
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (one, other)]
    if len(one) < 2 or any(values.std() == 0 for values in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def ordered_alike(ratings: Sequence[float], grades: Sequence[float]) -> float:
    """Share of the pairs of different rating that the grades order as the ratings do, a tie of grades counting half.

    NaN where no two ratings differ.
    """
    rated, graded = np.asarray(ratings, np.float64), np.asarray(grades, np.float64)
    won, pairs = 0.0, 0
    for rating, grade in zip(ratings, grades, strict=True):
        worse = rated < rating
        pairs += int(worse.sum())
        won += float((graded[worse] < grade).sum() + 0.5 * (graded[worse] == grade).sum())
    return won / pairs if pairs else math.nan


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: npt.NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return means[place]
