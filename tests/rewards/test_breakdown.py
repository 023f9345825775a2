"""Accuracy taken apart: against loops over all pairs, and models whose calibration and bias are known."""

import json

import numpy as np
import pytest

from mlx_ppo.rewards.breakdown import Judged, breakdown, clear_pairs, fitted_scale, lines


def judged(seed: int = 0, count: int = 60) -> Judged:
    draw = np.random.default_rng(seed)
    raw, tokens = draw.normal(size=count), draw.integers(1, 70, count)
    pairs = draw.integers(0, count, (200, 2))
    return Judged(raw, tokens, [("web", "forum", "")[at % 3] for at in range(count)], pairs[pairs[:, 0] != pairs[:, 1]])


def test_shares_are_those_of_a_loop_over_the_pairs() -> None:
    given = judged()
    found = breakdown(given, 1.0)
    by_source: dict[str, list[float]] = {}
    by_length: dict[tuple[int, int], list[float]] = {}
    shorter: list[float] = []
    for better, worse in given.pairs:
        right = float(given.raw[better] > given.raw[worse])
        name = given.sources[better]
        if name and name == given.sources[worse]:
            by_source.setdefault(name, []).append(right)
        longest = max(given.tokens[better], given.tokens[worse])
        bucket = next(b for b in ((1, 16), (17, 32), (33, 64), (65, 128)) if b[0] <= longest <= b[1])
        by_length.setdefault(bucket, []).append(right)
        if given.tokens[better] < given.tokens[worse]:
            shorter.append(right)
    assert found["by_source"] == {
        name: {"pairs": len(all_), "accuracy": pytest.approx(np.mean(all_))} for name, all_ in by_source.items()
    }
    assert [(row["from"], row["to"]) for row in found["by_length"]] == sorted(by_length)
    for row in found["by_length"]:
        of = by_length[row["from"], row["to"]]
        assert (row["pairs"], row["accuracy"]) == (len(of), pytest.approx(np.mean(of)))
    bias = found["length_bias"]
    assert bias["better_is_shorter"] == {"pairs": len(shorter), "accuracy": pytest.approx(np.mean(shorter))}
    assert bias["correlation"] == pytest.approx(np.corrcoef(given.raw, given.tokens)[0, 1])
    assert sum(row["pairs"] for row in found["calibration"]["table"]) == len(given.pairs)
    json.dumps(found, allow_nan=False)
    assert any("forum" in line for line in lines("validation", found))


def test_a_calibrated_model_has_no_error_and_one_twice_as_sure_has() -> None:
    draw = np.random.default_rng(1)
    lead = draw.normal(0, 2, 40_000)
    right = draw.random(len(lead)) < 1 / (1 + np.exp(-np.abs(lead)))
    signed = np.where(right, np.abs(lead), -np.abs(lead))  # of the better text less the worse one
    raw = np.stack([signed, np.zeros_like(signed)], axis=1).ravel()
    given = Judged(raw, np.ones(len(raw), np.int64), [""] * len(raw), np.arange(len(raw)).reshape(-1, 2))
    good, sure = (breakdown(given, scale)["calibration"] for scale in (1.0, 2.0))
    assert good["error"] < 0.01 < 0.05 < sure["error"]
    for row in good["table"]:
        assert row["from"] <= row["predicted"] <= row["to"]
        assert row["observed"] == pytest.approx(row["predicted"], abs=0.03)
    assert fitted_scale(signed) == pytest.approx(1, abs=0.05)
    assert fitted_scale(signed / 50) == pytest.approx(50, rel=0.05)


def test_a_model_that_counts_tokens_is_found_out() -> None:
    tokens = np.arange(1, 41)
    pairs = np.array([(a, b) for a in range(40) for b in range(40) if a != b])
    found = breakdown(Judged(tokens.astype(float), tokens, [""] * 40, pairs), 1.0)["length_bias"]
    assert found["correlation"] == pytest.approx(1)
    assert (found["better_is_shorter"]["accuracy"], found["better_is_longer"]["accuracy"]) == (0, 1)


@pytest.mark.parametrize("ratings", [[1.0], [2.0, 2.0], []])
def test_without_a_pair_nothing_is_measured_and_all_is_finite(ratings: list[float]) -> None:
    pairs = clear_pairs(ratings, 1.0)
    count = len(ratings)
    given = Judged(np.zeros(count), np.full(count, 3), [""] * count, pairs)
    found = breakdown(given, fitted_scale(given.lead))
    assert found["pairs"] == 0
    json.dumps(found, allow_nan=False)
    assert lines("test", found)


def test_clear_pairs_are_all_of_few_texts_and_a_part_of_many() -> None:
    ratings = [0.0, 0.5, 1.0, 3.0]
    assert set(map(tuple, clear_pairs(ratings, 1.0).tolist())) == {(2, 0), (3, 0), (3, 1), (3, 2)}
    many = np.random.default_rng(0).normal(size=4000).tolist()
    pairs = clear_pairs(many, 0.5)
    assert len(pairs) < 1500**2 / 2
    assert all(many[better] - many[worse] >= 0.5 for better, worse in pairs[:1000])
    assert (clear_pairs(many, 0.5) == pairs).all()


def test_a_perfect_order_has_no_likeliest_scale_and_gets_a_finite_one() -> None:
    assert 0 < fitted_scale(np.array([1.0, 2.0, 3.0])) < 1e4
    assert 0 < fitted_scale(-np.array([1.0, 2.0, 3.0])) < 1
