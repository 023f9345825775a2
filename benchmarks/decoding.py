"""Where the seconds of decoding go on a CPU, beside what the machine could do: a table.

    python benchmarks/decoding.py [CONFIG] [--set section.key=value ...] [--rounds 5]

Decodes the responses of one iteration of a run in this process, on one BLAS thread, and takes the seconds of each part,
the median of the rounds. The limit of the products is their operations at this machine's speed in a large product, or
reading their weights once a step at its speed in a copy, whichever is longer. Only for models that
`mlx_ppo.compute.cpu.steps` decodes.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

from mlx_ppo.bundle import example_config
from mlx_ppo.compute.cpu import engine, steps, threads
from mlx_ppo.compute.cpu.common_blocks import output_of
from mlx_ppo.compute.machine import gigabytes, gigaflops
from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.data.prompts import load_prompts
from mlx_ppo.models.roles import Loading, Roles, load_roles
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.stages import decoding
from mlx_ppo.stages.rollout import Asked, generate, sampling

READ, LAYERS, OUTPUT, ATTENTION, DRAWING, ROOM, REST = (
    "reading prompts", "products of the layers", "output layer", "attention", "drawing", "making room", "the rest",
)  # fmt: skip


class Clock:
    """Seconds by part, each without what other parts took inside it."""

    def __init__(self) -> None:
        """Nothing was counted."""
        self.seconds: dict[str, float] = {}
        self._inside = [0.0]

    def counted(self, owner: Any, name: str, part: str) -> None:
        """Count a function's time as a part's."""
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def timed(*given: Any, **named: Any) -> Any:
            self._inside.append(0.0)
            begun = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                took = time.perf_counter() - begun
                self.seconds[part] = self.seconds.get(part, 0.0) + took - self._inside.pop()
                self._inside[-1] += took

        setattr(owner, name, timed)


def main() -> None:
    """Decode, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", nargs="?", type=Path, default=example_config())
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    config = read_config(TrainConfig, given.config, tuple(given.overrides))
    roles, policy, _ = load_roles(config.model_copy(update={"reward": ()}), Loading(critic=False))
    trunk, section = roles.trunk, config.rollout
    if not trunk.capabilities.steps:
        sys.exit(f"decoding.py: {config.model.path.name} isn't decoded by numpy and BLAS")
    clock, counts = instrumented(), [0, 0]

    def on_tokens(count: int) -> None:
        counts[:] = counts[0] + count, counts[1] + 1

    asked = first_prompts(roles, config)
    how = sampling(section, Choices.pinned(config), config.run.seed, "rollout")
    rounds, totals = list[dict[str, float]](), list[float]()
    with threads.choosing(1):
        for _ in range(1 + given.rounds):
            clock.seconds, counts[:] = {}, [0, 0]
            begun = time.perf_counter()
            generate(trunk, policy, asked, how, on_tokens)
            totals.append(time.perf_counter() - begun)
            rounds.append({**clock.seconds, REST: totals[-1] - sum(clock.seconds.values())})
        table(trunk, counts, rounds[1:], totals[1:])
    roles.close()


def instrumented() -> Clock:
    """Count what decodes."""
    clock = Clock()
    for owner, name, part in (
        (decoding.Decoder, "_prefill", READ),
        (decoding.Decoder, "refill", ROOM),
        (decoding, "keep_rows", ROOM),
        (steps.Steps, "_attach", ROOM),
        (steps._Linear, "__call__", LAYERS),
        (steps.Steps, "logits", OUTPUT),
        (steps.Steps, "_attend", ATTENTION),
        (engine, "sample", DRAWING),
    ):
        clock.counted(owner, name, part)
    return clock


def first_prompts(roles: Roles, config: TrainConfig) -> Asked:
    """As many prompts as an iteration has, the file's first ones."""
    data = config.data
    found = load_prompts(
        data.prompts,
        roles.trunk.tokenizer,
        max_tokens=data.max_prompt_tokens,
        overlong=data.overlong,
        columns=data.columns,
    ).prompts[: config.rollout.prompts]
    return Asked([prompt.tokens for prompt in found], range(len(found)), [prompt.record for prompt in found])


def table(trunk: Trunk, counts: list[int], rounds: list[dict[str, float]], totals: list[float]) -> None:
    """Print the parts; `counts`: tokens, and the steps that sampled them."""
    (tokens, turns), took = counts, median(totals)
    flops, copied = gigaflops() * 1e9, gigabytes() * 1e9
    output = output_of(trunk).weight.size
    layers = sum(array.size for name, array in trunk.base.items() if array.ndim == 2 and ".layers." in name)
    limits = {
        part: max(2 * weights * tokens / flops, 4 * weights * turns / copied)
        for part, weights in ((LAYERS, layers), (OUTPUT, output))
    }
    print(
        f"{tokens} tokens in {turns} steps, {took:.3f} s ({min(totals):.3f} to {max(totals):.3f}), {tokens / took:.0f} "
        f"a second; one thread: {flops / 1e9:.0f} GFLOP/s, {copied / 1e9:.0f} GB/s\n"
    )
    print("| part | seconds | share | limit of the machine |\n|---|---|---|---|")
    for part in (READ, LAYERS, OUTPUT, ATTENTION, DRAWING, ROOM, REST):
        seconds = median(found.get(part, 0.0) for found in rounds)
        limit = f"{limits[part]:.3f}" if part in limits else ""
        print(f"| {part} | {seconds:.3f} | {seconds / took:.0%} | {limit} |")


if __name__ == "__main__":
    main()
