"""How often one of two completions won, and how often two judges agree.

Verdicts are 1 where the second completion wins, 0 where the first does, a half for a tie; a person's are the same
numbers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlx_ppo.rewards.figures import Floats

_Z95 = 1.96


class Rate(NamedTuple):
    """A share of n, with Wilson's 95 % interval."""

    share: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, verdicts: Sequence[float]) -> "Rate":
        """Of verdicts between 0 and 1; nothing is known without one."""
        n = len(verdicts)
        if not n:
            return cls(0.5, 0.0, 1.0, 0)
        share = math.fsum(verdicts) / n
        return cls(share, *wilson(share, n), n)

    def __str__(self) -> str:
        """The share and its interval in percent."""
        return f"{self.share:.1%} (95 % interval {self.low:.1%} to {self.high:.1%})"


def verdict(margin: float) -> float:
    """1 above 0, 0 below it, a half for a tie."""
    return float(margin > 0) + 0.5 * (margin == 0)


def verdicts(margins: Floats) -> list[float]:
    """1 where the second completion wins, 0 where the first does, a half for a tie."""
    return [verdict(margin) for margin in margins.tolist()]


def agreement(one: Mapping[Any, float], other: Mapping[Any, float]) -> Rate:
    """How often two judges, a person and a machine say, prefer the same completion.

    Args:
        one: verdicts by the pairs' names.
        other: the same; pairs that only one has judged, or that are a tie to one, don't count.
    """
    both = [(one[name], other[name]) for name in one.keys() & other.keys()]
    return Rate.of([float(first == second) for first, second in both if 0.5 not in (first, second)])


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count`. Source: Wilson 1927, J. Am. Stat. Assoc. 22(158), 209-212."""
    square = _Z95**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = _Z95 * math.sqrt(share * (1 - share) / count + square / (4 * count * count)) / (1 + square / count)
    return centre - half, centre + half
