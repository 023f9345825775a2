"""Log-probability and entropy over the vocabulary, by numpy.

mlx's elementwise functions run on one core and unvectorised on the CPU (exp: 17 ns an element, numpy 0.6), so here the
same formulas as in `mlx_ppo.algo.logprobs` are computed by numpy, with their own gradient. Where a set of tokens is
given (`mlx_ppo.algo.truncation`), all others are masked piece by piece.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.cpu.products import Floats
from mlx_ppo.compute.cpu.truncation import outside as outside_of
from mlx_ppo.compute.engine import Numbers
from mlx_ppo.compute.needs import Work, outside, planned

_PIECE = 1 << 18  # elements
_LOWEST = -1e30  # in place of the minus infinity of a token that cannot be, whose mass 0 it is multiplied by


def vocabulary_statistics(
    logits: mx.array,
    tokens: mx.array,
    support: mx.array | None = None,
    *,
    temperature: float,
    summed: bool = False,
) -> tuple[mx.array, mx.array]:
    """Log-probabilities [N] of tokens [N] and entropies [N]; see `output_head.OutputHead.vocabulary`.

    `summed`: the entropies are not computed (NaN), and the gradient by the log-probabilities is, once.
    """
    function = _summed if summed else _apart
    inverse = mx.array(1.0 / temperature)
    more = () if support is None else (support,)
    found: tuple[mx.array, ...] = function(logits.astype(mx.float32), tokens, inverse, *more)
    return found[0], found[1]


@mx.custom_function
def _statistics(logits: mx.array, tokens: mx.array, inverse: mx.array, *support: mx.array) -> tuple[mx.array, mx.array]:
    return _by_pieces(None, logits, tokens, inverse, *support)


@mx.custom_function
def _summed_statistics(
    logits: mx.array, tokens: mx.array, inverse: mx.array, *support: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    gradient = mx.zeros(logits.shape)
    filled = np.asarray(gradient)  # a view
    logprobs, entropies = _by_pieces(filled, logits, tokens, inverse, *support)
    return logprobs, entropies, gradient


@_summed_statistics.vjp
def _summed_statistics_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    """In the memory of the forward's gradient, which nobody else sees."""
    factors = np.asarray(cotangents[0])
    if (factors != 1).any():
        gradient = np.asarray(outputs[2])
        for rows in _pieces(gradient):
            gradient[rows] *= factors[rows, None]
    return outputs[2], *map(mx.zeros_like, primals[1:])


def _by_pieces(
    gradient: Floats | None, logits: mx.array, tokens: mx.array, inverse: mx.array, *support: mx.array
) -> tuple[mx.array, mx.array]:
    """Log-probabilities and entropies; or, instead of the latter, the former's gradient, into `gradient` [N, V]."""
    values, chosen, factor = np.asarray(logits), np.asarray(tokens), np.float32(np.asarray(inverse))
    logprobs, entropies = np.empty(len(values), np.float32), np.full(len(values), np.nan, np.float32)
    sets = [np.asarray(words) for words in support]
    for rows in _pieces(values):
        shifted, masses, total = _softmax(values[rows], factor, *(words[rows] for words in sets))
        log_total = np.log(total)
        logprobs[rows] = np.take_along_axis(shifted, chosen[rows, None], axis=-1)[:, 0] - log_total
        if gradient is not None:
            np.multiply(masses, (-factor / total)[:, None], out=gradient[rows])
        else:
            np.multiply(masses, np.maximum(shifted, _LOWEST, out=shifted), out=shifted)
            entropies[rows] = log_total - shifted.sum(axis=-1) / total
    if gradient is not None:
        gradient[np.arange(len(gradient)), chosen] += factor
    return mx.array(logprobs), mx.array(entropies)


@_statistics.vjp
def _statistics_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, mx.array], _: tuple[mx.array, mx.array]
) -> tuple[mx.array, ...]:
    logits, tokens, inverse, *support = primals
    values, factor = np.asarray(logits), np.float32(np.asarray(inverse))
    by_logprob, by_entropy = (np.asarray(cotangent) * factor for cotangent in cotangents)
    gradient, sets = np.empty_like(values), [np.asarray(words) for words in support]
    for rows in _pieces(values):
        shifted, masses, total = _softmax(values[rows], factor, *(words[rows] for words in sets))
        masses /= total[:, None]
        if by_entropy[rows].any():
            np.subtract(shifted, np.log(total)[:, None], out=shifted)
            surprise = np.maximum(shifted, _LOWEST, out=shifted)
            entropies = -(masses * surprise).sum(axis=-1, keepdims=True)
            gradient[rows] = masses * (-by_entropy[rows, None] * (surprise + entropies) - by_logprob[rows, None])
        else:
            np.multiply(masses, -by_logprob[rows, None], out=gradient[rows])
    gradient[np.arange(len(gradient)), np.asarray(tokens)] += by_logprob
    return mx.array(gradient), *map(mx.zeros_like, primals[1:])


def _pieces(values: Floats) -> Iterator[slice]:
    """Rows to work on at once, so that what lies between stays in the processor's cache."""
    count = max(1, _PIECE // values.shape[-1])
    return (slice(start, start + count) for start in range(0, len(values), count))


def _softmax(values: Floats, factor: np.float32, *support: Numbers) -> tuple[Floats, Floats, Floats]:
    """Logits times a factor, less their maximum; their exponentials; and the sums of those."""
    shifted = values * factor
    for words in support:
        np.putmask(shifted, outside_of(words, shifted.shape[-1]), np.float32(-np.inf))
    shifted -= shifted.max(axis=-1, keepdims=True)
    masses = np.exp(shifted)
    return shifted, masses, masses.sum(axis=-1)


def _planned(logits: mx.array, tokens: mx.array, inverse: mx.array, *support: mx.array) -> tuple[mx.array, mx.array]:
    """Gathering has the gradient that the statistics have, one array [N, V].

    Numpy works by pieces: on shifted logits, their exponentials and a third array, and where there are sets on their
    bits, a byte each, twice; the gradient is whole.
    """
    piece = min(logits.nbytes, max(logits.shape[-1], _PIECE) * 4)
    pieces = 3 * piece + (piece // 2 if support else 0)
    work = Work(pieces, pieces + logits.nbytes)
    index = outside(tokens[:, None].astype(mx.int32), [logits, tokens, inverse, *support], work)
    picked = mx.take_along_axis(logits, index, axis=-1).squeeze(-1)
    return picked, picked * 1.0


_apart, _summed = planned(_statistics, _planned), planned(_summed_statistics, _planned)
