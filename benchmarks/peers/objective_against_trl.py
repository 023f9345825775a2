"""What PPO maximises, score less KL penalty, over episodes and over seconds, beside TRL 1.12's: five seeds.

    python benchmarks/peers/objective_against_trl.py --folder /somewhere [--seeds 5] [--rounds 14]

The task is TRL's classic one (Ziegler et al. 2019, arXiv:1909.08593): openings of film reviews are continued, and
positive sentiment pays. An opening has 6 tokens, a continuation 16; sentiment is VADER's, which both sides compute
alike (`rule.py`). Policy and reference are SmolLM2-135M-Instruct in float32 with LoRA of rank 8, 16 openings an
iteration. TRL's side has its script's defaults (4 epochs of one minibatch, clipping of 0.2, lambda 0.95) and the rate
that is given; ours has the settings of `OURS`. Both penalise the same sampled KL with the same coefficient.

Seeds are done one after the other, both sides in turns; what is there already isn't done again.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from alternate import Side, alternate, markdown, parser, report, working_folder
from environments import model_of, prepare, python_of
from ppo_against_trl import LORA

RULE = f"{Path(__file__).with_name('rule.py')}:sentiment"
WINDOW = 2  # iterations of a point
OURS: dict[str, Any] = {
    "model": {"train": "lora"},
    "lora": LORA,
    "rollout": {"max_tokens": 16, "temperature": 1.0},
    "reward": [{"kind": "function", "function": RULE}],
    "ppo": {"epochs": 4, "minibatches": 1},
}


def the_sides(chosen: argparse.Namespace, folder: Path, seed: int) -> list[Side]:
    """Ours and theirs, for one seed."""
    model = (chosen.model or model_of(folder)).resolve()
    prompts = prepare(folder, model, "openings", lengths=[6] * 256) / "prompts.json"
    order: dict[str, Any] = {
        "model": str(model),
        "prompts": str(prompts),
        "batch": chosen.batch,
        "tokens": 16,
        "epochs": 4,
        "kl_coef": chosen.kl_coef,
        "seed": seed,
        "rule": RULE,
        "lora": LORA,
        "learning_rate": chosen.rate,
        "checkpointing": False,
    }
    config = json.loads(json.dumps(OURS)) | {"kl": {"coef": chosen.kl_coef}}
    config["rollout"]["prompts"] = chosen.batch
    config["optimizer"] = {"learning_rate": chosen.our_rate}
    for change in chosen.set:  # section.key=value in JSON
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        config.setdefault(section, {})[name] = json.loads(value)
    return [
        Side("mlx-ppo", python_of(folder, "mlx-ppo"), "worker_ppo.py", order | {"config": config}),
        Side("TRL", python_of(folder, "trl"), "worker_trl_ppo.py", order),
    ]


def values(rows: list[dict[str, Any]], coef: float) -> list[float]:
    """Mean score less the penalty, of each `WINDOW` iterations."""
    each = [row["score"] - coef * row["kl"] for row in rows]
    return [statistics.fmean(each[at : at + WINDOW]) for at in range(0, len(each) - WINDOW + 1, WINDOW)]


def at_time(rows: list[dict[str, Any]], coef: float, second: float) -> float:
    """The value of the last point that was complete then; that of the first one before."""
    ends = list(itertools.accumulate(row["seconds"] for row in rows))[WINDOW - 1 :: WINDOW]
    found = values(rows, coef)
    return found[max(0, sum(end <= second for end in ends) - 1)]


def main() -> None:
    options = parser(__doc__ or "", rounds=14)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--batch", type=int, default=16, help="openings an iteration")
    options.add_argument("--rate", type=float, default=3e-3, help="TRL's learning rate")
    options.add_argument("--our-rate", type=float, default=3e-3, help="ours")
    options.add_argument("--kl-coef", type=float, default=0.05)
    options.add_argument("--set", action="append", default=[], help="a key of our configuration, as JSON")
    chosen = options.parse_args()
    chosen.warm = 0
    with working_folder(chosen.folder) as folder:
        by_seed: dict[int, dict[str, list[dict[str, Any]]]] = {}
        for seed in range(chosen.seeds):
            file = folder / f"objective-{seed}.json"
            if not file.exists():
                sides = alternate(the_sides(chosen, folder, seed), chosen, folder, f"objective-{seed}")
                file.write_text(json.dumps({side.name: side.rounds for side in sides}), "utf-8")
            by_seed[seed] = json.loads(file.read_text("utf-8"))
        show(by_seed, chosen.kl_coef, the_sides(chosen, folder, 0), folder)


def show(by_seed: dict[int, dict[str, list[dict[str, Any]]]], coef: float, sides: list[Side], folder: Path) -> None:
    """A row for each seed and side at equal episodes; then at equal seconds."""
    sides = [side for side in sides if all(side.name in rounds for rounds in by_seed.values())]
    points = len(values(next(iter(by_seed.values()))[sides[0].name], coef))
    head = ["seed", "side", *(f"{WINDOW * at + 1}-{WINDOW * (at + 1)}" for at in range(points)), "KL at the end", "s"]
    table = [head]
    for seed, rounds in by_seed.items():
        for side in sides:
            rows = rounds[side.name]
            cells = [f"{value:.2f}" for value in values(rows, coef)]
            last = f"{statistics.fmean(row['kl'] for row in rows[-WINDOW:]):.1f}"
            table.append([str(seed), side.name, *cells, last, f"{sum(row['seconds'] for row in rows):.0f}"])
    title = f"Score less {coef} KL, by iterations: mlx-ppo and TRL"
    report(title, sides, table, folder, "objective", coef=coef, by_seed=by_seed)
    if len(sides) == 2:
        marks = [30, 60, 120, 180, 240, 300]
        rows = [["seed", *(f"{mark} s" for mark in marks)]]
        for seed, rounds in by_seed.items():
            pairs = [[f"{at_time(rounds[side.name], coef, mark):.2f}" for side in sides] for mark in marks]
            rows.append([str(seed), *(", ".join(pair) for pair in pairs)])
        print("\n".join(["By seconds of iterations (mlx-ppo, TRL):", "", *markdown(rows)]))


if __name__ == "__main__":
    main()
