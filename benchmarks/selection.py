"""How many labels are saved by asking about the pairs on which a reward model's heads disagree most.

    python benchmarks/selection.py [--seeds 60]

The snippets that neither the bundled language model nor its reward model has seen; their states by the reward model;
a rater drawn anew for each side of each pair. 600 pairs to choose from, the other half of the snippets to test on.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from mlx_ppo.bundle import bundle_root
from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.models.heads import load_reward_model, text_states
from mlx_ppo.models.load import load_trunk
from mlx_ppo.studio.selection import FIRST, fit_head, main_directions

SIZES = (20, 30, 40, 60, 80, 120, 200)
POOL, PAIRS, STEP = 600, 20000, 5
_Z95 = 1.96


def states_and_ratings(folder: Path) -> tuple[np.ndarray, list[list[float]]]:
    """The reward model's states [n, d] of the unseen snippets, and the raters' ratings of each."""
    model = load_reward_model(folder / "reward", load_trunk(folder))
    rows = [
        json.loads(line)
        for name in ("judge", "test", "validation")
        for line in (folder / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()
    ]
    texts = [tuple(model.trunk.tokenizer.encode(row["text"], bos=True))[:64] for row in rows]
    order, found = sorted(range(len(rows)), key=lambda row: len(texts[row])), {}
    for start in range(0, len(rows), 64):
        some = order[start : start + 64]
        sequences = make_sequences([texts[row] for row in some], [()] * len(some))
        with model.trunk.using(model.weights):
            states = np.array(text_states(model.trunk, sequences, model.facts.pooling))
        found.update(zip(some, states, strict=True))
    return np.array([found[row] for row in range(len(rows))], np.float64), [row["ratings"] for row in rows]


def accuracies(states: np.ndarray, ratings: list[list[float]], seed: int, *, chosen: bool) -> list[float]:
    """Accuracy on clear pairs after each of `SIZES` answers."""
    draw = np.random.default_rng(seed)
    means = np.array([np.mean(row) for row in ratings])
    order = draw.permutation(len(states))
    test, train = order[: len(order) // 2], order[len(order) // 2 :]
    tried = draw.choice(test, (PAIRS, 2))
    tried = tried[np.abs(means[tried[:, 0]] - means[tried[:, 1]]) >= 1]
    pool = draw.choice(train, (POOL, 2))
    pool = pool[pool[:, 0] != pool[:, 1]]
    pairs = np.concatenate([pool, tried])
    every = main_directions(states[pairs[:, 0]] - states[pairs[:, 1]])
    differences, held_out = every[: len(pool)], every[len(pool) :]
    better = means[tried[:, 0]] > means[tried[:, 1]]
    left, rows, outcomes, head, found = list(range(len(pool))), [], [], None, []
    while len(rows) < SIZES[-1]:
        if not chosen or len(rows) < FIRST or head is None:
            asked = list(draw.choice(left, STEP, replace=False))
        else:
            asked = [left[at] for at in np.argsort(-head.disagreement(differences[left]))[:STEP]]
        for row in asked:
            left.remove(row)
            first, second = (draw.choice(ratings[text]) for text in pool[row])
            rows.append(row)
            outcomes.append(0.5 + 0.5 * float(np.sign(first - second)))
        head = fit_head(differences[rows], np.array(outcomes))
        if len(rows) in SIZES:
            found.append(float(((held_out @ head.weights > 0) == better).mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=60)
    count = parser.parse_args().seeds
    states, ratings = states_and_ratings(bundle_root() / "models/reviews")
    random, chosen = (
        np.array([accuracies(states, ratings, seed, chosen=how) for seed in range(count)]) for how in (False, True)
    )
    print("| answers | random | chosen | gain |\n|---|---|---|---|")
    for column, size in enumerate(SIZES):
        gain = chosen[:, column] - random[:, column]
        print(
            f"| {size} | {random[:, column].mean():.1%} | {chosen[:, column].mean():.1%} "
            f"| {100 * gain.mean():+.1f} ± {100 * _Z95 * gain.std() / np.sqrt(count):.1f} |"
        )


if __name__ == "__main__":
    main()
