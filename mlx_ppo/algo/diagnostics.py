"""Numbers for the log, each over the counted tokens only."""

import mlx.core as mx

from mlx_ppo.algo.kl import kl_estimate
from mlx_ppo.algo.masked import masked_mean, masked_variance, require_same_shape


def explained_variance(values: mx.array, returns: mx.array, mask: mx.array) -> mx.array:
    """Share of the returns' variance that the critic explains.

        1 - var(R - V) / var(R)

    1 is a perfect critic, 0 one that knows only the mean, below 0 a harmful one.

    Args:
        values: [B, T], from before the update.
        returns: [B, T], with gae_lambda = 1: other returns contain the values themselves.
        mask: [B, T] bool, True where a response token counts.

    Returns:
        scalar float32; 0 where the returns do not vary.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(values=values, returns=returns, mask=mask)
    values = mx.where(mask, values.astype(mx.float32), 0.0)
    returns = mx.where(mask, returns.astype(mx.float32), 0.0)
    variance = masked_variance(returns, mask)
    unexplained = masked_variance(returns - values, mask)
    return mx.where(variance == 0, 0.0, 1.0 - unexplained / mx.where(variance == 0, 1.0, variance))


def clip_fractions(
    ratio: mx.array, advantages: mx.array, mask: mx.array, *, clip_low: float, clip_high: float
) -> tuple[mx.array, mx.array]:
    """Share of the tokens that the policy's clip silences, on either side.

        low:  A < 0 and r < 1 - clip_low
        high: A > 0 and r > 1 + clip_high

    Args:
        ratio: [B, T], from `clipped_policy_loss`.
        advantages: [B, T].
        mask: [B, T] bool, True where a response token counts.
        clip_low: as in the loss.
        clip_high: as in the loss.

    Returns:
        low and high, scalars float32 in [0, 1]; 0 where nothing counts.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(ratio=ratio, advantages=advantages, mask=mask)
    ratio = ratio.astype(mx.float32)
    low = (advantages < 0) & (ratio < 1.0 - clip_low)
    high = (advantages > 0) & (ratio > 1.0 + clip_high)
    return masked_mean(low, mask), masked_mean(high, mask)


def approx_kl(logprobs: mx.array, old_logprobs: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """How far the policy has moved since it sampled: KL(old || new), mean over tokens.

        k1 = mean(log pi_old - log pi)
        k3 = mean(r - 1 - log r),   r = pi / pi_old

    The tokens come from the old policy, so it takes the first place of `kl_estimate`.

    Args:
        logprobs: [B, T], nats, of the policy being trained.
        old_logprobs: [B, T], nats, of the policy that sampled.
        mask: [B, T] bool, True where a response token counts.

    Returns:
        k1 and k3, scalars float32, nats a token; 0 where nothing counts.

    Raises:
        ValueError: the shapes differ.
    Source: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    new = mx.where(mask, logprobs.astype(mx.float32), 0.0)
    old = mx.where(mask, old_logprobs.astype(mx.float32), 0.0)
    return masked_mean(kl_estimate(old, new, kind="k1"), mask), masked_mean(kl_estimate(old, new, kind="k3"), mask)


def effective_sample_size(ratio: mx.array, mask: mx.array) -> mx.array:
    """Share of the tokens that the importance weights leave in effect.

        (sum r)^2 / (n * sum r^2)

    Args:
        ratio: [B, T], positive, from `clipped_policy_loss`.
        mask: [B, T] bool, True where a response token counts.

    Returns:
        scalar float32 in (0, 1], 1 where all ratios are equal; 0 where nothing counts.

    Raises:
        ValueError: the shapes differ.
    Source: Kong 1992, technical report 348, University of Chicago.
    """
    mean = masked_mean(ratio, mask)
    mean_square = masked_mean(mx.square(ratio.astype(mx.float32)), mask)
    return mx.where(mean_square > 0, mx.minimum(mean * mean / mean_square, 1.0), 0.0)
