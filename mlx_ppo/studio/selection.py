"""Which pair teaches a reward model most, and how much the answers so far have taught.

A logistic head on the difference of two completions' states stands in for the reward model: it is fitted in a
millisecond, so that it can be asked after every answer. Its posterior is Laplace's: normal, around the weights of the
highest posterior probability. Source: Bishop 2006, Pattern Recognition and Machine Learning, section 4.5.
"""

import base64
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_ppo.data.rankings import finite
from mlx_ppo.rewards.verdicts import wilson
from mlx_ppo.studio.lines import Row
from mlx_ppo.studio.questions import AGAIN

Floats = np.ndarray[Any, np.dtype[np.float64]]

BY_REWARD = "reward"  # whose states a pair has
FIRST = 10  # answers to pairs in random order, before any is chosen
_DIRECTIONS = 48  # of the states, those in which the pairs differ most
_LENGTH = 2.0  # mean square length of a difference
_NEWTON, _CLOSE = 25, 1e-6
_OUTCOMES = {"left": 1.0, "right": 0.0, "tie": 0.5, "bad": 0.5}
_FOLDS, _REPEATS = 5, 4
_FEWEST = 20  # answers, below which nothing is measured
_WORTH = 0.02  # of accuracy: a doubling of the labels that brings less isn't worth a person's time
_Z95 = 1.96


def packed(states: Floats) -> str:
    """A state [d] as text; half precision is enough to choose by."""
    return base64.b64encode(np.clip(states, -6e4, 6e4).astype("<f2").tobytes()).decode("ascii")


def _unpacked(text: str) -> Floats:
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float64)


class Head(NamedTuple):
    """A logistic head on differences: its weights [d] and their covariance [d, d]."""

    weights: Floats
    covariance: Floats

    def disagreement(self, differences: Floats) -> Floats:
        """[n]: how far the posterior's heads disagree on each pair; their variance p (1 - p) x' S x in logits."""
        chance = 1 / (1 + np.exp(-differences @ self.weights))
        spread = np.einsum("ij,jk,ik->i", differences, self.covariance, differences)
        return np.asarray(chance * (1 - chance) * spread)


def fit_head(differences: Floats, outcomes: Floats) -> Head:
    """The most probable head under a standard normal prior, by Newton's method.

    Args:
        differences: [n, d], state of the left completion less the right one's.
        outcomes: [n], 1 where the left one is better, 0 where the right one is, a half for neither.
    """
    weights = np.zeros(differences.shape[1])
    for _ in range(_NEWTON):
        chance = 1 / (1 + np.exp(-np.clip(differences @ weights, -500, 500)))
        slope = differences.T @ (chance - outcomes) + weights
        curvature = (differences * (chance * (1 - chance))[:, None]).T @ differences + np.eye(len(weights))
        step = np.linalg.solve(curvature, slope)
        weights = weights - step
        if np.abs(step).max() < _CLOSE:
            break
    return Head(weights, np.asarray(np.linalg.inv(curvature), np.float64))


def ensemble_disagreement(pairs: Sequence[Row]) -> Floats | None:
    """[n]: how far an ensemble's members disagree on each pair, as `Head.disagreement` has it: p (1 - p) v.

    v is the variance over the members of what each gives to the one completion above the other, p the probability by
    their mean. None where some pair has no such numbers.
    """
    leads: list[Any] = [pair.get("leads") for pair in pairs]
    if not leads or not all(isinstance(own, list) and len(own) > 1 and all(map(finite, own)) for own in leads):
        return None
    mean = np.array([np.mean(own) for own in leads])
    chance = 1 / (1 + np.exp(-np.clip(mean, -500, 500)))
    return np.asarray(chance * (1 - chance) * np.array([np.var(own) for own in leads]))


class Learned(NamedTuple):
    """How often a head fitted on other answers is right about an answer, with half of them and with all."""

    answers: int  # that name a side
    accuracy: float
    low: float  # 95 % interval of the accuracy
    high: float
    doubling: float  # what twice the answers brought
    enough: bool  # whether twice the answers surely brought less than is worth it


