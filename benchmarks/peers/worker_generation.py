"""Samples responses with the project or with mlx-lm, as it is told. A task is `equal-8`, `natural-32` and the like."""

import json
from pathlib import Path
from typing import Any

from turns import Turns

TURNS = Turns()
if TURNS.order["by"] == "mlx-ppo":
    import mlx_ppo  # noqa: F401  loads the optimised BLAS before mlx
elif TURNS.order["same_blas"]:
    from same_blas import load_same_blas

    load_same_blas()

import mlx.core as mx  # noqa: E402


class Ours:
    """`mlx_ppo.stages.rollout.generate`, with the trunk as it is: no adapters, no states kept."""

    def __init__(self, model: Path) -> None:
        from mlx_ppo.models.load import load_trunk

        self.trunk = load_trunk(model)
        self.eos_ids = self.trunk.tokenizer.eos_ids

    def sample(self, prompts: list[list[int]], max_tokens: int, stopping: bool, seed: int) -> int:
        from mlx_ppo.models.adapters import Weights
        from mlx_ppo.stages.rollout import Asked, Sampling, generate

        self.trunk.tokenizer.eos_ids = self.eos_ids if stopping else frozenset()
        asked = Asked([tuple(prompt) for prompt in prompts], range(len(prompts)), [{}] * len(prompts))
        rollout = generate(self.trunk, Weights({}), asked, Sampling(("benchmark", seed), max_tokens))
        return sum(len(response) for response in rollout.responses)


class Theirs:
    """`mlx_lm.generate.batch_generate`, which batches as it does by default."""

    def __init__(self, model: Path) -> None:
        from mlx_lm import load

        self.model, self.tokenizer = load(str(model))
        self.eos_ids = set(self.tokenizer.eos_token_ids)

    def sample(self, prompts: list[list[int]], max_tokens: int, stopping: bool, seed: int) -> int:
        from mlx_lm.generate import batch_generate
        from mlx_lm.sample_utils import make_sampler

        mx.random.seed(seed)
        self.tokenizer._eos_token_ids = self.eos_ids if stopping else set()
        found = batch_generate(
            self.model,
            self.tokenizer,
            prompts,
            max_tokens=max_tokens,
            sampler=make_sampler(temp=1.0),
            return_token_ids=True,
        )
        return sum(len(row) for row in found.token_ids)


def main() -> None:
    order: dict[str, Any] = TURNS.order
    model, prepared = Path(order["model"]), Path(order["prepared"])
    side = Ours(model) if order["by"] == "mlx-ppo" else Theirs(model)
    prompts = {
        "equal": json.loads((prepared / "prompts.json").read_text("utf-8")),
        "natural": json.loads((prepared / "chats.json").read_text("utf-8")),
    }
    side.sample(prompts["equal"][:2], 2, False, 0)
    seed = 0
    while True:
        kind, _, count = TURNS.wait().partition("-")
        seed += 1
        bound = order["tokens"] * (2 if kind == "natural" else 1)
        tokens = side.sample(prompts[kind][: int(count)], bound, kind == "natural", seed)
        TURNS.done(tokens=tokens)


main()
