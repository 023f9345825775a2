"""Iterations at the largest shapes of a run, whose results are thrown away: what they really need, and how long."""

import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.data.random import philox
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.memory.budget import keeping_to
from mlx_ppo.memory.choices import Shapes, applied
from mlx_ppo.memory.keeping import is_tight, limits_of
from mlx_ppo.memory.plan import Plan
from mlx_ppo.models.roles import Roles, load_roles
from mlx_ppo.runtime.phases import Meter, metering, phase
from mlx_ppo.stages.advantages import advantages
from mlx_ppo.stages.rollout import generate, sampling
from mlx_ppo.stages.scoring import score
from mlx_ppo.stages.state import State, initial_state
from mlx_ppo.stages.update import update


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

    def __call__(self, count: int) -> None:
        """Tokens have been sampled."""
        if self._meter.began != self._batch:
            self._batch = self._meter.began
            self.seconds += time.monotonic() - self._batch


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
        plan: its choices are applied, and mlx's limits are the plan's.
        shapes: of the run; an iteration has the configured number of responses.
        iterations: how many; in the first one there are no optimizer states yet.
    Raises:
        UserError: whatever is wrong with the models, or went wrong.
    """
    config = applied(config, plan.choices)
    measuring = metering(limits_of(plan.phases), clearing=is_tight(plan))
    with keeping_to(plan), measuring as meter:
        with phase("load"):
            roles, policy, critic = load_roles(config)
        try:
            roles.trunk.tokenizer = _Endless(roles.trunk.tokenizer)
            state = initial_state(config, policy, critic)
            del policy, critic
            found = []
            for number in range(iterations):
                before, started, first = state.moments, time.monotonic(), _FirstTokens(meter)
                _iterate(config, roles, state, shapes, number, first)
                total = time.monotonic() - started
                found.append(Measured(meter.peaks, meter.seconds, first.seconds, total, (before, state.moments)))
                meter.take()
            return found
        finally:
            roles.close()


def _iterate(config: TrainConfig, roles: Roles, state: State, shapes: Shapes, number: int, first: _FirstTokens) -> None:
    count = config.rollout.prompts
    drawn = philox("dry run", number).integers(0, roles.trunk.tokenizer.vocab_size, (count, shapes.prompt))
    rollout = generate(
        roles.trunk,
        state.policy.weights,
        [tuple(row) for row in drawn.tolist()],
        samples_per_prompt=config.rollout.samples_per_prompt,
        seed_parts=("dry run", number),
        positions=range(count),
        records=[{"prompt": ""}] * count,
        on_tokens=first,
        **sampling(config.rollout),
    )
    scored, _ = score(
        roles,
        state.policy.weights,
        state.critic.weights if state.critic is not None else None,
        rollout,
        section=config.score,
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_tokens,
    )
    batch = advantages(config, rollout, scored, kl_coef=state.kl.coef)
    update(
        roles,
        state.policy,
        state.critic,
        rollout,
        batch,
        section=config.ppo,
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_tokens,
        seed_parts=("dry run", number),
    )
    mx.synchronize()
