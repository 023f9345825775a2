"""How often reward models order held-out snippets as people do, beside a ridge regression on TF-IDF.

    pip install 'mlx-ppo[judges]'
    python benchmarks/reward_baseline.py [runs/reviews-reward/reward ...]

Both learn from the ratings of the same snippets, `train.jsonl`. They are tried on those of `test.jsonl` and
`judge.jsonl`, which neither has read; `validation.jsonl` chose the epoch of the reward model, and chooses the
strength of the ridge, "ridge" in the table. Without a folder the bundled model is tried. Intervals and the
probability are from a bootstrap over snippets, with the same snippets for all, so that the difference has an interval
of its own. Folders have to hold whole models (train = full) of ratings; an ensemble is tried with each of its members
as well.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import mlx_ppo  # noqa: F401  before mlx and sklearn: it loads the BLAS

# isort: split
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from mlx_ppo.bundle import bundle_root
from mlx_ppo.models.heads import load_reward_model

STRENGTHS = (0.3, 1.0, 3.0, 10.0)
MOST_TOKENS = 96
_CLEAR = 1.0  # rating points


class Part(NamedTuple):
    """Some snippets."""

    texts: list[str]
    ratings: np.ndarray  # [n] means


class Held(NamedTuple):
    """Snippets to be ordered, with every pair that is clear to people."""

    part: Part
    clear: np.ndarray  # [n, n] float32, 1 where the first is rated a point above the second
    draws: np.ndarray  # [b, n] how often a snippet is in each resample


def read(*names: str) -> Part:
    """The snippets of files."""
    folder = bundle_root() / "models/reviews/data"
    lines = [line for name in names for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
    rows = [json.loads(line) for line in lines]
    return Part([row["text"] for row in rows], np.array([np.mean(row["ratings"]) for row in rows]))


def held(names: tuple[str, ...], resamples: int) -> Held:
    """Snippets with their pairs and resamples."""
    part = read(*names)
    count = len(part.texts)
    clear = (part.ratings[:, None] - part.ratings[None, :] >= _CLEAR).astype(np.float32)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), resamples).astype(np.float32)
    return Held(part, clear, draws)


def accuracies(scores: np.ndarray, of: Held) -> np.ndarray:
    """Share of clear pairs in the right order: of all snippets, then of each resample."""
    right = of.clear * ((scores[:, None] > scores[None, :]) + 0.5 * (scores[:, None] == scores[None, :]))
    weights = np.concatenate([np.ones((1, len(scores)), np.float32), of.draws])
    return ((weights @ right.astype(np.float32)) * weights).sum(axis=1) / ((weights @ of.clear) * weights).sum(axis=1)


def ridges(part: Part) -> dict[str, np.ndarray]:
    """Predictions of a ridge regression as the judge of `models/reviews` is, and of the one validation chooses."""
    train, validation = read("train"), held(("validation",), 0)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(train.texts)
    fitted = {alpha: Ridge(alpha=alpha).fit(words.transform(train.texts), train.ratings) for alpha in STRENGTHS}
    tried = {a: accuracies(r.predict(words.transform(validation.part.texts)), validation)[0] for a, r in fitted.items()}
    best = max(tried, key=lambda alpha: tried[alpha])
    states = words.transform(part.texts)
    return {"ridge": fitted[best].predict(states), "ridge of models/reviews/judge.py": fitted[1.0].predict(states)}


def model_scores(folder: Path, part: Part) -> dict[str, np.ndarray]:
    """Predicted ratings of a reward model that was trained on ratings, and of the members of an ensemble."""
    model = load_reward_model(folder, None)
    tokenizer = model.trunk.tokenizer
    rows = [[*tokenizer.encode(text, bos=True), tokenizer.eos_id] for text in part.texts]
    each = model.of_texts([row if len(row) <= MOST_TOKENS else [row[0], *row[1 - MOST_TOKENS :]] for row in rows])
    if model.facts.slope is None:
        raise SystemExit(f"{folder}: trained on pairs, so that it predicts no ratings")
    each = model.facts.slope * each
    name = "/".join(folder.parts[-2:])
    members = {f"{name}, member {at}": own for at, own in enumerate(each, 1)} if len(each) > 1 else {}
    return {name: each.mean(axis=0), **members}


def main() -> None:
    """Print a table for each set of held-out snippets."""
    parser = argparse.ArgumentParser(description="Reward models beside a ridge regression on TF-IDF.")
    parser.add_argument("folders", nargs="*", type=Path, help="reward models; default: the bundled one")
    parser.add_argument("--resamples", type=int, default=1000)
    arguments = parser.parse_args()
    folders = arguments.folders or [bundle_root() / "models/reviews/reward"]
    for names in (("test",), ("judge",), ("test", "judge")):
        of = held(names, arguments.resamples)
        found = ridges(of.part)
        for folder in folders:
            scores = model_scores(folder, of.part)
            name, whole = next(iter(scores.items()))
            found |= {**scores, f"mean of {name} and the ridge": (whole + found["ridge"]) / 2}
        against = accuracies(found["ridge"], of)
        print(f"\n{' and '.join(names)}: {len(of.part.texts)} snippets, {int(of.clear.sum())} pairs a point apart")
        print("| | accuracy | less the ridge | probability of being better |\n|---|---|---|---|")
        for name, scores in found.items():
            own = accuracies(scores, of)
            gain = 100 * (own - against)
            low, high = np.quantile(gain[1:], (0.025, 0.975))
            print(
                f"| {name} | {own[0]:.1%} | {gain[0]:+.1f} ({low:+.1f} to {high:+.1f}) | {(gain[1:] > 0).mean():.0%} |"
            )


if __name__ == "__main__":
    main()
