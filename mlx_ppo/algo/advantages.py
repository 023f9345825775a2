"""How much better a token or a response did than expected."""

from typing import Literal

import mlx.core as mx

from mlx_ppo.algo.masked import require_same_shape


def gae(
    rewards: mx.array,
    values: mx.array,
    mask: mx.array,
    *,
    discount: float,
    gae_lambda: float | mx.array,
    bootstrap: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Generalised advantage estimates and value targets.

        delta_t = r_t + discount * V_{t+1} - V_t
        A_t     = delta_t + discount * gae_lambda * A_{t+1}
        R_t     = A_t + V_t

    t + 1 is the next counted token: holes in the mask are skipped as if absent. Nothing follows the last counted
    token, so its next advantage is 0 and its next value 0, or the bootstrap.

    Args:
        rewards: [B, T].
        values: [B, T], from before the update.
        mask: [B, T] bool, True where a response token counts.
        discount: per token, in [0, 1].
        gae_lambda: in [0, 1], one for all or [B], one per response.
        bootstrap: [B], the value after the last counted token of a truncated response that got no score, 0 elsewhere.

    Returns:
        advantages and returns, [B, T] float32, not whitened, 0 where masked.

    Raises:
        ValueError: the shapes don't fit.
    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16; per-response lambda: Yue et al. 2025 (VAPO),
        arXiv:2504.05118.
    """
    require_same_shape(rewards=rewards, values=values, mask=mask)
    n_responses, n_slots = mask.shape
    gae_lambda = mx.array(gae_lambda, mx.float32)
    bootstrap = mx.zeros((n_responses,)) if bootstrap is None else bootstrap.astype(mx.float32)
    if gae_lambda.shape not in ((), (n_responses,)) or bootstrap.shape != (n_responses,):
        raise ValueError(
            f"shapes don't fit: mask {mask.shape}, gae_lambda {gae_lambda.shape}, bootstrap {bootstrap.shape}"
        )
    rewards = mx.where(mask, rewards.astype(mx.float32), 0.0)
    values = mx.where(mask, values.astype(mx.float32), 0.0)

    # Slot n_slots stands for "after the response" and holds the bootstrap.
    counted_slot = mx.where(mask, mx.arange(n_slots), n_slots)
    counted_slot = mx.concatenate([counted_slot, mx.full((n_responses, 1), n_slots, counted_slot.dtype)], axis=1)
    next_slot = mx.cummin(counted_slot, axis=1, reverse=True)[:, 1:]
    next_values = mx.take_along_axis(mx.concatenate([values, bootstrap[:, None]], axis=1), next_slot, axis=1)

    delta = mx.where(mask, rewards + discount * next_values - values, 0.0)
    decay = mx.where(mask, discount * gae_lambda.reshape(-1, 1), 1.0)
    advantages = mx.where(mask, _accumulate(delta, decay), 0.0)
    return advantages, advantages + values


def _accumulate(delta: mx.array, decay: mx.array) -> mx.array:
    """Solve A_t = delta_t + decay_t * A_{t+1} in log2(T) rounds, each letting a slot see twice as far ahead."""
    reach = 1
    while reach < delta.shape[1]:
        ahead = [(0, 0), (0, reach)]
        delta = delta + decay * mx.pad(delta[:, reach:], ahead)
        decay = decay * mx.pad(decay[:, reach:], ahead)
        reach *= 2
    return delta


def length_adaptive_lambda(lengths: mx.array, *, alpha: float) -> mx.array:
    """A lambda for each response, nearer to 1 the longer it is.

        clip(1 - 1 / (alpha * length), 0, 1)

    Args:
        lengths: [B], counted tokens.
        alpha: > 0; about the fraction of a response over which credit spreads back.

    Returns:
        [B] float32 in [0, 1]; 0 for an empty response.

    Raises:
        ValueError: alpha is not positive.
    Source: Yue et al. 2025 (VAPO), arXiv:2504.05118.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    return mx.clip(1.0 - 1.0 / (alpha * lengths.astype(mx.float32)), 0.0, 1.0)


def group_advantages(scores: mx.array, group: mx.array, *, kind: Literal["grpo", "dr_grpo", "rloo"]) -> mx.array:
    """Advantage of each response over the others to the same prompt, without a critic.

        grpo:    (score - group mean) / (unbiased group std + 1e-4)
        dr_grpo: score - group mean
        rloo:    score - mean of the others in the group

    Args:
        scores: [B].
        group: [B] integers, equal for responses to the same prompt, in any order.
        kind: which baseline.

    Returns:
        [B] float32; 0 for a group of one and for a group whose scores are all equal.

    Raises:
        ValueError: the arrays are not both [B], or kind is unknown.
    Source: Shao et al. 2024 (GRPO), arXiv:2402.03300, section 4.1.2; Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783;
        Ahmadian et al. 2024 (RLOO), arXiv:2402.14740.
    """
    require_same_shape(scores=scores, group=group)
    if scores.ndim != 1:
        raise ValueError(f"scores must be [B], got {scores.shape}")
    scores = scores.astype(mx.float32)
    same = group[:, None] == group[None, :]
    size = mx.where(same, 1.0, 0.0).sum(axis=1)
    others = mx.maximum(size - 1.0, 1.0)
    # From pairwise differences, equal scores give exactly 0: a rounded mean would leave residue for the std to blow up.
    surplus = mx.where(same, scores[:, None] - scores[None, :], 0.0).sum(axis=1)
    if kind == "rloo":
        return surplus / others
    centred = surplus / size
    if kind == "dr_grpo":
        return centred
    if kind == "grpo":
        variance = mx.where(same, (centred * centred)[None, :], 0.0).sum(axis=1) / others
        return centred / (mx.sqrt(variance) + 1e-4)
    raise ValueError(f"kind must be grpo, dr_grpo or rloo, got {kind!r}")
