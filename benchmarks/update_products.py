"""How much of an update's time its matrix products take, and how fast they are against the machine's own rate.

    python benchmarks/update_products.py SMOLLM2_FOLDER [--json FILE] [--rounds N]

PPO with LoRA on the upper 8 layers, critic as adapters; and with all weights trained, critic as a head. 16 prompts of
32 tokens, responses of 48, 4 minibatches, 1 epoch. In each round the update is timed as a run does it, in its second
iteration; then its products alone: those of a trace of the run's own losses and gradients, of the same shapes, layouts
and order, by mlx on the same BLAS, one at a time. The peak is that of a float32 product of 2048 x 2048, measured before
and after them. Shown are the medians of the rounds.
"""

import mlx_ppo  # noqa: F401  loads the optimised BLAS before mlx

# isort: split
import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from mlx_ppo.bench.dry_run import dry_run
from mlx_ppo.bench.operations import flops, read_by_mlx
from mlx_ppo.cli.bench import config_of_folder
from mlx_ppo.compute.machine import gigaflops
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.phases import Accountant, Cost
from mlx_ppo.memory.plan import make_plan
from mlx_ppo.memory.simulator import Product, products
from mlx_ppo.memory.simulator.graph import Tensor
from mlx_ppo.memory.starting import accountant_of
from mlx_ppo.runtime.allocator import keeping_buffers

PROMPT, SIDE = 32, 2048
COMMON = ("rollout.prompts=16", "rollout.max_tokens=48", "ppo.minibatches=4", "ppo.epochs=1", "memory.budget_gb=0")
VARIANTS = {
    "LoRA, upper 8 layers": ("lora.layers=8",),
    "all weights": ("model.train=full", "critic.kind=head"),
}


class Collector(Accountant):
    """Keeps the products of the update instead of predicting memory."""

    def __init__(self, other: Accountant) -> None:
        super().__init__(other.config, other.roles, other.policy, other.critic, other.shapes)
        self.products: list[Product] = []

    def _predict(self, key: tuple[object, ...], function: Callable[..., Any], *arrays: Any) -> Cost:
        if key[0] in ("policy", "critic"):
            with read_by_mlx(self.roles):  # the same products, where a trace sees them
                self.products.extend(products(function, *arrays))
        return Cost()


class Pool:
    """Arrays of given shapes, each made once; a transposed one is a view, as in the run."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, ...], mx.array] = {}

    def like(self, tensor: Tensor) -> mx.array:
        axes = list(range(len(tensor.shape)))
        swapped = [*axes[:-2], axes[-1], axes[-2]]
        made = tensor.operation
        if made is not None and made.name == "Transpose" and list(made.arguments[0]) == swapped:
            return self._stored((*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])).swapaxes(-1, -2)
        return self._stored(tensor.shape)

    def _stored(self, shape: tuple[int, ...]) -> mx.array:
        if shape not in self._arrays:
            self._arrays[shape] = mx.random.normal(shape, key=mx.random.key(len(self._arrays)))
            mx.eval(self._arrays[shape])
        return self._arrays[shape]


def timed(operations: Sequence[Product]) -> float:
    """Seconds of all of them, one after the other, when arrays and buffers are there."""
    pool = Pool()
    work = []
    for operation in operations:
        arrays = [pool.like(tensor) for tensor in operation.inputs]
        if operation.name == "AddMM":
            arrays = [arrays[2], arrays[0], arrays[1]]
        work.append((mx.addmm if operation.name == "AddMM" else mx.matmul, arrays))
    for _ in range(2):
        started = time.perf_counter()
        for function, arrays in work:
            mx.eval(function(*arrays))
    return time.perf_counter() - started


def measured(config: TrainConfig, rounds: int) -> dict[str, float]:
    """Seconds of an update and of its products, and the rates; of each the median of the rounds."""
    accountant = accountant_of(config, None, PROMPT)
    plan = make_plan(accountant, config, None)
    choices = replace(plan.choices, checkpointing=False)
    collector = Collector(accountant)
    collector.phases(choices)
    passes = -(-accountant.shapes.responses // choices.micro_batch) * config.ppo.epochs
    operations = passes * flops(collector.products) / 1e9
    rows = []
    for _ in range(rounds):
        update = dry_run(config, plan, accountant.shapes, iterations=2)[-1].seconds
        gradients, step = update["update policy"] + update["update critic"], update["update step"]
        before = gigaflops(SIDE)
        with keeping_buffers():
            alone = passes * timed(collector.products)
        peak = max(before, gigaflops(SIDE))
        row = {
            "forward and backward, s": gradients,
            "optimizer, s": step,
            "products alone, s": alone,
            "GFLOP": operations,
            "products, GFLOP/s": operations / alone,
            "peak, GFLOP/s": peak,
            "products' rate of the peak": operations / alone / peak,
            "products' share of forward and backward": alone / gradients,
            "products' share of the update": alone / (gradients + step),
        }
        print({key: round(value, 2) for key, value in row.items()}, file=sys.stderr, flush=True)
        rows.append(row)
    return {key: median(row[key] for row in rows) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    rows = {}
    for name, changes in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = config_of_folder(given.model, (*COMMON, *changes), Path(folder))
            rows[name] = measured(config, given.rounds)
        if given.json is not None:
            given.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    print("| update | " + " | ".join(rows) + " |\n|---|" + "---|" * len(rows))
    for key in next(iter(rows.values())):
        print(f"| {key} | " + " | ".join(f"{row[key]:.2f}" for row in rows.values()) + " |")


if __name__ == "__main__":
    main()
