"""How good a reward model is on held-out feedback: accuracy on pairs, correlation, calibration."""

from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]

_BINS = 10
_ROWS = 256  # texts that are compared with all others at a time


def pair_figures(chosen: Floats, rejected: Floats) -> dict[str, float]:
    """Figures from the raw outputs [p] for the chosen and the rejected text of each pair.

    Returns:
        loss: mean -log sigmoid(chosen - rejected); accuracy: share with chosen above rejected, a tie counting half;
        calibration_error: mean |confidence - accuracy| over ten bins of the predicted probability.
    """
    difference = chosen.astype(np.float64) - rejected
    pairs = _Pairs()
    pairs.add(difference)
    return {"loss": pairs.loss, "accuracy": pairs.accuracy, "calibration_error": pairs.calibration_error}


def rating_figures(raw: Floats, ratings: Floats, *, min_difference: float, paired: bool) -> dict[str, float]:
    """Figures from the raw outputs [n] for rated texts, over all pairs of different rating.

    Args:
        raw: the model's outputs.
        ratings: the texts' mean ratings, in rating points.
        min_difference: pairs that differ by at least this much count as clear.
        paired: the model was trained on pairs, so that sigmoid of a difference is a probability.
    Returns:
        loss: mean -log sigmoid over the clear pairs (paired), else the mean squared error left after the
        best linear calibration, in rating points squared;
        accuracy: on clear pairs; accuracy_all: on all pairs; correlation: Pearson's, with the ratings;
        slope: of the rating regressed on the output, 1 where a regression is calibrated; calibration_error (paired).
        Without a clear pair, 0 for what is taken over them.
    """
    wide = raw.astype(np.float64)
    varied = wide.std() > 0 and ratings.std() > 0
    every, clear = _Pairs(), _Pairs()
    for start in range(0, len(wide), _ROWS):  # all pairs at once would take memory by the square of their number
        rows = slice(start, start + _ROWS)
        apart = ratings[rows, None] - ratings[None, :]
        difference = wide[rows, None] - wide[None, :]
        every.add(difference[apart > 0])
        clear.add(difference[(apart > 0) & (apart >= min_difference)])
    correlation = float(np.corrcoef(wide, ratings)[0, 1]) if varied else 0.0
    figures = {
        "loss": clear.loss if paired else float(ratings.var() * (1 - correlation**2)),
        "accuracy": clear.accuracy,
        "accuracy_all": every.accuracy,
        "correlation": correlation,
        "slope": float(np.polyfit(wide, ratings, 1)[0]) if varied else 0.0,
    }
    if paired:
        figures["calibration_error"] = clear.calibration_error
    return figures


def calibration_error(difference: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Expected calibration error of sigmoid(difference) as the probability that the better text is preferred.

    Each pair is read in the direction the model prefers, so that confidences lie between 0.5 and 1; a tie
    is half right.
    """
    pairs = _Pairs()
    pairs.add(difference)
    return pairs.calibration_error


class _Pairs:
    """Sums over pairs, whose differences, better less worse, come in parts."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._bins = np.zeros((3, _BINS))  # pairs, their confidence, how many are right; by confidence

    def add(self, difference: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        self._loss += float(np.logaddexp(0.0, -difference).sum())
        confidence = 1 / (1 + np.exp(-np.abs(difference)))
        right = (difference > 0) + 0.5 * (difference == 0)
        place = np.minimum(((confidence - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
        for row, weights in enumerate((np.ones(len(difference)), confidence, right)):
            self._bins[row] += np.bincount(place, weights, _BINS)

    @property
    def _count(self) -> float:
        return max(float(self._bins[0].sum()), 1.0)

    @property
    def loss(self) -> float:
        return self._loss / self._count

    @property
    def accuracy(self) -> float:
        return float(self._bins[2].sum()) / self._count

    @property
    def calibration_error(self) -> float:
        return float(np.abs(self._bins[1] - self._bins[2]).sum()) / self._count
