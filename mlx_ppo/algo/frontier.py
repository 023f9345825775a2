"""The best policy that a KL penalty allows: the reference, tilted by its scores, as far as samples can tell."""

from typing import NamedTuple

import mlx.core as mx


class Tilted(NamedTuple):
    """Estimates [P] of a prompt's tilted reference, float32."""

    value: mx.array  # largest E[score] - coef * KL that any policy reaches
    score: mx.array  # its expected score
    kl: mx.array  # from the reference, nats a response
    effective: mx.array  # effective sample size: how many samples the estimates rest on


def tilted(scores: mx.array, log_weights: mx.array, *, coef: float) -> Tilted:
    """The policy that maximises E[score] - coef * KL(policy || reference), from samples.

        pi*(y) = pi_ref(y) exp(score(y) / coef) / Z        Z = E_ref[exp(score / coef)]
        value = coef * log Z    KL = E*[score] / coef - log Z    effective = (sum_i u_i)^2 / sum_i u_i^2

    with u_i = w_i exp(score_i / coef), and w_i = pi_ref(y_i) / q(y_i) where the samples come from q: by weights, the
    mean of u_i is an unbiased estimate of Z. That of its logarithm is too low on average (Jensen), by more the fewer
    effective samples there are: the value is a lower bound in expectation.

    Args:
        scores: [P, N], a row for each prompt.
        log_weights: [P, N], log pi_ref - log q of each sample; 0 for samples of the reference.
        coef: the penalty, > 0.

    Returns:
        Four arrays [P].

    Raises:
        ValueError: the shapes differ, there is no sample, or coef isn't positive.
    Source: the optimum: Korbak et al. 2022, arXiv:2205.11275, eq. 5; weights: Owen 2013, Monte Carlo theory, ch. 9.
    """
    if scores.ndim != 2 or scores.shape != log_weights.shape or not scores.shape[1]:
        raise ValueError(f"scores and log_weights must both be [P, N], got {scores.shape} and {log_weights.shape}")
    if not coef > 0:
        raise ValueError(f"coef must be positive, got {coef}")
    scores = scores.astype(mx.float32)
    logs = scores / coef + log_weights.astype(mx.float32)
    total = mx.logsumexp(logs, axis=1)
    shares = mx.exp(logs - total[:, None])
    score = mx.where(shares > 0, shares * scores, 0.0).sum(axis=1)
    log_z = total - mx.log(mx.array(float(scores.shape[1])))
    return Tilted(coef * log_z, score, mx.maximum(score / coef - log_z, 0.0), 1.0 / mx.square(shares).sum(axis=1))


def mixture_log_weights(ref_logprobs: mx.array, logprobs: mx.array, *, ref_share: float) -> mx.array:
    """Log pi_ref - log q of samples of which a share came from the reference and the rest from a policy.

        q = ref_share * pi_ref + (1 - ref_share) * pi

    Every sample counts as one of the mixture (the balance heuristic), so no weight exceeds 1 / ref_share.

    Args:
        ref_logprobs: any shape, log pi_ref of whole responses, nats.
        logprobs: the same shape, log pi.
        ref_share: in (0, 1].

    Returns:
        The same shape, float32.

    Raises:
        ValueError: the shapes differ, or the share is out of range.
    Source: Veach and Guibas 1995, "Optimally combining sampling techniques for Monte Carlo rendering", section 3.3.
    """
    if ref_logprobs.shape != logprobs.shape:
        raise ValueError(f"shapes differ: {ref_logprobs.shape} and {logprobs.shape}")
    if not 0 < ref_share <= 1:
        raise ValueError(f"ref_share must be in (0, 1], got {ref_share}")
    if ref_share == 1:
        return mx.zeros(logprobs.shape)
    shift = logprobs.astype(mx.float32) - ref_logprobs.astype(mx.float32)
    return -mx.logaddexp(mx.log(mx.array(ref_share)), shift + mx.log(mx.array(1 - ref_share)))
