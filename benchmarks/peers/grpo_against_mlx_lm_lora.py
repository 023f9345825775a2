"""One GRPO step beside mlx-lm-lora's: 8 completions of one prompt, LoRA of rank 8 on all layers, one epoch; the CPU.

    python benchmarks/peers/grpo_against_mlx_lm_lora.py --folder /somewhere

SmolLM2-135M-Instruct in float32, a prompt of 32 tokens, 48 new ones (nothing ends a completion before), a KL penalty to
the unadapted model, a Python function as the reward. mlx-lm-lora runs with the project's BLAS loaded before it, and as
pip installs it.
"""

import statistics
from typing import Any

from alternate import Side, alternate, parser, phases, report, said, working_folder
from environments import model_of, prepare, python_of
from ppo_against_trl import GIB, RULE


def our_config(order: dict[str, Any]) -> dict[str, Any]:
    """The configuration of `mlx-ppo train` for the same work."""
    return {
        "model": {"train": "lora"},
        "lora": {"layers": 0, "rank": 8, "scale": 2.0},
        "rollout": {
            "prompts": 1,
            "samples_per_prompt": order["group"],
            "max_tokens": order["tokens"],
            "temperature": 1.0,
        },
        "reward": [{"kind": "function", "function": f"{RULE}:score"}],
        "ppo": {"advantage": "grpo", "epochs": 1, "minibatches": 1, "clip_high": 0.2},
        "kl": {"coef": order["kl_coef"]},
        "optimizer": {"learning_rate": order["learning_rate"]},
    }


def main() -> None:
    options = parser(__doc__ or "", rounds=5)
    options.add_argument("--group", type=int, default=8, help="completions of the prompt")
    options.add_argument("--tokens", type=int, default=48, help="completion length")
    chosen = options.parse_args()
    with working_folder(chosen.folder) as folder:
        model = (chosen.model or model_of(folder)).resolve()
        prepared = prepare(folder, model, "grpo", lengths=[32] * 8)
        order: dict[str, Any] = {
            "model": str(model),
            "prompts": str(prepared / "prompts.json"),
            "group": chosen.group,
            "tokens": chosen.tokens,
            "kl_coef": 0.05,
            "learning_rate": 1e-4,
            "seed": 0,
        }
        peer, worker = python_of(folder, "mlx-lm"), "worker_mlx_lm_lora.py"
        lacks = "batched sampling of one prompt's completions (it decodes and trains them one by one)"
        sides = [
            Side("mlx-ppo", python_of(folder, "mlx-ppo"), "worker_ppo.py", order | {"config": our_config(order)}),
            Side("mlx-lm-lora with our BLAS", peer, worker, order | {"same_blas": True}, lacks),
            Side("mlx-lm-lora as installed", peer, worker, order | {"same_blas": False}, lacks, warm=0, limit=1),
        ]
        sides = alternate(sides, chosen, folder, "grpo")
        table = [["side", "s a step, median (range)", "phases, median s", "peak GiB", f"{sides[0].name} is faster by"]]
        own = statistics.median(row["seconds"] for row in sides[0].counted())
        for side in sides:
            seconds = [row["seconds"] for row in side.counted()]
            peak = f"{side.rounds[-1]['peak_rss'] / GIB:.2f}"
            table.append([side.name, said(seconds), phases(side), peak, f"{statistics.median(seconds) / own:.2f}"])
        report("GRPO: mlx-ppo and mlx-lm-lora", sides, table, folder, "grpo")


if __name__ == "__main__":
    main()
