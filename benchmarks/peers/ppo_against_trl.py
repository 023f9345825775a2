"""PPO beside TRL 1.12's on torch, both on the CPU in float32: seconds of an iteration and peak memory.

    python benchmarks/peers/ppo_against_trl.py --folder /somewhere
    python benchmarks/peers/ppo_against_trl.py --folder /somewhere --reward    # time to the same reward

An iteration: 8 prompts of 32 tokens, responses of 48 (nothing ends one before), 4 epochs of one minibatch. Policy,
value model, reward model and reference are SmolLM2-135M-Instruct. Peak memory is the process's highest resident set
since it began, loading included.

With `--reward` all learn the same task with the same function as the reward, from the same prompts, with the same
learning rates and KL coefficient; what counts is the time until the mean score of the last iterations reaches a target.
"""

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from alternate import Side, alternate, parser, phases, report, said, working_folder
from environments import model_of, order_of, prepare, python_of

RULE = Path(__file__).with_name("rule.py")
GIB = 2**30
LORA = {"rank": 8, "scale": 2.0}


def our_config(order: dict[str, Any], *, full: bool, reward: dict[str, Any]) -> dict[str, Any]:
    """The configuration of `mlx-ppo train` for the same work; what TRL hasn't is off."""
    return {
        "model": {"train": "full" if full else "lora"},
        "lora": {"layers": 8, **order["lora"]},
        "rollout": {"prompts": order["batch"], "max_tokens": order["tokens"], "temperature": 1.0},
        "reward": [reward],
        "critic": {
            "kind": "head" if full else "adapters",
            "initialise": "policy",
            "learning_rate": order["learning_rate"],
        },
        "ppo": {"epochs": order["epochs"], "minibatches": 1, "clip_high": 0.2, "dual_clip": 0.0, "lambda_critic": 0.95},
        "kl": {"coef": order["kl_coef"]},
        "optimizer": {"learning_rate": order["learning_rate"], "eps": 1e-8},
        "parallel": {"processes": 1},  # only this one's tokenizer never ends a response
    }


def the_order(chosen: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], Path]:
    """What every side is asked for, and the folder with the reward models."""
    model = (chosen.model or model_of(folder)).resolve()
    lengths = [chosen.prompt_tokens] * (64 if chosen.reward else chosen.batch)
    kind = f"ppo-{chosen.prompt_tokens}x{len(lengths)}"
    prepared = prepare(folder, model, kind, lengths=lengths, rewards=True)
    order = order_of(model, prepared, chosen)
    rule = f"{RULE}:score" if chosen.reward else ""
    return order | {"epochs": chosen.epochs, "seed": chosen.seed, "rule": rule}, prepared


def our_sides(chosen: argparse.Namespace, order: dict[str, Any], prepared: Path, python: Path) -> list[Side]:
    """With LoRA, in full, and in full within a memory budget."""
    sides = []
    for name, full, budget in (
        ("mlx-ppo LoRA", False, 0.0),
        ("mlx-ppo full", True, 0.0),
        ("mlx-ppo within budget", True, chosen.budget_gb),
    ):
        own = order | {"lora": LORA, "learning_rate": chosen.full_rate if full else chosen.lora_rate}
        reward: dict[str, Any] = {"kind": "model", "path": str(prepared / f"reward-{'folder' if full else 'adapters'}")}
        if chosen.reward:
            reward = {"kind": "function", "function": order["rule"]}
        config = our_config(own, full=full, reward=reward) | {"memory": {"budget_gb": budget}}
        sides.append(Side(name, python, "worker_ppo.py", own | {"config": config}))
    return sides


def their_sides(chosen: argparse.Namespace, order: dict[str, Any], python: Path) -> list[Side]:
    """With LoRA, in full, and in full with gradient checkpointing (TRL's default)."""
    sides = []
    for name, adapted, checkpointing in (
        ("TRL LoRA", LORA, False),
        ("TRL full", None, False),
        ("TRL checkpointing", None, True),
    ):
        rate = chosen.lora_rate if adapted else chosen.full_rate
        own = order | {"lora": adapted, "checkpointing": checkpointing, "learning_rate": rate}
        models = "three models with LoRA" if adapted else "four models"
        lacks = (
            f"one trunk for all roles ({models}), states kept from the rollout, LoRA on the value model, a memory plan"
        )
        sides.append(Side(name, python, "worker_trl_ppo.py", own, lacks))
    return sides


