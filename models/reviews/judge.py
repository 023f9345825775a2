"""Independent judges of finished runs of the bundled example.

    pip install 'mlx-ppo[judges]'
    python models/reviews/judge.py runs/reviews runs/reviews-2 runs/reviews-3
    python models/reviews/judge.py --completions runs/smollm2-reviews

PPO never sees these judges, and they are of another kind than the reward model: a ridge regression on TF-IDF 1- and
2-grams, fitted on the ratings of the `judge` snippets that neither the language model nor the reward model has read;
and VADER, a lexicon with rules. They read the same completions of held-out prompts before and after training.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

DATA = Path(__file__).resolve().parent / "data"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def rated(name: str) -> tuple[list[str], np.ndarray]:
    """Texts and mean ratings of one part of the snippets."""
    rows = read(DATA / f"{name}.jsonl")
    return [row["text"] for row in rows], np.array([np.mean(row["ratings"]) for row in rows])


def accuracy(scores: np.ndarray, ratings: np.ndarray, difference: float) -> float:
    """Share of the pairs at least so far apart that are put in the right order."""
    high, low = np.nonzero(ratings[:, None] - ratings[None, :] >= difference)
    return float((scores[high] > scores[low]).mean())


def ridge(name: str) -> Pipeline:
    """The linear judge, fitted on one part of the snippets."""
    return make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), Ridge(alpha=1.0)).fit(*rated(name))


def main() -> None:
    """Print a table, and write the figures as JSON where asked to."""
    parser = argparse.ArgumentParser(description="Independent judges of finished runs of the bundled example.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of `mlx-ppo train`")
    parser.add_argument("--completions", action="store_true", help="judge what was written without its prompt")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    linear, lexicon = ridge("judge"), SentimentIntensityAnalyzer()
    texts, ratings = rated("test")
    print("on the ratings of the test snippets, pairs at least 1 point apart / all pairs / correlation:")
    for name, model in (
        ("the linear judge", linear),
        ("the same, fitted on the reward model's snippets", ridge("train")),
    ):
        scores = model.predict(texts)
        correlation = np.corrcoef(scores, ratings)[0, 1]
        clear, every = accuracy(scores, ratings, 1.0), accuracy(scores, ratings, 1e-9)
        print(f"  {name}: {clear:.1%} / {every:.1%} / {correlation:.2f}")
    results = []
    for run in arguments.runs:
        rows = read(run / "samples.jsonl")
        steps = sorted({row["step"] for row in rows if row["kind"] == "evaluation"})
        ends = []
        for step in (steps[0], steps[-1]):
            summary = next(row for row in rows if row["kind"] == "summary" and row["step"] == step)
            shown = [row for row in rows if row["kind"] == "evaluation" and row["step"] == step]
            written = [(row["prompt"] if not arguments.completions else "") + row["completion"] for row in shown]
            ends.append(
                {
                    "reward model, rating points": summary["points/reward"],
                    "linear judge, rating points": float(linear.predict(written).mean()),
                    "VADER compound": float(np.mean([lexicon.polarity_scores(text)["compound"] for text in written])),
                    "KL, nats a sequence": summary["kl"],
                    "distinct 2-grams": summary["distinct_2"],
                    "length, tokens": summary["length"],
                }
            )
        results.append({"run": run.name, "before": ends[0], "after": ends[1]})
    print("\n| | " + " | ".join(result["run"] for result in results) + " |\n|---|" + "---|" * len(results))
    for key in results[0]["before"]:
        cells = [f"{r['before'][key]:.2f} → {r['after'][key]:.2f}" for r in results]
        print(f"| {key} | " + " | ".join(cells) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
