"""Log-probability and entropy over the vocabulary, by the device's fastest exact way.

mlx's elementwise functions run on one core and unvectorised on the CPU (exp: 17 ns an element, numpy 0.6), so there
the same formulas as in `mlx_ppo.algo.logprobs` are computed by numpy, with their own gradient.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.logprobs import entropy, token_logprobs

Floats = np.ndarray[Any, np.dtype[np.float32]]


def vocabulary_statistics(logits: mx.array, tokens: mx.array, *, temperature: float) -> tuple[mx.array, mx.array]:
    """Log-probabilities [N] of tokens [N] and entropies [N], in nats, under softmax(logits [N, V] / temperature).

    d log p_a / d z_j = ([j = a] - p_j) / temperature,   d H / d z_j = -p_j (log p_j + H) / temperature
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        logprobs = token_logprobs(logits[None], tokens[None], temperature=temperature)[0]
        return logprobs, entropy(logits[None], temperature=temperature)[0]
    scaled = logits.astype(mx.float32) * (1.0 / temperature)
    found: tuple[mx.array, mx.array] = _on_cpu(scaled, tokens)  # type: ignore[assignment]
    return found


@mx.custom_function
def _on_cpu(logits: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
    shifted, masses, total = _softmax(logits)
    log_total = np.log(total)
    picked = np.take_along_axis(shifted, np.asarray(tokens)[:, None], axis=-1)[:, 0]
    np.multiply(masses, np.where(masses > 0, shifted, 0.0), out=shifted)
    return mx.array(picked - log_total), mx.array(log_total - shifted.sum(axis=-1) / total)


@_on_cpu.vjp
def _on_cpu_vjp(
    primals: tuple[mx.array, mx.array], cotangents: tuple[mx.array, mx.array], _: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array]:
    logits, tokens = primals
    by_logprob, by_entropy = (np.asarray(cotangent) for cotangent in cotangents)
    shifted, masses, total = _softmax(logits)
    masses /= total[:, None]
    if by_entropy.any():
        np.subtract(shifted, np.log(total)[:, None], out=shifted)
        surprise = np.where(masses > 0, shifted, 0.0)
        entropies = -(masses * surprise).sum(axis=-1, keepdims=True)
        gradient = masses * (-by_entropy[:, None] * (surprise + entropies) - by_logprob[:, None])
    else:
        gradient = np.multiply(masses, -by_logprob[:, None], out=masses)
    gradient[np.arange(len(gradient)), np.asarray(tokens)] += by_logprob
    return mx.array(gradient), mx.zeros_like(tokens)


def _softmax(logits: mx.array) -> tuple[Floats, Floats, Floats]:
    """Logits less their maximum, their exponentials, and the sums of those."""
    values = np.asarray(logits)
    shifted = values - values.max(axis=-1, keepdims=True)
    masses = np.exp(shifted)
    return shifted, masses, masses.sum(axis=-1)
