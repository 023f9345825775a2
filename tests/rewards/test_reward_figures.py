import math
import tracemalloc

import numpy as np
import pytest

from mlx_ppo.rewards.figures import calibration_error, pair_figures, rating_figures


def outputs(count: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=count).astype(np.float32)
    values[1] = values[0]
    return values


def brute_calibration(differences: list[float]) -> float:
    bins: dict[int, list[tuple[float, float]]] = {}
    for difference in differences:
        confidence = 1 / (1 + math.exp(-abs(difference)))
        right = 0.5 if difference == 0 else float(difference > 0)
        bins.setdefault(min(int((confidence - 0.5) * 20), 9), []).append((confidence, right))
    total = 0.0
    for entries in bins.values():
        gap = sum(c for c, _ in entries) / len(entries) - sum(r for _, r in entries) / len(entries)
        total += abs(gap) * len(entries) / len(differences)
    return total


@pytest.mark.parametrize("paired", [True, False])
def test_figures_of_many_texts_take_little_memory(paired: bool) -> None:
    """All pairs at once are 400 MB of differences alone, in float64."""
    raw, ratings = outputs(7000, 5), np.arange(7000, dtype=np.float32) % 5
    tracemalloc.start()
    rating_figures(raw, ratings, min_difference=1.0, paired=paired)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_pair_figures(scale: float) -> None:
    chosen, rejected = scale * outputs(40, 1), scale * outputs(40, 2)
    rejected[:3] = chosen[:3]
    differences = [float(c) - float(r) for c, r in zip(chosen, rejected, strict=True)]
    figures = pair_figures(chosen, rejected)
    loss = np.mean([-math.log(1 / (1 + math.exp(-d))) if d > -30 else -d for d in differences])
    assert figures["loss"] == pytest.approx(loss)
    assert figures["accuracy"] == pytest.approx(
        np.mean([1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences])
    )
    assert figures["calibration_error"] == pytest.approx(brute_calibration(differences))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("min_difference", [0.0, 1.0, 2.5])
def test_rating_figures(paired: bool, min_difference: float) -> None:
    raw = outputs(25, 3)
    ratings = np.random.default_rng(4).integers(1, 6, 25).astype(np.float32)
    raw += 0.3 * ratings
    pairs = [
        (float(ratings[i]) - float(ratings[j]), float(raw[i]) - float(raw[j]))
        for i in range(25)
        for j in range(25)
        if ratings[i] > ratings[j]
    ]
    clear = [output for rating, output in pairs if rating >= min_difference]
    figures = rating_figures(raw, ratings, min_difference=min_difference, paired=paired)

    def share_right(outputs: list[float]) -> float:
        return float(np.mean([1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in outputs]))

    assert figures["accuracy"] == pytest.approx(share_right(clear))
    assert figures["accuracy_all"] == pytest.approx(share_right([output for _, output in pairs]))
    wide, exact = raw.astype(np.float64), ratings.astype(np.float64)
    centred, deviations = wide - wide.mean(), exact - exact.mean()
    covariance = (centred * deviations).sum()
    assert figures["correlation"] == pytest.approx(
        covariance / math.sqrt((centred**2).sum() * (deviations**2).sum()), rel=1e-5
    )
    assert figures["slope"] == pytest.approx(covariance / (centred**2).sum(), rel=1e-5)
    if paired:
        assert figures["loss"] == pytest.approx(np.mean([math.log1p(math.exp(-d)) for d in clear]))
        assert figures["calibration_error"] == pytest.approx(brute_calibration(clear))
    else:
        residual = deviations - covariance / (centred**2).sum() * centred
        assert figures["loss"] == pytest.approx((residual**2).mean(), rel=1e-5)
        assert "calibration_error" not in figures


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([], 0.0),
        ([0.0] * 8, 0.0),  # a model without opinion claims 0.5 and has 0.5
        ([math.log(3)] * 3 + [-math.log(3)], 0.0),  # claims 3 in 4, right 3 in 4 times
        ([-100.0] * 5, 1.0),
        ([100.0] * 5, 0.0),
        ([math.log(3)] * 4, 0.25),
    ],
)
def test_calibration_error_by_hand(differences: list[float], expected: float) -> None:
    assert calibration_error(np.array(differences)) == pytest.approx(expected, abs=1e-9)


def test_a_constant_model_says_nothing() -> None:
    ratings = np.array([1, 2, 3, 4], np.float32)
    figures = rating_figures(np.full(4, 0.7, np.float32), ratings, min_difference=1.0, paired=True)
    expected = {"accuracy": 0.5, "accuracy_all": 0.5, "correlation": 0.0, "slope": 0.0, "loss": math.log(2)}
    assert figures == pytest.approx({**expected, "calibration_error": 0.0})


@pytest.mark.parametrize("paired", [True, False])
def test_without_a_clear_pair_nothing_is_measured_and_all_is_finite(paired: bool) -> None:
    raw, ratings = outputs(5, 1), np.full(5, 3.0, np.float32)
    figures = rating_figures(raw, ratings, min_difference=1.0, paired=paired)
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["accuracy"] == figures["accuracy_all"] == 0.0
