"""Iterations at the largest shapes of a run, whose results are thrown away: what they really need, and how long."""

import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.data.random import philox
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.memory.budget import keeping_to
from mlx_ppo.memory.choices import Shapes
from mlx_ppo.memory.keeping import is_tight, limits_of
from mlx_ppo.memory.plan import Plan
from mlx_ppo.models.roles import Loading, Roles, load_roles
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.runtime.phases import Meter, metering, phase
from mlx_ppo.stages.iteration import iterate
from mlx_ppo.stages.rollout import Asked
from mlx_ppo.stages.state import initial_state


@dataclass(frozen=True)
class Measured:
    """One iteration."""

    peaks: dict[str, int]  # bytes in mlx, by phase
    seconds: dict[str, float]  # by phase
    prefill: float  # seconds of the phase "rollout" until each batch has its first tokens
    total: float  # seconds of all of it, also between the phases
    states: tuple[int, int]  # bytes of optimizer states before and after it


class _FirstTokens:
    """Adds up how long the batches of a rollout waited for their first tokens."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._batch = 0.0  # when the batch began that has its first tokens
        self.seconds = 0.0

    def stage(self, name: str) -> None:
        """A stage begins."""

    def tokens(self, count: int) -> None:
        """Tokens have been sampled."""
        if self._meter.began != self._batch:
            self._batch = self._meter.began
            self.seconds += time.monotonic() - self._batch


class _Same:
    """A plan that doesn't change."""

    def __init__(self, choices: Choices) -> None:
        self._choices = choices

    def now(self) -> Choices:
        """The choices in effect."""
        return self._choices

    next_step = now


class _Endless:
    """A tokenizer without an end of sequence, so that every response has its full length."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_ids: frozenset[int] = frozenset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def dry_run(config: TrainConfig, plan: Plan, shapes: Shapes, *, iterations: int) -> list[Measured]:
    """Load the models, sample, score and update as a run would, with prompts of chance and full responses.

    Args:
        config: the run's.
        plan: its choices hold, and mlx's limits are the plan's.
        shapes: of the run; an iteration has the configured number of responses.
        iterations: how many; in the first one there are no optimizer states yet.
    Raises:
        UserError: whatever is wrong with the models, or went wrong.
    """
    config = config.model_copy(  # from the first iteration on all is trained, as later in a run
        update={"critic": config.critic.model_copy(update={"warmup_iterations": 0})}
    )
    loading = Loading(compact=plan.choices.compact, evict=plan.choices.evict)
    measuring = metering(limits_of(plan.phases), clearing=is_tight(plan))
    with keeping_to(plan), measuring as meter:
        with phase("load"):
            roles, policy, critic = load_roles(config, loading)
        try:
            roles.trunk.tokenizer = _Endless(roles.trunk.tokenizer)
            state = initial_state(config, policy, critic)
            del policy, critic
            found = []
            for number in range(iterations):
                before, started, first = state.moments, time.monotonic(), _FirstTokens(meter)
                iterate(config, roles, state, _drawn(config, roles, shapes, number), _Same(plan.choices), first)
                mx.synchronize()
                total = time.monotonic() - started
                found.append(Measured(meter.peaks, meter.seconds, first.seconds, total, (before, state.moments)))
                meter.take()
            return found
        finally:
            roles.close()


def _drawn(config: TrainConfig, roles: Roles, shapes: Shapes, number: int) -> Asked:
    """Prompts of chance, of the longest prompt's length."""
    count = config.rollout.prompts
    drawn = philox("dry run", number).integers(0, roles.trunk.tokenizer.vocab_size, (count, shapes.prompt))
    return Asked([tuple(row) for row in drawn.tolist()], range(count), [{"prompt": ""}] * count)
