"""Log-probability and entropy over the vocabulary, by the device's fastest exact way.

mlx's elementwise functions run on one core and unvectorised on the CPU (exp: 17 ns an element, numpy 0.6), so there
the same formulas as in `mlx_ppo.algo.logprobs` are computed by numpy, with their own gradient.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.logprobs import entropy, token_logprobs
from mlx_ppo.compute.device import on_cpu

Floats = np.ndarray[Any, np.dtype[np.float32]]
_PIECE = 1 << 18  # elements
_LOWEST = -1e30  # in place of the minus infinity of a token that cannot be, whose mass 0 it is multiplied by


def vocabulary_statistics(
    logits: mx.array, tokens: mx.array, *, temperature: float, summed: bool = False
) -> tuple[mx.array, mx.array]:
    """Log-probabilities [N] of tokens [N] and entropies [N], in nats, under softmax(logits [N, V] / temperature).

    d log p_a / d z_j = ([j = a] - p_j) / temperature,   d H / d z_j = -p_j (log p_j + H) / temperature

    `summed`: whatever gradient is taken is that of the sum of the log-probabilities, which is computed along; the
    entropies aren't read, and on the CPU not computed (NaN).
    """
    if not on_cpu() and not summed:
        logprobs = token_logprobs(logits[None], tokens[None], temperature=temperature)[0]
        return logprobs, entropy(logits[None], temperature=temperature)[0]
    function = _summed if summed else _on_cpu
    inverse = mx.array(1.0 / temperature)
    found: tuple[mx.array, ...] = function(logits.astype(mx.float32), tokens, inverse)  # type: ignore[assignment]
    return found[0], found[1]


@mx.custom_function
def _on_cpu(logits: mx.array, tokens: mx.array, inverse: mx.array) -> tuple[mx.array, mx.array]:
    return _by_pieces(logits, tokens, inverse, None)


@mx.custom_function
def _summed(logits: mx.array, tokens: mx.array, inverse: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    if not on_cpu():
        return summed_on_gpu(logits, tokens, inverse)
    slopes = mx.zeros(logits.shape)
    logprobs, entropies = _by_pieces(logits, tokens, inverse, np.asarray(slopes))  # a view: it is filled in place
    return logprobs, entropies, slopes


@_summed.vjp
def _summed_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    return outputs[2], mx.zeros_like(primals[1]), mx.zeros_like(primals[2])


def summed_on_gpu(logits: mx.array, tokens: mx.array, inverse: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The same in mlx, with the gradient [N, V] of each log-probability by its logits."""
    scaled = (logits - logits.max(axis=-1, keepdims=True)) * inverse
    masses, log_total = mx.softmax(scaled, axis=-1), mx.logsumexp(scaled, axis=-1)
    logprobs = mx.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0] - log_total
    entropies = log_total - (masses * mx.maximum(scaled, _LOWEST)).sum(axis=-1)
    (masses,) = mx.depends([masses], [logprobs, entropies])
    slopes = (masses * -inverse).at[mx.arange(len(tokens)), tokens].add(inverse)
    return logprobs, entropies, slopes


def _by_pieces(
    logits: mx.array, tokens: mx.array, inverse: mx.array, slopes: Floats | None
) -> tuple[mx.array, mx.array]:
    """Log-probabilities and entropies; or, instead of the latter, the former's gradient, into `slopes` [N, V]."""
    values, chosen, factor = np.asarray(logits), np.asarray(tokens), np.float32(np.asarray(inverse))
    logprobs, entropies = np.empty(len(values), np.float32), np.full(len(values), np.nan, np.float32)
    for rows in _pieces(values):
        shifted, masses, total = _softmax(values[rows], factor)
        log_total = np.log(total)
        logprobs[rows] = np.take_along_axis(shifted, chosen[rows, None], axis=-1)[:, 0] - log_total
        if slopes is not None:
            np.multiply(masses, (-factor / total)[:, None], out=slopes[rows])
        else:
            np.multiply(masses, np.maximum(shifted, _LOWEST, out=shifted), out=shifted)
            entropies[rows] = log_total - shifted.sum(axis=-1) / total
    if slopes is not None:
        slopes[np.arange(len(slopes)), chosen] += factor
    return mx.array(logprobs), mx.array(entropies)


@_on_cpu.vjp
def _on_cpu_vjp(
    primals: tuple[mx.array, mx.array, mx.array], cotangents: tuple[mx.array, mx.array], _: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array, mx.array]:
    logits, tokens, inverse = primals
    values, factor = np.asarray(logits), np.float32(np.asarray(inverse))
    by_logprob, by_entropy = (np.asarray(cotangent) * factor for cotangent in cotangents)
    gradient = np.empty_like(values)
    for rows in _pieces(values):
        shifted, masses, total = _softmax(values[rows], factor)
        masses /= total[:, None]
        if by_entropy[rows].any():
            np.subtract(shifted, np.log(total)[:, None], out=shifted)
            surprise = np.maximum(shifted, _LOWEST, out=shifted)
            entropies = -(masses * surprise).sum(axis=-1, keepdims=True)
            gradient[rows] = masses * (-by_entropy[rows, None] * (surprise + entropies) - by_logprob[rows, None])
        else:
            np.multiply(masses, -by_logprob[rows, None], out=gradient[rows])
    gradient[np.arange(len(gradient)), np.asarray(tokens)] += by_logprob
    return mx.array(gradient), mx.zeros_like(tokens), mx.zeros_like(inverse)


def _pieces(values: Floats) -> Iterator[slice]:
    """Rows to work on at once, so that what lies between stays in the processor's cache."""
    count = max(1, _PIECE // values.shape[-1])
    return (slice(start, start + count) for start in range(0, len(values), count))


def _softmax(values: Floats, factor: np.float32) -> tuple[Floats, Floats, Floats]:
    """Logits times a factor, less their maximum; their exponentials; and the sums of those."""
    shifted = values * factor
    shifted -= shifted.max(axis=-1, keepdims=True)
    masses = np.exp(shifted)
    return shifted, masses, masses.sum(axis=-1)
