"""How good a reward model is on held-out feedback: accuracy on pairs, correlation, calibration."""

from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]

_BINS = 10


def pair_figures(chosen: Floats, rejected: Floats) -> dict[str, float]:
    """Figures from the raw outputs [p] for the chosen and the rejected text of each pair.

    Returns:
        loss: mean -log sigmoid(chosen - rejected); accuracy: share with chosen above rejected, a tie counting half;
        calibration_error: mean |confidence - accuracy| over ten bins of the predicted probability.
    """
    difference = chosen.astype(np.float64) - rejected
    return {
        "loss": _bradley_terry(difference),
        "accuracy": _share_right(difference),
        "calibration_error": calibration_error(difference),
    }


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
    correlation = float(np.corrcoef(wide, ratings)[0, 1]) if varied else 0.0
    figures = {
        "loss": _bradley_terry(difference[clear]) if paired else float(ratings.var() * (1 - correlation**2)),
        "accuracy": _share_right(difference[clear]),
        "accuracy_all": _share_right(difference),
        "correlation": correlation,
        "slope": float(np.polyfit(wide, ratings, 1)[0]) if varied else 0.0,
    }
    if paired:
        figures["calibration_error"] = calibration_error(difference[clear])
    return figures


def calibration_error(difference: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Expected calibration error of sigmoid(difference) as the probability that the better text is preferred.

    Each pair is read in the direction the model prefers, so that confidences lie between 0.5 and 1; a tie
    is half right.
    """
    if not len(difference):
        return 0.0
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    right = (difference > 0) + 0.5 * (difference == 0)
    place = np.minimum(((confidence - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    gaps = [
        abs(confidence[place == at].mean() - right[place == at].mean()) * (place == at).mean()
        for at in range(_BINS)
        if (place == at).any()
    ]
    return float(sum(gaps))


def _bradley_terry(difference: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return float(np.logaddexp(0.0, -difference).mean()) if len(difference) else 0.0


def _share_right(difference: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return float(((difference > 0) + 0.5 * (difference == 0)).mean()) if len(difference) else 0.0
