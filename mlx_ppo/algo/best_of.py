"""Best-of-k: what the best of k samples is expected to score, and how far it is from the policy that wrote them."""

import math

import mlx.core as mx


def expected_best_of(scores: mx.array, k: int) -> mx.array:
    """Expected highest score of k of a prompt's N samples, drawn without replacement.

        sum_i C(i - 1, k - 1) / C(N, k) * s_(i)        s_(1) <= ... <= s_(N): a row's scores in order

    The N samples being independent, this is an unbiased estimate of the expected score of best-of-k, of the least
    variance that a function of these scores can have. For k = 1 it is the mean, for k = N the highest.

    Args:
        scores: [P, N], a row for each prompt; mlx's array or numpy's.
        k: samples of which the best is kept, 1 to N.

    Returns:
        [P] float32.

    Raises:
        ValueError: scores are not [P, N], or k is not from 1 to N.
    Source: Nakano et al. 2021 (WebGPT), arXiv:2112.09332, appendix I.
    """
    ordered = mx.sort(mx.array(scores).astype(mx.float32), axis=-1)
    if ordered.ndim != 2 or not 1 <= k <= ordered.shape[1]:
        raise ValueError(f"scores must be [P, N] with N >= k >= 1, got {ordered.shape} and k = {k}")
    count = ordered.shape[1]
    weights = [0.0] * count
    weights[-1] = k / count  # the highest one is among k of N so often
    for i in range(count - 1, k - 1, -1):  # C(i - 1, k - 1) from C(i, k - 1), which may have thousands of digits
        weights[i - 1] = weights[i] * (i - k + 1) / i
    used = mx.where(mx.array(weights) > 0, ordered, 0.0)  # so that an infinite score doesn't meet a weight of 0
    return (used * mx.array(weights)).sum(axis=-1)


def best_of_kl(k: int) -> float:
    """Upper bound on KL(best-of-k || policy), in nats a response.

        log k - (k - 1) / k

    Nearly the KL itself where every single response is improbable and scores differ, as with long responses; less, and
    often much less, where some response is likely or many have the same score.

    Raises:
        ValueError: k is below 1.
    Source: Beirami et al. 2024, arXiv:2401.01879.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    return math.log(k) - (k - 1) / k


def powers(count: int) -> list[int]:
    """The k that are shown of so many samples: 1, 2, 4, ... and all of them."""
    return [1 << power for power in range(count.bit_length()) if 1 << power < count] + [count]
