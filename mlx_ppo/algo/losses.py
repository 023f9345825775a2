"""The losses, unreduced, and the one way to reduce them.

The [B, T] losses take no mask. A slot whose inputs are not finite has loss NaN and gradient 0: in padding `aggregate`
drops it, and at a counted token the loss turns NaN and stops the run instead of training on it.
"""

import math
from typing import Literal

import mlx.core as mx

from mlx_ppo.algo.masked import masked_sum, require_same_shape


def clipped_policy_loss(
    logprobs: mx.array,
    old_logprobs: mx.array,
    advantages: mx.array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[mx.array, mx.array]:
    """Clipped surrogate loss of every token.

        r = exp(clip(log pi - log pi_old, -20, 20))
        L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
        where A < 0 and dual_clip = c: L = min(L, -c A)

    Gradient flows through `logprobs` alone.

    Args:
        logprobs: [B, T], nats, of the policy being trained.
        old_logprobs: [B, T], nats, of the policy that sampled, at the same temperature.
        advantages: [B, T].
        clip_low: >= 0, how far the ratio may fall below 1.
        clip_high: >= 0, how far it may rise above 1.
        dual_clip: > 1, the largest ratio that counts where A < 0; None for no limit.

    Returns:
        loss and ratio, [B, T] float32; the ratio without gradient. Both NaN where an input is not finite.

    Raises:
        ValueError: the shapes differ, or a clip is out of range.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; separate bounds: Yu et al. 2025 (DAPO), arXiv:2503.14476,
        eq. 8; dual clip: Ye et al. 2020, arXiv:1912.09729, eq. 5.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip_low and clip_high must not be negative, got {clip_low} and {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be over 1, got {dual_clip}")
    log_ratio = logprobs.astype(mx.float32) - mx.stop_gradient(old_logprobs.astype(mx.float32))
    advantages = mx.stop_gradient(advantages.astype(mx.float32))
    valid = mx.isfinite(log_ratio) & mx.isfinite(advantages)
    log_ratio = mx.where(valid, log_ratio, 0.0)
    advantages = mx.where(valid, advantages, 0.0)

    ratio = mx.exp(mx.clip(log_ratio, -20.0, 20.0))
    unclipped = -advantages * ratio
    clipped = -advantages * mx.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    # Not mx.maximum: on a tie it gives the whole gradient to one side, here the one without any.
    loss = mx.where(clipped > unclipped, clipped, unclipped)
    if dual_clip is not None:
        bound = -dual_clip * advantages
        loss = mx.where((advantages < 0) & (loss > bound), bound, loss)
    return mx.where(valid, loss, mx.nan), mx.stop_gradient(mx.where(valid, ratio, mx.nan))


def clipped_value_loss(
    values: mx.array, old_values: mx.array, returns: mx.array, *, clip: float | None
) -> tuple[mx.array, mx.array]:
    """Squared error of the critic, held to a band around its old value.

        V_c = clip(V, V_old - clip, V_old + clip)
        L   = 0.5 * max((V - R)^2, (V_c - R)^2);   clip None: 0.5 * (V - R)^2

    Gradient flows through `values` alone.

    Args:
        values: [B, T], of the critic being trained.
        old_values: [B, T], from before the update.
        returns: [B, T].
        clip: > 0, in units of the value; None for no band.

    Returns:
        loss, [B, T] float32, NaN where an input is not finite; and [B, T] bool, True where the band's error is the
        larger one, so the token has no gradient.

    Raises:
        ValueError: the shapes differ, or clip is not positive.
    Source: Schulman et al. 2017, OpenAI baselines ppo2; Huang et al. 2022, "The 37 implementation details of PPO",
        no. 9.
    """
    require_same_shape(values=values, old_values=old_values, returns=returns)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    values = values.astype(mx.float32)
    old_values = mx.stop_gradient(old_values.astype(mx.float32))
    returns = mx.stop_gradient(returns.astype(mx.float32))
    # Of the differences, not only of the inputs: huge garbage may overflow in them.
    valid = mx.isfinite(values - returns) & mx.isfinite(old_values - returns)
    values, old_values, returns = (mx.where(valid, x, 0.0) for x in (values, old_values, returns))

    loss = 0.5 * mx.square(values - returns)
    active = mx.zeros(loss.shape, mx.bool_)
    if clip is not None:
        banded = 0.5 * mx.square(mx.clip(values, old_values - clip, old_values + clip) - returns)
        active = banded > loss
        loss = mx.where(active, banded, loss)
    return mx.where(valid, loss, mx.nan), active


def pairwise_reward_loss(
    chosen: mx.array, rejected: mx.array, *, margin: float | mx.array | None = None, centering: float = 0.0
) -> mx.array:
    """Bradley-Terry loss of a reward model on preference pairs.

        L = -log sigmoid(chosen - rejected - margin) + centering * (chosen + rejected)^2

    Args:
        chosen: [B], scores of the preferred responses.
        rejected: [B], scores of the others.
        margin: by how much the preferred should lead, a number or [B]; None for 0.
        centering: >= 0, weight of the pull of the scores' mean towards 0.

    Returns:
        [B] float32.

    Raises:
        ValueError: the shapes differ.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margin: Touvron et al. 2023, arXiv:2307.09288, eq. 2;
        centering: Eisenstein et al. 2023, arXiv:2312.09244.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    chosen, rejected = chosen.astype(mx.float32), rejected.astype(mx.float32)
    lead = chosen - rejected
    if margin is not None:
        margin = mx.array(margin, mx.float32)
        if margin.ndim:
            require_same_shape(chosen=chosen, margin=margin)
        lead = lead - margin
    return mx.logaddexp(0.0, -lead) + centering * mx.square(chosen + rejected)


def plackett_luce_loss(scores: mx.array, goodness: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """Negative log-likelihood of rankings of several responses to a prompt, for a reward model.

        L = sum_i log(1 + sum_{j worse than i} exp(s_j - s_i))

    Without ties it is that of choosing the best response, then the best of the rest, and so on; of two responses it is
    the loss of Bradley and Terry. Responses that are equally good say nothing of each other: neither is among those
    that the other one was chosen from, so that a ranking whose responses are all equally good has loss 0.

    Args:
        scores: [B, K], of up to K responses a row, in any order.
        goodness: [B, K], higher is better; equal numbers are a tie.
        mask: [B, K] bool, True where there is a response.

    Returns:
        loss, [B] float32, and the number of choices it is the sum of, [B] float32: responses with a worse one.

    Raises:
        ValueError: the shapes differ.
    Source: Plackett 1975, "The analysis of permutations"; Luce 1959, "Individual choice behavior".
    """
    lead, worse = _leads(scores, goodness, mask)
    itself = mx.eye(scores.shape[1], dtype=mx.bool_)
    behind = mx.where(worse | itself, -lead, -mx.inf)
    return mx.logsumexp(behind, axis=2).sum(axis=1), worse.any(axis=2).astype(mx.float32).sum(axis=1)


def all_pairs_loss(scores: mx.array, goodness: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """Bradley-Terry loss of a reward model on all pairs of a prompt's ranked responses together.

        L = mean_{j worse than i} -log sigmoid(s_i - s_j)

    Args:
        scores: [B, K], of up to K responses a row, in any order.
        goodness: [B, K], higher is better; equal numbers are a tie, which makes no pair.
        mask: [B, K] bool, True where there is a response.

    Returns:
        loss, [B] float32, 0 without a pair, and 1 where there is one, else 0, [B] float32.

    Raises:
        ValueError: the shapes differ.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1.
    """
    lead, worse = _leads(scores, goodness, mask)
    pairs = worse.astype(mx.float32).sum(axis=(1, 2))
    total = mx.where(worse, mx.logaddexp(0.0, -lead), 0.0).sum(axis=(1, 2))
    return total / mx.maximum(pairs, 1.0), (pairs > 0).astype(mx.float32)


def direct_preference_loss(
    chosen: mx.array,
    rejected: mx.array,
    *,
    beta: float,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
) -> mx.array:
    """Loss of a policy on preference pairs, without a reward model.

        h = chosen - rejected
        sigmoid: L = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h),   e = label_smoothing
        ipo:     L = (h - 1 / (2 beta))^2

    Args:
        chosen: [B], log pi - log pi_ref of the response that was preferred, nats (ipo: nats a token).
        rejected: [B], of the other one.
        beta: > 0, what a nat of KL to the reference costs, as `kl.coef` of PPO.
        kind: the loss.
        label_smoothing: 0 to below 0.5, share of pairs that are taken to be the wrong way round; sigmoid only.

    Returns:
        loss, [B] float32.

    Raises:
        ValueError: the shapes differ, or a number is out of range.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; label smoothing: Mitchell 2023, "A note on DPO with noisy
        preferences", eq. 3; ipo: Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    if not beta > 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"beta {beta} must be above 0 and label_smoothing {label_smoothing} from 0 to below 0.5")
    lead = chosen.astype(mx.float32) - rejected.astype(mx.float32)
    if kind == "ipo":
        return mx.square(lead - 0.5 / beta)
    if kind != "sigmoid":
        raise ValueError(f"kind must be sigmoid or ipo, got {kind!r}")
    right, wrong = mx.logaddexp(0.0, -beta * lead), mx.logaddexp(0.0, beta * lead)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def kahneman_tversky_loss(
    gained: mx.array, good: mx.array, moved: float, *, beta: float, bad_weight: float = 1.0
) -> mx.array:
    """Loss of a policy on responses that people judged one by one.

        good: L = 1 - sigmoid(beta (gained - moved))
        bad:  L = bad_weight (1 - sigmoid(beta (moved - gained)))

    Args:
        gained: [B], log pi - log pi_ref of each response, nats.
        good: [B] bool.
        moved: nats, an estimate of KL(pi, pi_ref) that is no part of the gradient, at least 0.
        beta: > 0.
        bad_weight: > 0, of a bad response beside a good one's 1.

    Returns:
        loss, [B] float32.

    Raises:
        ValueError: the shapes differ, or a number is out of range.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1 (lambda_y - v, with lambda_D = 1).
    """
    require_same_shape(gained=gained, good=good)
    if not beta > 0 or not bad_weight > 0 or not moved >= 0:
        raise ValueError(f"beta {beta} and bad_weight {bad_weight} must be above 0, and moved {moved} at least 0")
    lead = beta * (gained.astype(mx.float32) - moved)
    return mx.where(good, mx.sigmoid(-lead), bad_weight * mx.sigmoid(lead))


def _leads(scores: mx.array, goodness: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """Score of i less that of j, [B, K, K] (i, j), and whether j is the worse one; 0 and False where one is masked."""
    require_same_shape(scores=scores, goodness=goodness, mask=mask)
    scores = mx.where(mask, scores.astype(mx.float32), 0.0)
    both = mask[:, :, None] & mask[:, None, :]
    worse = both & (goodness[:, :, None] > goodness[:, None, :])
    return mx.where(both, scores[:, :, None] - scores[:, None, :], 0.0), worse


def aggregate(
    loss: mx.array,
    mask: mx.array,
    *,
    mode: Literal["token-mean", "sequence-mean", "constant"],
    denominator: float | mx.array | None = None,
) -> mx.array:
    """Reduce a per-token loss to the scalar that is differentiated.

        token-mean:    sum_{b, t} L / denominator; by default the counted tokens
        sequence-mean: sum_b mean_t L / denominator; by default the responses with a counted token
        constant:      sum_{b, t} L / denominator; required

    Where the batch is a part of an optimizer step, the denominator is that of the whole step: the parts' losses and
    gradients then add up to the step's. A response with no counted token adds nothing and is not counted.

    Args:
        loss: [B, T].
        mask: [B, T] bool, True where a response token counts.
        mode: what every token, or every response, weighs.
        denominator: > 0; an array is taken as it is, unchecked.

    Returns:
        scalar float32; 0 where nothing counts.

    Raises:
        ValueError: the shapes differ, mode is unknown, or the denominator is missing or not positive and finite.
    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, section 3.3; Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783.
    """
    require_same_shape(loss=loss, mask=mask)
    if denominator is not None and not isinstance(denominator, mx.array):
        if not (denominator > 0 and math.isfinite(denominator)):
            raise ValueError(f"denominator must be positive and finite, got {denominator}")
    elif denominator is None and mode == "constant":
        raise ValueError("mode constant needs a denominator")
    counted = mx.where(mask, 1.0, 0.0)
    if mode in ("token-mean", "constant"):
        total, own_count = masked_sum(loss, mask), counted.sum()
    elif mode == "sequence-mean":
        lengths = counted.sum(axis=1)
        sums = mx.where(mask, loss.astype(mx.float32), 0.0).sum(axis=1)
        total, own_count = (sums / mx.maximum(lengths, 1.0)).sum(), mx.where(lengths > 0, 1.0, 0.0).sum()
    else:
        raise ValueError(f"mode must be token-mean, sequence-mean or constant, got {mode!r}")
    return total / (mx.maximum(own_count, 1.0) if denominator is None else denominator)
