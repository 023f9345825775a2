"""Tokens a second of a rollout, beside mlx-lm's batch generation; float32, temperature 1, the CPU.

    python benchmarks/peers/generation_against_mlx_lm.py --folder /somewhere

`equal`: prompts of 8 to 64 tokens, no end of sequence, so that everybody's responses have the same length. `natural`:
chats, responses that end where the model ends them, bounded at twice that length. Only sampled tokens count; reading
the prompts is part of the time. mlx-lm runs with the project's BLAS loaded before it, and as pip installs it.
"""

import statistics
from typing import Any

from alternate import Side, alternate, parser, report, said, working_folder
from environments import model_of, prepare, python_of

TASKS = ("equal-8", "equal-32", "natural-8", "natural-32")
LENGTHS = [8, 64, 16, 48, 24, 56, 32, 40] * 4


def speeds(side: Side, task: str) -> list[float]:
    """Tokens a second in each round."""
    return [row["tokens"] / row["seconds"] for row in side.counted(task)]


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--tokens", type=int, default=64, help="response length")
    options.add_argument("--tasks", default=",".join(TASKS), help="comma-separated: kind, and number of sequences")
    chosen = options.parse_args()
    tasks = chosen.tasks.split(",")
    with working_folder(chosen.folder) as folder:
        model = (chosen.model or model_of(folder)).resolve()
        prepared = prepare(folder, model, "generation", lengths=LENGTHS, chats=len(LENGTHS))
        order: dict[str, Any] = {"model": str(model), "prepared": str(prepared), "tokens": chosen.tokens}
        peer, worker = python_of(folder, "mlx-lm"), "worker_generation.py"
        sides = [
            Side("mlx-ppo", python_of(folder, "mlx-ppo"), worker, order | {"by": "mlx-ppo"}),
            Side("mlx-lm with our BLAS", peer, worker, order | {"by": "mlx-lm", "same_blas": True}),
            Side("mlx-lm as installed", peer, worker, order | {"by": "mlx-lm", "same_blas": False}),
        ]
        sides[0].lacks = "a bound of its own for each response"
        for side in sides:
            side.warm = 0  # the workers warm up before the first round
        sides[2].limit, sides[2].tasks = 1, tuple(task for task in tasks if task.startswith("equal"))
        sides = alternate(sides, chosen, folder, "generation", tasks)
        table = [["task", "side", "tokens/s, median (range)", f"{sides[0].name} is faster by"]]
        ratios = {}
        for task in tasks:
            own = speeds(sides[0], task)  # of mlx-ppo, or whichever is first where it was left out
            for side in sides:
                if found := speeds(side, task):
                    ratio = statistics.median(own) / statistics.median(found)
                    ratios[f"{task}: {side.name}"] = ratio
                    table.append([task, side.name, said(found, 1), f"{ratio:.2f}"])
        report("Generation: mlx-ppo and mlx-lm", sides, table, folder, "generation", ratios=ratios)


if __name__ == "__main__":
    main()
