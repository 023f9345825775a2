"""mlx-lm-lora's GRPO, a step a turn. Runs in the environment of the mlx peers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turns import Turns

TURNS = Turns()
if TURNS.order["same_blas"]:
    from same_blas import load_same_blas

    load_same_blas()

import mlx.core as mx  # noqa: E402
import mlx.optimizers  # noqa: E402
from mlx_lm import load  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from mlx_lm_lora.trainer import grpo_trainer  # noqa: E402
from rule import score  # noqa: E402


class Reports:
    """What the trainer calls after a step."""

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        tokens = round(info["train_average_generated_tokens"] * TURNS.order["group"])
        TURNS.done(score=info["train_total_rewards_mean"], kl=info["train_kl"], tokens=tokens)


def rule(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return score(prompts, completions)


def batches(*given: Any, **named: Any) -> Iterator[Any]:
    """The trainer's own batches, each when its turn comes."""
    for batch in grpo_trainer.iterate_grpo_batches(*given, **named):
        TURNS.wait()
        TURNS.phase("rollout")
        yield batch


def mark_phases() -> None:
    """Note where sampling ends."""
    sample = grpo_trainer.generate_grpo

    def sampling(*given: Any, **named: Any) -> Any:
        found = sample(*given, **named)
        TURNS.phase("score and update")
        return found

    grpo_trainer.generate_grpo = sampling


def main() -> None:
    order: dict[str, Any] = TURNS.order
    mark_phases()
    mx.random.seed(order["seed"])
    model, tokenizer = load(order["model"])
    tokenizer._eos_token_ids = set()  # nothing ends a completion before its bound
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 8, "scale": 2.0, "dropout": 0.0})
    reference, _ = load(order["model"])
    prompts = json.loads(Path(order["prompts"]).read_text("utf-8"))
    arguments = grpo_trainer.GRPOTrainingArgs(
        batch_size=1,
        iters=1_000_000,
        steps_per_report=1,
        group_size=order["group"],
        max_completion_length=order["tokens"],
        beta=order["kl_coef"],
        epsilon=0.2,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
    )
    grpo_trainer.train_grpo(
        model,
        reference,
        tokenizer,
        mlx.optimizers.AdamW(learning_rate=order["learning_rate"]),
        [(prompt, [], "", "") for prompt in prompts],
        reward_funcs=[rule],
        args=arguments,
        iterate_batches=batches,
        training_callback=Reports(),
        end_answer_token="",
    )


main()
