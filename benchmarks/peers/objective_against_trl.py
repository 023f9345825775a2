"""The objective that PPO maximises, score less penalty, by iterations and by seconds, beside TRL 1.12's PPO.

    python benchmarks/peers/objective_against_trl.py --folder /somewhere [--seeds 0 1 2]

TRL's classic task: continue an opening of a few tokens in a few more, with a positive sentiment. Both learn from the
same openings, with the same reward, penalty and temperature; each has the settings that suit it: ours has shorter
horizons of the advantages, as docs/frontier.md advises, TRL its defaults, and its rate is the better one of two.
"""

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from alternate import Side, alternate, parser, report, working_folder
from environments import model_of, order_of, prepare, python_of

REWARD = f"{Path(__file__).with_name('rule.py')}:sentiment"
OPENINGS = 512
LORA = {"rank": 16, "scale": 2.0}


def our_config(chosen: argparse.Namespace) -> dict[str, Any]:
    """The configuration of `mlx-ppo train`."""
    return {
        "model": {"train": "lora"},
        "lora": {"layers": chosen.layers, **LORA},
        "rollout": {"prompts": chosen.batch, "max_tokens": chosen.tokens, "temperature": 1.0},
        "reward": [{"kind": "function", "function": REWARD}],
        "critic": {"kind": "adapters", "initialise": "policy", "learning_rate": chosen.critic_rate},
        "ppo": {
            "epochs": chosen.epochs,
            "minibatches": chosen.minibatches,
            "lambda_policy": chosen.lambda_policy,
            "value_clip": 0.0,
        },
        "kl": {"coef": chosen.kl_coef},
        "optimizer": {"learning_rate": chosen.our_rate},
        "parallel": {"processes": 1},
    }


def the_sides(chosen: argparse.Namespace, folder: Path, seed: int) -> list[Side]:
    """Ours and TRL's, for a seed."""
    model = (chosen.model or model_of(folder)).resolve()
    prepared = prepare(folder, model, f"openings-{chosen.opening}", lengths=[chosen.opening] * OPENINGS)
    order = order_of(model, prepared, chosen) | {"seed": seed, "rule": REWARD}
    theirs = order | {"epochs": 4, "lora": LORA, "checkpointing": False, "learning_rate": chosen.their_rate}
    return [
        Side("mlx-ppo", python_of(folder, "mlx-ppo"), "worker_ppo.py", order | {"config": our_config(chosen)}),
        Side("TRL", python_of(folder, "trl"), "worker_trl_ppo.py", theirs),
    ]


def objective(side: Side, coef: float, window: int) -> list[tuple[float, float]]:
    """Seconds so far, and the mean of score - coef KL over the last iterations, from the first full window on."""
    elapsed = list(itertools.accumulate(row["seconds"] for row in side.rounds))
    values = [row["score"] - coef * row["kl"] for row in side.rounds]
    ends = range(window, len(values) + 1)
    return [(elapsed[end - 1], statistics.fmean(values[end - window : end])) for end in ends]


def compared(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> tuple[int, int, int, int]:
    """At how many iterations ours is higher, and of how many; then at how many of their moments, and of how many."""
    equal = [one[1] > other[1] for one, other in zip(ours, theirs, strict=False)]
    before = [(sum(seconds <= moment for seconds, _ in ours), value) for moment, value in theirs]
    moments = [ours[done - 1][1] > value for done, value in before if done]
    return sum(equal), len(equal), sum(moments), len(moments)


def main() -> None:
    options = parser(__doc__ or "", rounds=14)
    options.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    options.add_argument("--batch", type=int, default=16, help="openings an iteration")
    options.add_argument("--opening", type=int, default=6, help="tokens of an opening")
    options.add_argument("--tokens", type=int, default=16, help="response length")
    options.add_argument("--kl-coef", type=float, default=0.05)
    options.add_argument("--their-rate", type=float, default=1e-3)
    options.add_argument("--our-rate", type=float, default=1e-3)
    options.add_argument("--critic-rate", type=float, default=1e-3)
    options.add_argument("--layers", type=int, default=16, help="blocks with adapters, of ours; TRL's has them on all")
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--minibatches", type=int, default=2)
    options.add_argument("--lambda-policy", type=float, default=0.8)
    options.add_argument("--window", type=int, default=4, help="iterations that a mean is taken over")
    chosen = options.parse_args()
    table = [["seed", "side", "s an iteration", "score, KL at first and last", "score - b KL by window"]]
    kept: list[Side] = []
    with working_folder(chosen.folder) as folder:
        for seed in chosen.seeds:
            sides = alternate(the_sides(chosen, folder, seed), chosen, folder, f"objective-{seed}")
            kept += sides
            curves = [objective(side, chosen.kl_coef, chosen.window) for side in sides]
            for side, curve in zip(sides, curves, strict=True):
                side.name = f"{side.name} {seed}"
                seconds = statistics.median(row["seconds"] for row in side.rounds)
                ends = [f"{row['score']:.2f}, {row['kl']:.1f}" for row in (side.rounds[0], side.rounds[-1])]
                row = [str(seed), side.name, f"{seconds:.1f}", " to ".join(ends)]
                table.append([*row, " ".join(f"{value:.2f}" for _, value in curve[:: chosen.window])])
            if len(curves) == 2:
                found = compared(*curves)
                table.append([str(seed), "ours higher", "", f"{found[0]} of {found[1]} iterations",
                              f"{found[2]} of {found[3]} of their moments"])  # fmt: skip
        report("Score less penalty: mlx-ppo and TRL", kept, table, folder, "objective")


if __name__ == "__main__":
    main()
