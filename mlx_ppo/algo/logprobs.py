"""Log-probabilities and entropy of the sampling distribution, softmax(logits / temperature)."""

import mlx.core as mx


def token_logprobs(logits: mx.array, tokens: mx.array, *, temperature: float) -> mx.array:
    """Log-probability of each token under the distribution it was sampled from.

        log pi(a_t) = z_{a_t} - log sum_v exp(z_v),   z = logits / temperature

    Logits of one slot touch that slot only, but a slot whose logits hold NaN has a NaN gradient.

    Args:
        logits: [B, T, V], any float dtype, before temperature; logits[b, t] predicts tokens[b, t].
        tokens: [B, T] integers. An id outside [0, V), as padding may hold, gives NaN and is never used as an index.
        temperature: the sampling temperature, > 0.

    Returns:
        [B, T] float32, nats.

    Raises:
        ValueError: tokens is not [B, T], or temperature is not positive.
    """
    scaled = _scaled(logits, temperature)
    return _of_tokens(scaled, tokens, mx.logsumexp(scaled, axis=-1))


def entropy(logits: mx.array, *, temperature: float) -> mx.array:
    """Entropy of the sampling distribution at every slot.

        H = -sum_v p_v log p_v,   p = softmax(logits / temperature),   0 log 0 = 0

    Args:
        logits: [B, T, V], any float dtype, before temperature; -inf excludes an entry.
        temperature: the sampling temperature, > 0.

    Returns:
        [B, T] float32, nats.

    Raises:
        ValueError: temperature is not positive.
    """
    scaled = _scaled(logits, temperature)
    return _entropy(scaled, mx.logsumexp(scaled, axis=-1))


def logprobs_and_entropy(logits: mx.array, tokens: mx.array, *, temperature: float) -> tuple[mx.array, mx.array]:
    """`token_logprobs` and `entropy` [B, T] of the same logits, which are scaled once."""
    scaled = _scaled(logits, temperature)
    log_normaliser = mx.logsumexp(scaled, axis=-1)
    return _of_tokens(scaled, tokens, log_normaliser), _entropy(scaled, log_normaliser)


def _of_tokens(scaled: mx.array, tokens: mx.array, log_normaliser: mx.array) -> mx.array:
    if tokens.shape != scaled.shape[:-1]:
        raise ValueError(f"shapes differ: logits {scaled.shape}, tokens {tokens.shape}")
    valid = (tokens >= 0) & (tokens < scaled.shape[-1])
    chosen = mx.take_along_axis(scaled, mx.where(valid, tokens, 0)[..., None], axis=-1).squeeze(-1)
    return mx.where(valid, chosen - log_normaliser, mx.nan)


def _entropy(scaled: mx.array, log_normaliser: mx.array) -> mx.array:
    probabilities = mx.exp(scaled - log_normaliser[..., None])
    excluded = mx.isneginf(scaled)
    return log_normaliser - (probabilities * mx.where(excluded, 0.0, scaled)).sum(axis=-1)


def _scaled(logits: mx.array, temperature: float) -> mx.array:
    """Logits / temperature, shifted so that the largest is 0: large logits then cost no precision."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = logits.astype(mx.float32)
    return (logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))) / temperature
