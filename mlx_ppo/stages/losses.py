"""The losses of a micro-batch as functions of the arrays that learn."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import mlx.core as mx

from mlx_ppo.algo.losses import aggregate, clipped_policy_loss, clipped_value_loss
from mlx_ppo.compute.sequences import Sequences
from mlx_ppo.config.sections import PPOSection
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.roles import Critic, token_statistics
from mlx_ppo.models.trunk import Trunk


class PolicyTargets(NamedTuple):
    """What the policy's loss compares with, for the rows of a micro-batch."""

    old_logprobs: mx.array  # [B, T]
    advantages: mx.array  # [B, T]
    denominator: float  # of the whole minibatch


class CriticTargets(NamedTuple):
    """What the critic's loss compares with, for the rows of a micro-batch."""

    old_values: mx.array  # [B, T]
    returns: mx.array  # [B, T]
    tokens: float  # of the whole minibatch


class Pass(NamedTuple):
    """How a micro-batch is read."""

    section: PPOSection
    temperature: float  # of the sampling distribution
    saving: bool  # blocks are computed again for the gradient
    learning: bool = True  # the policy's gradient will be taken; it can be without, but that is slower


def policy_loss(
    trunk: Trunk, weights: Weights, sequences: Sequences, targets: PolicyTargets, how: Pass
) -> Callable[[Mapping[str, mx.array]], tuple[mx.array, mx.array, mx.array, mx.array]]:
    """The loss as a function of the policy's arrays: loss [], log-probabilities and ratios [B, T], states [N, D]."""
    section, temperature, learning = how.section, how.temperature, how.learning
    by_logprobs = learning and not section.entropy_coef

    def loss_of(arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        with trunk.using(weights.holding(arrays)), _saving_memory(trunk, how):
            states = trunk.response_states(sequences, learning=learning)
            now, entropy = token_statistics(trunk, states, sequences, temperature=temperature, learning=by_logprobs)
        losses, ratio = clipped_policy_loss(
            now,
            targets.old_logprobs,
            targets.advantages,
            clip_low=section.clip_low,
            clip_high=section.clip_high,
            dual_clip=section.dual_clip or None,
        )
        if section.entropy_coef:
            losses = losses - section.entropy_coef * entropy
        total = aggregate(losses, sequences.mask, mode=section.aggregate, denominator=targets.denominator)
        return total, now, ratio, mx.stop_gradient(states)

    return loss_of


def critic_loss(
    critic: Critic,
    weights: Weights,
    sequences: Sequences,
    targets: CriticTargets,
    how: Pass,
    policy_states: mx.array | None,
) -> Callable[[Mapping[str, mx.array]], mx.array]:
    """The loss [] as a function of the critic's arrays; it reads the policy's states [N, D] where they are given."""

    def loss_of(arrays: Mapping[str, mx.array]) -> mx.array:
        own = weights.holding(arrays)
        with _saving_memory(critic.trunk, how):
            states = policy_states if policy_states is not None else critic.states(own, sequences, learning=True)
        values = sequences.spread(critic.values(own, states))
        losses, _ = clipped_value_loss(values, targets.old_values, targets.returns, clip=how.section.value_clip or None)
        return aggregate(losses, sequences.mask, mode="token-mean", denominator=targets.tokens)

    return loss_of


def _saving_memory(trunk: Trunk, how: Pass) -> AbstractContextManager[None]:
    return trunk.checkpointing() if how.saving else nullcontext()
