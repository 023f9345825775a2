"""From one score per response to one reward per token."""

from typing import Literal

import mlx.core as mx

from mlx_ppo.algo.masked import require_same_shape


def token_rewards(
    scores: mx.array, logprobs: mx.array, ref_logprobs: mx.array, mask: mx.array, *, kl_coef: float
) -> mx.array:
    """Reward of every token: the KL penalty, and the score on the response's last counted token.

        r_t = -kl_coef * (log pi(a_t) - log pi_ref(a_t)) + [t is the last counted token] * score

    The log-ratio is not clamped. Finished and truncated responses are treated alike.

    Args:
        scores: [B].
        logprobs: [B, T], nats, of the sampling policy.
        ref_logprobs: [B, T], nats.
        mask: [B, T] bool, True where a response token counts.
        kl_coef: weight of the penalty, score per nat.

    Returns:
        [B, T] float32, 0 where masked. The score of a response with no counted token has no place and is dropped.

    Raises:
        ValueError: the shapes don't fit.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 2; Stiennon et al. 2020, arXiv:2009.01325, section 3.4.
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"shapes differ: scores {scores.shape}, mask {mask.shape}")
    policy = mx.where(mask, logprobs.astype(mx.float32), 0.0)
    reference = mx.where(mask, ref_logprobs.astype(mx.float32), 0.0)
    counted_from_here = mx.cumsum(mx.where(mask, 1, 0), axis=1, reverse=True)
    is_last = mx.where(mask, counted_from_here == 1, False)
    return -kl_coef * (policy - reference) + mx.where(is_last, scores.astype(mx.float32)[:, None], 0.0)


def penalise_truncated(
    scores: mx.array, finished: mx.array, *, mode: Literal["none", "replace", "subtract"], value: float
) -> mx.array:
    """Change the score of responses that ran out of length.

        replace:  score := value
        subtract: score := score - value

    Args:
        scores: [B].
        finished: [B] bool, True where the end-of-sequence token was sampled in time.
        mode: "none" leaves every score as it is.
        value: a score; for "subtract", positive makes the response worse.

    Returns:
        [B] float32.

    Raises:
        ValueError: the shapes differ, or mode is unknown.
    """
    require_same_shape(scores=scores, finished=finished)
    scores = scores.astype(mx.float32)
    if mode == "none":
        return scores
    if mode == "replace":
        return mx.where(finished, scores, value)
    if mode == "subtract":
        return mx.where(finished, scores, scores - value)
    raise ValueError(f"mode must be none, replace or subtract, got {mode!r}")


def soft_overlong_penalty(lengths: mx.array, *, max_length: int, buffer: int) -> mx.array:
    """Penalty that grows linearly over the last `buffer` tokens before the limit.

        0                                        length <= max_length - buffer
        (max_length - buffer - length) / buffer  in between
        -1                                       length >= max_length

    Args:
        lengths: [B], tokens of each response.
        max_length: tokens, the length at which the penalty is full.
        buffer: tokens, in [1, max_length].

    Returns:
        [B] float32 in [-1, 0], to be added to the scores.

    Raises:
        ValueError: buffer is out of range.
    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 13.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer must be in [1, max_length = {max_length}], got {buffer}")
    return mx.clip((max_length - buffer - lengths.astype(mx.float32)) / buffer, -1.0, 0.0)


def clip_scores(scores: mx.array, bound: float) -> mx.array:
    """Limit the size of scores, before any baseline is taken from them.

        clip(score, -bound, bound)

    A score that is NaN or infinite is a fault of its source: it passes unchanged, for the caller's check to find.

    Args:
        scores: [B].
        bound: > 0.

    Returns:
        [B] float32.

    Raises:
        ValueError: bound is not positive.
    """
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}")
    scores = scores.astype(mx.float32)
    return mx.where(mx.isfinite(scores), mx.clip(scores, -bound, bound), scores)