def learned(differences: Floats, outcomes: Floats, seed: int) -> Learned | None:
    """Cross-validated accuracy; None where too few answers name a side.

    Args:
        differences: [n, d].
        outcomes: [n], as for `fit_head`; ties are left out.
        seed: of the folds.
    """
    sides = outcomes != 0.5
    differences, outcomes = differences[sides], outcomes[sides]
    count = len(outcomes)
    if count < _FEWEST:
        return None
    draw = np.random.default_rng(seed)
    right = np.zeros((2, count))
    for _ in range(_REPEATS):
        order = draw.permutation(count)
        for fold in range(_FOLDS):
            tried = order[fold::_FOLDS]
            rest = np.setdiff1d(order, tried, assume_unique=True)
            rest = rest[draw.permutation(len(rest))]
            for row, use in enumerate((rest[: len(rest) // 2], rest)):
                found = differences[tried] @ fit_head(differences[use], outcomes[use]).weights
                right[row, tried] += ((found > 0) == (outcomes[tried] > 0.5)) / _REPEATS
    half, whole = right.mean(axis=1)
    error = float((right[1] - right[0]).std()) / math.sqrt(count)
    low, high = wilson(float(whole), count)
    return Learned(count, float(whole), low, high, float(whole - half), bool(whole - half + _Z95 * error < _WORTH))


class Teacher:
    """What a set's answers have taught so far, by the states of its pairs."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._lock = threading.Lock()
        self._place: dict[str, int] = {}  # row of a pair's difference, by the pair's number
        self._differences = np.zeros((0, 0))
        self._measured: tuple[int, Learned | None] = (-1, None)

    def choose(self, open_pairs: Sequence[Row], pairs: Mapping[str, Row], standing: Mapping[str, Row]) -> Row | None:
        """The open pair on which the heads that the answers leave possible disagree most.

        Where the reward model is an ensemble, its members' disagreement is added, and chooses alone as long as there
        are too few answers.

        Args:
            open_pairs: those to choose from.
            pairs: all pairs of the set, by number.
            standing: the answers that count.
        Returns:
            None where there are too few answers, or pairs whose states no reward model gave: the order is random then.
        """
        with self._lock:
            if not all(pair.get("states_by") == BY_REWARD for pair in open_pairs) or not self._read(pairs):
                return None
            rows, outcomes = self._answered(pairs, standing)
            doubts = ensemble_disagreement(open_pairs)
            if len(rows) < FIRST:
                return None if doubts is None else open_pairs[int(doubts.argmax())]
            head = fit_head(self._differences[rows], outcomes)
            free = [self._place[str(pair["id"])] for pair in open_pairs]
            found = head.disagreement(self._differences[free])
            return open_pairs[int((found if doubts is None else found + doubts).argmax())]

    def measure(self, pairs: Mapping[str, Row], standing: Mapping[str, Row], seed: int) -> Learned | None:
        """How far the answers have taught; measured anew after every tenth answer."""
        with self._lock:
            if not self._read(pairs):
                return None
            rows, outcomes = self._answered(pairs, standing)
            if len(rows) // FIRST != self._measured[0]:
                self._measured = (len(rows) // FIRST, learned(self._differences[rows], outcomes, seed))
            return self._measured[1]

    def _read(self, pairs: Mapping[str, Row]) -> bool:
        """Keep up with the pairs; whether they have states."""
        given = {number: pair["states"] for number, pair in pairs.items() if "states" in pair}
        if len(given) != len(self._place):
            try:
                left, right = (np.array([_unpacked(states[side]) for states in given.values()]) for side in "ab")
                found = main_directions(left - right)
            except (ValueError, KeyError, TypeError, np.linalg.LinAlgError):  # not what this program wrote
                return False
            self._place, self._differences = {number: row for row, number in enumerate(given)}, found
        return bool(self._place)

    def _answered(self, pairs: Mapping[str, Row], standing: Mapping[str, Row]) -> tuple[list[int], Floats]:
        """Rows of the pairs with a verdict, and the outcomes: 1 where completion a is the better one."""
        rows, outcomes = [], []
        for name, row in standing.items():
            number = name.rpartition("/")[2]
            outcome = _OUTCOMES.get(row.get("verdict", ""))
            if row["kind"] != "pair" or name.endswith(AGAIN) or outcome is None or number not in self._place:
                continue
            rows.append(self._place[number])
            outcomes.append(outcome if row.get("left") == pairs[number]["a"] else 1 - outcome)
        return rows, np.array(outcomes)


def main_directions(differences: Floats) -> Floats:
    """Differences [n, d] in their main directions [n, at most 48], scaled to a mean square length of `_LENGTH`.

    Each of the d is brought to the same spread first: a language model has a few that would drown all others.
    """
    even = differences / np.maximum(differences.std(axis=0), 1e-12)
    _, _, directions = np.linalg.svd(even, full_matrices=False)
    found = even @ directions[:_DIRECTIONS].T
    return np.asarray(found * math.sqrt(_LENGTH / max(float(np.square(found).sum(axis=1).mean()), 1e-12)))
