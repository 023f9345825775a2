"""What an iteration costs by batch and by length of response: seconds by phase, and the ratio to linear cost.

    python benchmarks/linear_cost.py MODEL_FOLDER [--json FILE] [--iterations N]

LoRA of rank 8 on the upper 8 layers, critic and reward model as adapters on the same trunk, one epoch, minibatches of 8
responses, prompts of 16 tokens. By batch: 8 to 64 responses of 48 tokens. By length: 8 responses of 64 to 512 tokens.
Medians of N iterations (2) after one that isn't counted. A ratio is the time over the first row's, divided by the same
of the batch, or of the tokens of prompt and response: 1 is linear, less is better. What FILE already holds isn't
measured again, so that a long table can be made in pieces.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import mlx_ppo  # noqa: F401  loads the optimised BLAS before mlx
from mlx_ppo.cli.bench import config_of_folder, measure

PROMPT, MINIBATCH = 16, 8
BATCHES, LENGTHS = (8, 16, 32, 64), (64, 128, 256, 512)
BATCH_LENGTH, LENGTH_BATCH = 48, 8
GROUPS = {
    "prefill": "rollout prefill",
    "decode": "rollout decode",
    "score": "score",
    "update": "update",
    "iteration": "iteration",
}


def seconds(model: Path, rows: int, length: int, iterations: int) -> dict[str, float]:
    """One iteration's seconds by group of phases."""
    overrides = {
        "rollout.prompts": rows,
        "rollout.max_tokens": length,
        "ppo.epochs": 1,
        "ppo.minibatches": rows // MINIBATCH,
    }
    with tempfile.TemporaryDirectory() as folder:
        texts = [f"{key}={value}" for key, value in overrides.items()]
        found = measure(config_of_folder(model, texts, Path(folder)), PROMPT, iterations)
    phases = {name: row["seconds"] for name, row in found["phases"].items()}
    return {
        group: sum(took for name, took in phases.items() if name.startswith(start)) for group, start in GROUPS.items()
    }


def table(title: str, rows: list[dict[str, Any]], size: str) -> None:
    """Seconds, and the ratio to linear in `size`."""
    print(f"\n| {title} | " + " | ".join(f"{group}, s" for group in GROUPS) + " |")
    print("|---" * (1 + len(GROUPS)) + "|")
    first = rows[0]
    for row in rows:
        growth = row[size] / first[size]
        cells = [f"{row[group]:.2f} ({row[group] / first[group] / growth:.2f})" for group in GROUPS]
        print(f"| {row['rows'] if size == 'rows' else row['length']} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--iterations", type=int, default=2)
    given = parser.parse_args()
    known: dict[str, dict[str, Any]] = {}
    if given.json is not None and given.json.exists():
        known = json.loads(given.json.read_text("utf-8"))
    shapes = [(rows, BATCH_LENGTH) for rows in BATCHES] + [(LENGTH_BATCH, length) for length in LENGTHS]
    for rows, length in shapes:
        key = f"{given.model.name} {rows} x {length}"
        if key not in known:
            took = seconds(given.model, rows, length, given.iterations)
            known[key] = {"rows": rows, "length": length, "tokens": PROMPT + length, **took}
            print(f"{key}: {took['iteration']:.1f} s", flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(known, indent=2) + "\n", "utf-8")
    found = [known[f"{given.model.name} {rows} x {length}"] for rows, length in shapes]
    table(f"responses of {BATCH_LENGTH} tokens", found[: len(BATCHES)], "rows")
    table(f"tokens of {LENGTH_BATCH} responses", found[len(BATCHES) :], "tokens")


if __name__ == "__main__":
    main()
