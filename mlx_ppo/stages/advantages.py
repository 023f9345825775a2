"""A scored rollout into what the update learns from: token rewards, advantages, the critic's targets."""

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.advantages import gae, group_advantages, length_adaptive_lambda
from mlx_ppo.algo.masked import masked_variance, whiten
from mlx_ppo.algo.rewards import token_rewards
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.stages.records import PPOBatch, Rollout, Scored

_ROUNDING = 1e-6  # of the largest score


def advantages(config: TrainConfig, rollout: Rollout, scored: Scored, *, kl_coef: float) -> PPOBatch:
    """Token rewards, then GAE twice (policy and critic have their own lambda), or the group's baseline."""
    ppo, mask = config.ppo, rollout.mask
    rewards = token_rewards(scored.scores, scored.old_logprobs, scored.ref_logprobs, mask, kl_coef=kl_coef)
    if scored.values is None:
        assert ppo.advantage != "gae"
        totals = mx.where(mask, rewards, 0.0).sum(axis=1)
        by_response = group_advantages(totals, rollout.group, kind=ppo.advantage)
        return PPOBatch(scored.old_logprobs, mx.where(mask, by_response[:, None], 0.0), None, None, None)
    lambda_policy: float | mx.array = ppo.lambda_policy
    if ppo.length_adaptive:
        lambda_policy = length_adaptive_lambda(mask.sum(axis=1), alpha=ppo.length_adaptive)
    estimates, _ = gae(rewards, scored.values, mask, discount=ppo.discount, gae_lambda=lambda_policy)
    _, returns = gae(rewards, scored.values, mask, discount=ppo.discount, gae_lambda=ppo.lambda_critic)
    _, full_returns = gae(rewards, scored.values, mask, discount=ppo.discount, gae_lambda=1.0)
    if ppo.whiten:
        estimates = whiten(estimates, mask) * _share_of_signal(estimates, mask, scored.scores)
    return PPOBatch(scored.old_logprobs, estimates, scored.values, returns, full_returns)


def _share_of_signal(estimates: mx.array, mask: mx.array, scores: mx.array) -> mx.array:
    """Deviation of the scores over that of the advantages, at most 1.

    Advantages vary less than the scores by as much as the critic foresees. Where they vary more, the rest is the
    critic's own error, which whitening would otherwise bring to full size.
    """
    signal = masked_variance(scores, mx.ones(scores.shape, mx.bool_))
    return mx.minimum(mx.sqrt(signal / (masked_variance(estimates, mask) + 1e-8)), 1.0)


def is_signal(config: TrainConfig, rollout: Rollout, scored: Scored) -> bool:
    """Whether scores that are compared differ by more than rounding: of all responses (gae), or of one prompt's.

    Where they don't, advantages are made of the critic's error and of the KL penalty alone.
    """
    scores, group = np.array(scored.scores), np.array(rollout.group)
    compared = [scores] if config.ppo.advantage == "gae" else [scores[group == number] for number in np.unique(group)]
    return any(np.ptp(values) > _ROUNDING * np.abs(values).max() for values in compared)
