"""A scored rollout into what the update learns from: token rewards, advantages, the critic's targets."""

import mlx.core as mx

from mlx_ppo.algo.advantages import gae, group_advantages, length_adaptive_lambda
from mlx_ppo.algo.masked import whiten
from mlx_ppo.algo.rewards import token_rewards
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.stages.records import PPOBatch, Rollout, Scored


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
    whitened = whiten(estimates, mask) if ppo.whiten else estimates
    return PPOBatch(scored.old_logprobs, whitened, scored.values, returns, full_returns)
