"""A scored rollout into what the update learns from: token rewards, advantages, the critic's targets."""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.advantages import gae, group_advantages, length_adaptive_lambda
from mlx_ppo.algo.masked import masked_mean, masked_variance, whiten
from mlx_ppo.algo.rewards import token_rewards
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.stages.records import PPOBatch, Rollout, Scored

_ROUNDING = 1e-6  # of the largest score
_DRIFT = 1e-3  # nats of a token


def advantages(config: TrainConfig, rollout: Rollout, scored: Scored, *, kl_coef: float) -> PPOBatch:
    """Token rewards, then GAE twice (policy and critic have their own lambda), or the group's baseline.

    Where the scores that are compared are equal, the policy learns from the KL penalty alone, which nothing enlarges.
    """
    ppo, mask = config.ppo, rollout.mask
    rewards = token_rewards(scored.scores, scored.old_logprobs, scored.ref_logprobs, mask, kl_coef=kl_coef)
    if scored.values is None:
        assert ppo.advantage != "gae"
        totals = mx.where(mask, rewards, 0.0).sum(axis=1)
        by_response = group_advantages(totals, rollout.group, kind=ppo.advantage)
        if ppo.advantage == "grpo":  # where scores are equal, it would bring the KL penalty's differences to full size
            plain = group_advantages(totals, rollout.group, kind="dr_grpo")
            by_response = mx.where(_without_signal(rollout, scored), plain, by_response)
        return PPOBatch(scored.old_logprobs, mx.where(mask, by_response[:, None], 0.0), None, None, None)
    lambda_policy: float | mx.array = ppo.lambda_policy
    if ppo.length_adaptive:
        lambda_policy = length_adaptive_lambda(mask.sum(axis=1), alpha=ppo.length_adaptive)
    estimates, _ = gae(rewards, scored.values, mask, discount=ppo.discount, gae_lambda=lambda_policy)
    _, returns = gae(rewards, scored.values, mask, discount=ppo.discount, gae_lambda=ppo.lambda_critic)
    _, full_returns = gae(rewards, scored.values, mask, discount=ppo.discount, gae_lambda=1.0)
    if signal(config, rollout, scored) == 0:
        estimates = _from_penalty(scored, mask, kl_coef)
    elif ppo.whiten:
        estimates = whiten(estimates, mask) * _share_of_signal(estimates, mask, scored.scores)
    return PPOBatch(scored.old_logprobs, estimates, scored.values, returns, full_returns)


def _from_penalty(scored: Scored, mask: mx.array, kl_coef: float) -> mx.array:
    """Advantages [B, T] of the KL penalty alone: what is still to be paid, less its mean. Nothing makes them larger.

        A_t = -kl_coef * (sum over s >= t of k1_s - its mean over all counted t)

    A critic's error, which would be larger than what it foresees, has no part in them.
    """
    penalties = token_rewards(
        mx.zeros(scored.scores.shape), scored.old_logprobs, scored.ref_logprobs, mask, kl_coef=kl_coef
    )
    _, to_pay = gae(penalties, mx.zeros(mask.shape), mask, discount=1.0, gae_lambda=1.0)
    return mx.where(mask, to_pay - masked_mean(to_pay, mask), 0.0)


def _share_of_signal(estimates: mx.array, mask: mx.array, scores: mx.array) -> mx.array:
    """Deviation of the scores over that of the advantages, at most 1.

    Advantages vary less than the scores by as much as the critic foresees. Where they vary more, the rest is the
    critic's own error, which whitening would otherwise bring to full size.
    """
    told = masked_variance(scores, mx.ones(scores.shape, mx.bool_))
    return mx.minimum(mx.sqrt(told / (masked_variance(estimates, mask) + 1e-8)), 1.0)


def signal(config: TrainConfig, rollout: Rollout, scored: Scored) -> float:
    """How often scores that are compared differ by more than rounding: 0 or 1 (gae), or the share of prompts.

    Where none do, what is left of the advantages is the critic's error and the KL penalty.
    """
    if config.ppo.advantage == "gae":
        return float(_differ(np.array(scored.scores)))
    scores, group = np.array(scored.scores), np.array(rollout.group)
    return float(np.mean([_differ(scores[group == number]) for number in np.unique(group)]))


def _without_signal(rollout: Rollout, scored: Scored) -> mx.array:
    """[B] bool: the scores of the responses to the same prompt are equal."""
    scores, group = np.array(scored.scores), np.array(rollout.group)
    differ = {number: _differ(scores[group == number]) for number in np.unique(group).tolist()}
    return mx.array([not differ[number] for number in group.tolist()])


def _differ(scores: "np.ndarray[Any, np.dtype[Any]]") -> bool:
    return bool(np.ptp(scores) > _ROUNDING * np.abs(scores).max())


def pulls_back(rollout: Rollout, scored: Scored, *, kl_coef: float) -> bool:
    """Whether the KL penalty tells responses apart, by more than rounding: the policy has left the reference."""
    drift = mx.where(rollout.mask, mx.abs(scored.old_logprobs - scored.ref_logprobs), 0.0)
    return kl_coef > 0 and bool((drift.max() > _DRIFT).item())