def compare_iterations(sides: list[Side], folder: Path) -> None:
    """Seconds, phases and memory."""
    seconds = {side.name: [row["seconds"] for row in side.counted()] for side in sides}
    peaks = {side.name: side.rounds[-1]["peak_rss"] for side in sides}
    peers = [side.name for side in sides if side.name.startswith("TRL")]
    best = min(peers, key=lambda name: statistics.median(seconds[name]), default=sides[0].name)
    table = [
        ["side", "s an iteration, median (range)", "phases, median s", "peak GiB", f"times {best}", "of its memory"]
    ]
    for side in sides:
        faster = statistics.median(seconds[best]) / statistics.median(seconds[side.name])
        table.append(
            [
                side.name,
                said(seconds[side.name]),
                phases(side),
                f"{peaks[side.name] / GIB:.2f}",
                f"{faster:.2f}",
                f"{peaks[side.name] / peaks[best]:.2f}",
            ]
        )
    report("PPO: mlx-ppo and TRL", sides, table, folder, "ppo", fastest_peer=best)


def time_to(rows: list[dict[str, Any]], target: float, window: int) -> tuple[int, float] | None:
    """Iterations and seconds until the mean score of the last `window` iterations reaches the target."""
    elapsed = list(itertools.accumulate(row["seconds"] for row in rows))
    for end in range(window, len(rows) + 1):
        if statistics.fmean(row["score"] for row in rows[end - window : end]) >= target:
            return end, elapsed[end - 1]
    return None


def compare_rewards(sides: list[Side], folder: Path, target: float, window: int) -> None:
    """Time to the same reward; the first iteration counts, since it learns."""
    table = [["side", "first scores", "last scores", "KL at the end", "iterations to the target", "s to the target"]]
    reached = {}
    for side in sides:
        scores = [row["score"] for row in side.rounds]
        found = reached[side.name] = time_to(side.rounds, target, window)
        first, last = statistics.fmean(scores[:window]), statistics.fmean(scores[-window:])
        cells = [f"{first:.3f}", f"{last:.3f}", f"{side.rounds[-1]['kl']:.2f}"]
        table.append([side.name, *cells, *([str(found[0]), f"{found[1]:.1f}"] if found else ["not reached", ""])])
    title = f"Time to a mean score of {target} over {window} iterations: mlx-ppo and TRL"
    report(title, sides, table, folder, "ppo-reward", target=target, window=window, reached=reached)


def main() -> None:
    options = parser(__doc__ or "", rounds=5)
    options.add_argument("--reward", action="store_true", help="time to the same reward instead")
    options.add_argument("--target", type=float, default=0.0, help="the score to reach (--reward)")
    options.add_argument("--window", type=int, default=5, help="iterations whose mean score counts (--reward)")
    options.add_argument("--batch", type=int, default=8, help="prompts an iteration")
    options.add_argument("--prompt-tokens", type=int, default=32)
    options.add_argument("--tokens", type=int, default=48, help="response length")
    options.add_argument("--epochs", type=int, default=4)
    options.add_argument("--lora-rate", type=float, default=1e-4, help="learning rate with LoRA, of every side")
    options.add_argument("--full-rate", type=float, default=1e-5, help="learning rate without, of every side")
    options.add_argument("--budget-gb", type=float, default=3.6, help="GiB of the full fine-tuning within a budget")
    options.add_argument("--kl-coef", type=float, default=0.05)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    with working_folder(chosen.folder) as folder:
        name = "ppo-reward" if chosen.reward else "ppo"
        order, prepared = the_order(chosen, folder)
        sides = our_sides(chosen, order, prepared, python_of(folder, "mlx-ppo"))
        sides += their_sides(chosen, order, python_of(folder, "trl"))
        sides = alternate(sides, chosen, folder, name)
        if chosen.reward:
            compare_rewards(sides, folder, chosen.target, chosen.window)
        else:
            compare_iterations(sides, folder)


if __name__ == "__main__":
    main()
