"""A reward model's accuracy taken apart: by source, by length, by how sure it was; and whether it likes length."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]

_MOST_TEXTS = 1500  # rated texts of which all pairs are looked at
_BINS = 10
_SHORTEST = 16  # tokens up to which the first bucket goes; each further one goes to twice as many
_NEWTON, _LARGEST_SCALE = 50, 1e3


class Judged(NamedTuple):
    """Held-out texts with what a reward model gives to each, and pairs of which people prefer one."""

    raw: Floats  # [n] outputs
    tokens: Numbers  # [n] length of each text
    sources: Sequence[str]  # [n], "" where the data don't say
    pairs: Numbers  # [p, 2] indices (better, worse)

    @property
    def lead(self) -> Floats:
        """Output of the better text less that of the worse one, [p]."""
        return self.raw[self.pairs[:, 0]] - self.raw[self.pairs[:, 1]]


def clear_pairs(ratings: Sequence[float], min_difference: float) -> Numbers:
    """All pairs [p, 2] (better, worse) of rated texts at least `min_difference` apart; of many texts, of a part."""
    given = np.asarray(ratings, np.float64)
    chosen = np.arange(len(given))
    if len(given) > _MOST_TEXTS:
        chosen = np.sort(np.random.default_rng(0).permutation(len(given))[:_MOST_TEXTS])
    apart = given[chosen, None] - given[None, chosen]
    better, worse = np.nonzero((apart > 0) & (apart >= min_difference))
    return np.stack([chosen[better], chosen[worse]], axis=1)


def fitted_scale(lead: Floats) -> float:
    """The factor k above 0 with which sigmoid(k * lead) is the likeliest probability of the better texts.

    For a model that was trained on ratings, whose differences are no log odds. Source: Platt 1999, "Probabilistic
    outputs for support vector machines", without the intercept, which the order of a pair has no say in.
    """
    spread = float(np.abs(lead).mean()) if len(lead) else 0.0
    if not spread:
        return 1.0
    scale = 1 / spread
    for _ in range(_NEWTON):
        wrong = 1 / (1 + np.exp(np.clip(scale * lead, -500, 500)))
        slope = float((lead * wrong).mean())
        curvature = float((np.square(lead) * wrong * (1 - wrong)).mean())
        step = slope / max(curvature, 1e-12)
        scale = float(np.clip(scale + step, scale / 2, 2 * scale))  # the loss is convex; a far step would overshoot
        if abs(step) < 1e-6 * scale or not 1 / _LARGEST_SCALE < scale * spread < _LARGEST_SCALE:
            break
    return scale


def breakdown(judged: Judged, scale: float) -> dict[str, Any]:
    """Figures over all pairs, a tie of outputs counting half.

    Args:
        judged: texts and pairs.
        scale: sigmoid(scale * lead) is the model's probability that the better text is preferred.
    Returns:
        `pairs`, how many; `by_source`, of pairs with both texts from one, where the data say it; `by_length`, by
        tokens of the longer text; `calibration`, its table and its error; `length_bias`.
    """
    longer = judged.tokens[judged.pairs].max(axis=1)
    return {
        "pairs": len(judged.pairs),
        "by_source": _by_source(judged),
        "by_length": _by_length(judged, longer),
        "calibration": _calibration(judged.lead, scale),
        "length_bias": _length_bias(judged),
    }


def _share(lead: Floats) -> dict[str, Any]:
    right = float(((lead > 0) + 0.5 * (lead == 0)).mean()) if len(lead) else None
    return {"pairs": len(lead), "accuracy": right}


def _by_source(judged: Judged) -> dict[str, Any]:
    names = sorted({name for name in judged.sources if name})
    number = {name: at for at, name in enumerate(names)}
    of = np.array([number.get(name, -1) for name in judged.sources], np.int64)
    better, worse = of[judged.pairs[:, 0]], of[judged.pairs[:, 1]]
    lead = judged.lead
    found = {name: _share(lead[(better == at) & (worse == at)]) for at, name in enumerate(names)}
    return {name: share for name, share in found.items() if share["pairs"]}


def _by_length(judged: Judged, longer: Numbers) -> list[dict[str, Any]]:
    found, low, high, lead = [], 1, _SHORTEST, judged.lead
    while low <= int(longer.max(initial=0)):
        inside = (longer >= low) & (longer <= high)
        if inside.any():
            found.append({"from": low, "to": high, **_share(lead[inside])})
        low, high = high + 1, 2 * high
    return found


def _calibration(lead: Floats, scale: float) -> dict[str, Any]:
    """Pairs read in the direction that the model prefers, so that its probabilities lie between a half and 1.

    The error is the mean |predicted - observed| over the bins, weighted by their pairs. Source: Guo et al. 2017,
    arXiv:1706.04599, eq. 3.
    """
    sure = 1 / (1 + np.exp(-np.clip(scale * np.abs(lead), 0, 500)))
    right = (lead > 0) + 0.5 * (lead == 0)
    place = np.minimum(((sure - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    table, error = [], 0.0
    for number in range(_BINS):
        inside = place == number
        if not inside.any():
            continue
        predicted, observed = float(sure[inside].mean()), float(right[inside].mean())
        error += abs(predicted - observed) * int(inside.sum()) / len(lead)
        low, high = (round(0.5 + at / (2 * _BINS), 3) for at in (number, number + 1))
        table.append(
            {"from": low, "to": high, "pairs": int(inside.sum()), "predicted": predicted, "observed": observed}
        )
    return {"scale": scale, "error": error, "table": table}


def _length_bias(judged: Judged) -> dict[str, Any]:
    """Pearson's correlation of output and tokens over the texts; accuracy where the better text is the shorter one."""
    tokens = judged.tokens.astype(np.float64)
    varied = len(tokens) > 1 and tokens.std() > 0 and judged.raw.std() > 0
    longer = judged.tokens[judged.pairs[:, 0]] - judged.tokens[judged.pairs[:, 1]]
    lead = judged.lead
    return {
        "correlation": float(np.corrcoef(judged.raw, tokens)[0, 1]) if varied else 0.0,
        "better_is_shorter": _share(lead[longer < 0]),
        "better_is_longer": _share(lead[longer > 0]),
    }


def lines(name: str, found: Mapping[str, Any]) -> list[str]:
    """A breakdown as a table for a terminal."""
    rows = [(f"source {source}", share) for source, share in found["by_source"].items()]
    rows += [(f"{share['from']} to {share['to']} tokens", share) for share in found["by_length"]]
    bias = found["length_bias"]
    rows += [("better one is shorter", bias["better_is_shorter"]), ("better one is longer", bias["better_is_longer"])]
    shown = [(what, share) for what, share in rows if share["pairs"]]
    wide = max((len(what) for what, _ in shown), default=0)
    said = [f"{name}, accuracy by source, by tokens of the longer text, by length:"]
    said += [f"  {what:<{wide}}  {share['accuracy']:6.1%} of {share['pairs']} pairs" for what, share in shown]
    said.append(f"  correlation of score and length in tokens {bias['correlation']:+.3f}")
    calibration = found["calibration"]
    said.append(f"{name}, calibration (error {calibration['error']:.3f}): preferred with probability, observed:")
    said += [
        f"  {row['from']:.2f} to {row['to']:.2f}  predicted {row['predicted']:6.1%}  observed {row['observed']:6.1%}"
        f"  of {row['pairs']} pairs"
        for row in calibration["table"]
    ]
    return said
