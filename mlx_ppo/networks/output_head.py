"""From states to log-probabilities, some positions at a time, so that the logits of all positions are never there.

Positions don't depend on each other. The gradient of a sum of log-probabilities by the states therefore has in row n
the gradient of log-probability n alone: it can be taken while the logits of some positions are there anyway, and what
comes back in the backward pass is one number a position to multiply it by. Nothing of the vocabulary's size is kept,
and nothing computed twice.

Source: Hsu et al. 2024, arXiv:2410.10989, section 3.2 (fused linear and cross-entropy, by chunks).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ppo.networks.checkpointing import copied
from mlx_ppo.networks.trunk import Trunk
from mlx_ppo.networks.vocabulary import vocabulary_statistics

_TOGETHER = 64 << 20  # bytes of float32 logits

Floats = np.ndarray[Any, np.dtype[np.float32]]
Statistics = Callable[..., tuple[mx.array, mx.array]]  # (states [C, D], tokens [C], *arrays) -> [C], [C]


def head_statistics(
    trunk: Trunk, states: mx.array, tokens: mx.array, *, temperature: float, learning: bool = False
) -> tuple[mx.array, mx.array]:
    """Log-probabilities and entropies [N], in nats, of tokens [N] that states [N, D] predict.

    Args:
        trunk: with the role's weights on it; `trunk.positions` rows are worked on together.
        states: after the final norm.
        tokens: integers.
        temperature: of the sampling distribution.
        learning: a gradient by the log-probabilities, and not by the entropies, will be taken. Gradients are the same
            without; the logits are then computed again for them, or kept where they are few.
    """
    names = _names_read(trunk, states) if trunk.replaced else ()
    size = _together(trunk, states)
    ahead = learning and not names
    if len(states) <= size and not ahead:
        return vocabulary_statistics(trunk.logits(states), tokens, temperature=temperature)

    def statistics(states: mx.array, tokens: mx.array, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        with trunk.bearing(dict(zip(names, arrays, strict=True))):
            return vocabulary_statistics(trunk.logits(states), tokens, temperature=temperature)

    found = _by_chunks(statistics, size, ahead)(states, tokens, *(trunk.replaced[name] for name in names))
    return found[0], found[1]


def _together(trunk: Trunk, states: mx.array) -> int:
    """How many positions to work on together: at most what is set, and about equally many each time."""
    vocabulary = trunk.logits(states[:1]).shape[-1]  # a shape is known without computing
    count = -(-len(states) // (trunk.positions or max(1, _TOGETHER // (4 * vocabulary))))
    return -(-len(states) // max(1, count))


def _names_read(trunk: Trunk, states: mx.array) -> tuple[str, ...]:
    """Names of those of a role's own parameters that the head reads."""
    records: list[dict[str, Any]] = []

    def logits(states: mx.array, *arrays: mx.array) -> mx.array:
        with trunk.bearing(dict(zip(trunk.replaced, arrays, strict=True))):
            return trunk.logits(states)

    mx.export_function(records.append, logits, mx.zeros(states[:1].shape, states.dtype), *trunk.replaced.values())
    given = next(record["inputs"] for record in records if record["type"] == "inputs")[1:]
    read = {tensor[0] for record in records if record["type"] == "primitive" for tensor in record["inputs"]}
    return tuple(name for name, tensor in zip(trunk.replaced, given, strict=True) if tensor[0] in read)


def _by_chunks(statistics: Statistics, size: int, ahead: bool) -> Callable[..., Sequence[mx.array]]:
    """A function of (states, tokens, *arrays) that evaluates `statistics` by chunks, with gradients by states and arrays.

    What it returns knows of no graph, because mlx keeps all that it evaluates while it traces a gradient, for as long
    as results live.
    """

    def rows(count: int) -> Iterator[slice]:
        return (slice(start, start + size) for start in range(0, count, size))

    @mx.custom_function
    def function(states: mx.array, tokens: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        given = copied(states)
        logprobs, entropies = np.empty(len(given), np.float32), np.empty(len(given), np.float32)
        slopes = np.empty(given.shape if ahead else (0, 0), np.float32)  # d log-probability / d state
        for part in rows(len(given)):
            found: Sequence[mx.array]
            if ahead:
                found, slope = mx.value_and_grad(_summed(statistics, tokens[part]))(given[part])
                slopes[part] = _values(slope)
                found = found[1:]
            else:
                found = statistics(given[part], tokens[part], *arrays)
            mx.eval(found)
            logprobs[part], entropies[part] = map(_values, found)
        return mx.array(logprobs), mx.array(entropies), mx.array(slopes)

    @function.vjp
    def _(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> tuple[mx.array, ...]:
        states, tokens, *arrays = primals
        by_logprob, by_entropy = cotangents[:2]
        none = mx.zeros_like(tokens)
        if ahead and not np.asarray(by_entropy).any():
            return ((by_logprob[:, None] * outputs[2]).astype(states.dtype), none)
        given = copied(states)
        by_states = np.empty(given.shape, np.float32)
        totals = [np.zeros(array.shape, np.float32) for array in arrays]
        for part in rows(len(given)):
            function = _for(statistics, tokens[part])
            _, gradients = mx.vjp(function, [given[part], *arrays], [by_logprob[part], by_entropy[part]])
            by_states[part] = _values(gradients[0])
            for total, gradient in zip(totals, gradients[1:], strict=True):
                total += _values(gradient)
        made = [mx.array(total).astype(array.dtype) for total, array in zip(totals, arrays, strict=True)]
        return (mx.array(by_states).astype(states.dtype), none, *made)

    return function  # type: ignore[return-value]


def _for(statistics: Statistics, tokens: mx.array) -> Callable[..., tuple[mx.array, mx.array]]:
    return lambda states, *arrays: statistics(states, tokens, *arrays)


def _summed(statistics: Statistics, tokens: mx.array) -> Callable[[mx.array], tuple[mx.array, mx.array, mx.array]]:
    def function(states: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        logprobs, entropies = statistics(states, tokens)
        return logprobs.sum(), logprobs, entropies

    return function


def _values(array: mx.array) -> Floats:
    return np.asarray(array.astype(mx.float32))
