"""Completions that several processes on this machine write, each for its part of the prompts."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from mlx_ppo.compute.adapted import count_of
from mlx_ppo.compute.cpu import threads
from mlx_ppo.config.parallel import ParallelSection
from mlx_ppo.memory.plan import RUNTIME
from mlx_ppo.memory.processes import first_threads, worthwhile
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.parallel import WORKER, fitting
from mlx_ppo.runs.targets import Target, load_target
from mlx_ppo.runtime.group import ALONE, Group
from mlx_ppo.runtime.local_group import local_group
from mlx_ppo.stages.records import Rollout
from mlx_ppo.stages.rollout import Asked, Sampling, generate_together

_PASS = 2  # multiplications for each parameter and token


class _Together(NamedTuple):
    """Who writes, and on what."""

    trunk: Trunk
    group: Group


class Writers:
    """This process and, where much is to be written, others. Use it as a context manager, at the end of which they end.

    A completion doesn't depend on how many there are.
    """

    def __init__(self, processes: int = 0) -> None:
        """So many; 0: as many as are worthwhile for the first that is written, and fit into memory."""
        self._asked = processes
        self._group: Group | None = None
        self._open = ExitStack()

    def __enter__(self) -> "Writers":
        """Nobody is started yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the others."""
        self._open.close()

    def write(self, path: Path, target: Target, asked: Asked, how: Sampling) -> Rollout:
        """Answer prompts.

        Args:
            path: what `target` was loaded from.
            target: the model.
            asked: the prompts.
            how: lengths, temperature, random draws.
        Raises:
            ProcessLost: another process is gone.
            ConfigError: there is no memory for as many as are asked for.
        """
        if self._group is None:
            self._group = self._started(target, asked, how)
        if self._group.size > 1:
            prompts = [list(prompt) for prompt in asked.prompts]
            order = {"model": str(path.absolute()), "prompts": prompts, "positions": list(asked.positions)}
            self._group.told({**order, "how": how._asdict()})
        return generate_together(_Together(target.trunk, self._group), target.weights, asked, how)

    def _started(self, target: Target, asked: Asked, how: Sampling) -> Group:
        parameters = count_of(target.trunk.base.values())
        tokens = sum(map(len, asked.prompts)) + len(asked.prompts) * how.samples_per_prompt * how.max_tokens
        count = self._asked or 1
        if not self._asked and threads.gaining(parameters) == 1:  # of a large model each would read the weights anew
            count = worthwhile(_PASS * parameters * tokens, len(asked.prompts))
        each = RUNTIME + sum(array.nbytes for array in (*target.trunk.base.values(), *target.weights.arrays.values()))
        count = fitting(count, lambda _: each, asked="--processes" if self._asked else None)
        if count == 1:
            return ALONE
        share = {"threads": first_threads(parameters, count)}
        patience = ParallelSection().patience
        self._open.enter_context(threads.choosing(share["threads"]))
        group = self._open.enter_context(local_group(WORKER, {}, processes=count, patience=patience))
        group.told(share)
        return group


def follow(group: Group) -> None:
    """Write what the process that leads says, this one's part of it, until that one ends."""
    loaded: tuple[str, Target] | None = None
    with threads.choosing(group.told()["threads"]):
        while True:
            order = group.told()
            if loaded is None or loaded[0] != order["model"]:
                loaded = None  # or two models would be in memory
                loaded = order["model"], load_target(Path(order["model"]))
            target, prompts = loaded[1], [tuple(prompt) for prompt in order["prompts"]]
            asked = Asked(prompts, order["positions"], _no_records(prompts))
            how = Sampling(**{**order["how"], "seed_parts": tuple(order["how"]["seed_parts"])})
            generate_together(_Together(target.trunk, group), target.weights, asked, how)


def _no_records(prompts: Sequence[tuple[int, ...]]) -> list[dict[str, object]]:
    return [{} for _ in prompts]
