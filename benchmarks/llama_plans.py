"""What Llama-architecture models of 1, 3 and 8 billion parameters would need on Macs: computed, not measured.

    python benchmarks/llama_plans.py

PPO with LoRA of rank 16 on all layers of one shared trunk, critic adapters and reward adapters beside the policy's; 32
prompts of up to 256 tokens and responses of up to 256, minibatches of 8. The budget is what `default_budget` would give
on an idle Mac: 0.9 of a working set of three quarters of its memory.
"""

from pathlib import Path
from typing import Any

import mlx_ppo  # noqa: F401  loads the optimised BLAS before mlx
from mlx_ppo.compute.choose import engine_for, using
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.plan import GIB, Plan, make_plan
from mlx_ppo.memory.starting import accountant_of

COMMON = {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 128256, "torch_dtype": "bfloat16"}
COMMON |= {"rope_theta": 500000.0, "num_key_value_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
HEAD = {"1B": 64, "3B": 128, "8B": 128}
MEMORY = (8, 16, 24, 36, 64)  # GB


def config(reward: Path) -> TrainConfig:
    """The run that is planned."""
    return TrainConfig.model_validate(
        {
            "model": {"path": Path("a-model-that-is-not-here")},
            "lora": {"rank": 16},
            "data": {"prompts": Path("prompts.jsonl"), "eval_count": 32},
            "rollout": {"prompts": 32, "max_tokens": 256},
            "reward": [{"kind": "model", "path": reward}],
            "ppo": {"minibatches": 4},
        }
    )


def cell(plan: Plan) -> str:
    """Gibibytes of the process, and what was made smaller for it."""
    if not plan.fits:
        return f"needs {plan.process / 0.95 / GIB:.1f}"
    choices = plan.choices
    said = f"{plan.process / GIB:.1f}: {choices.rollout_batch}/{choices.score_batch}/{choices.micro_batch}"
    said += ", checkpointing" if choices.checkpointing else ""
    return said + (", 8-bit cache" if choices.kv_cache == "8-bit" else "")


def main() -> None:
    asked = config(Path("a-reward-model-that-is-not-here"))
    print("| model | " + " | ".join(f"{size} GB" for size in MEMORY) + " |")
    print("|---|" + "---|" * len(MEMORY))
    with using(engine_for("gpu")):
        for name, sizes in MODELS.items():
            for form in ("bf16", "4-bit"):
                given = COMMON | sizes | {"head_dim": HEAD[name], "tie_word_embeddings": name != "8B"}
                if form == "4-bit":
                    given["quantization"] = {"bits": 4, "group_size": 64}
                accountant = accountant_of(asked, given, 256)
                plans = [make_plan(accountant, asked, int(0.9 * 0.75 * size * 1e9)) for size in MEMORY]
                print(f"| {name} {form} | " + " | ".join(map(cell, plans)) + " |", flush=True)


if __name__ == "__main__":
    main()
