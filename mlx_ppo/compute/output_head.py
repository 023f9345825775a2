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

from mlx_ppo.compute.checkpointing import copied
from mlx_ppo.compute.cpu.common_blocks import output_of
from mlx_ppo.compute.cpu.vocabulary import vocabulary_statistics
from mlx_ppo.compute.device import on_cpu
from mlx_ppo.models.trunk import Trunk

_TOGETHER = 64_000_000  # bytes of float32 logits

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
        learning: a gradient by the log-probabilities will be taken, and the entropies not be read: they may be NaN.
            Gradients are the same without; the logits are then computed again for them, or kept where they are few.
    """
    size = _together(trunk, states)
    ahead = learning and not trunk.replaced and len(states) > (0 if on_cpu() else size)
    if len(states) <= size and not ahead:
        return vocabulary_statistics(_logits(trunk, states), tokens, temperature=temperature)
    names = _names_read(trunk, states) if trunk.replaced else ()

    def statistics(
        states: mx.array, tokens: mx.array, *arrays: mx.array, summed: bool = False
    ) -> tuple[mx.array, mx.array]:
        with trunk.bearing(dict(zip(names, arrays, strict=True))):
            return vocabulary_statistics(_logits(trunk, states), tokens, temperature=temperature, summed=summed)

    found = _by_chunks(statistics, size, ahead, states, tokens, *(trunk.replaced[name] for name in names))
    return found[0], found[1]


def _logits(trunk: Trunk, states: mx.array) -> mx.array:
    """As `Trunk.logits`; a plain matrix that learns gets a gradient that lies as it does.

    mlx's own lies transposed, and adding the embedding's, where both are one matrix, takes longer than the product.
    """
    if not trunk.replaced or not trunk.reads_steps:
        return trunk.logits(states)
    layer = output_of(trunk)
    if "bias" in layer:
        return trunk.logits(states)
    logits: mx.array = _times(states, layer.weight)  # type: ignore[assignment]
    return logits


@mx.custom_function
def _times(states: mx.array, matrix: mx.array) -> mx.array:
    return states @ matrix.T


@_times.vjp
def _times_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    states, matrix = primals
    return cotangent @ matrix, cotangent.T @ states


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


def _by_chunks(
    statistics: Statistics, size: int, ahead: bool, states: mx.array, tokens: mx.array, *arrays: mx.array
) -> Sequence[mx.array]:
    """What `statistics` gives for all states, and, `ahead`, d log-probability / d state; with gradients."""

    @mx.custom_function
    def function(states: mx.array, tokens: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        return forward(statistics, size, ahead, states, tokens, *arrays)

    @function.vjp
    def _(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> tuple[mx.array, ...]:
        states, tokens, *arrays = primals
        by_logprob, by_entropy = cotangents[:2]
        if ahead and not by_entropy.any().item():
            return _apart((by_logprob[:, None] * outputs[2]).astype(states.dtype)), mx.zeros_like(tokens)
        found: list[Sequence[mx.array]] = []
        totals: Sequence[mx.array] = ()
        for part, chunk in _chunks(_apart(states), size, found):
            by_part = [by_logprob[part], by_entropy[part]]
            slopes, totals = _pulled_back(_for(statistics, tokens[part]), [chunk, *arrays], by_part, totals)
            found.append([slopes, *totals])
        by_states = mx.concatenate([parts[0] for parts in found])
        by_arrays = (total.astype(array.dtype) for total, array in zip(totals, arrays, strict=True))
        return by_states, mx.zeros_like(tokens), *by_arrays

    found: Sequence[mx.array] = function(states, tokens, *arrays)  # type: ignore[assignment]
    return found


def forward(
    statistics: Statistics, size: int, ahead: bool, states: mx.array, tokens: mx.array, *arrays: mx.array
) -> tuple[mx.array, ...]:
    """Chunk by chunk.

    Each chunk waits for the one before; otherwise mlx would begin with the logits of all. On the CPU, where numpy makes
    mlx evaluate, they are evaluated one by one, and cut off from their graph: mlx keeps all that it evaluates while it
    traces a gradient, for as long as results live.
    """
    found: list[Sequence[mx.array]] = []
    for part, chunk in _chunks(_apart(states), size, found):
        if ahead:
            found.append([*map(_apart, one_ahead(statistics, chunk, tokens[part]))])
        else:
            found.append([*map(_apart, statistics(chunk, tokens[part], *arrays))])
    return tuple(mx.concatenate(list(column)) for column in zip(*found, strict=True))


def one_ahead(statistics: Statistics, states: mx.array, tokens: mx.array) -> tuple[mx.array, ...]:
    """Log-probabilities and entropies [C], and the former's gradients by the states [C, D]."""

    def function(states: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        logprobs, entropies = statistics(states, tokens, summed=True)
        return logprobs.sum(), logprobs, entropies

    (_, logprobs, entropies), slopes = mx.value_and_grad(function)(states)
    return logprobs, entropies, slopes


def _pulled_back(
    function: Callable[..., tuple[mx.array, mx.array]],
    given: list[mx.array],
    cotangents: list[mx.array],
    totals: Sequence[mx.array],
) -> tuple[mx.array, list[mx.array]]:
    """The gradient by the states, and those by the arrays added to totals, if any; nothing else outlives the call."""
    slopes, *others = mx.vjp(function, given, cotangents)[1]
    before: Sequence[mx.array | None] = totals or [None] * len(others)
    return _apart(slopes), [*map(_added, before, others)]


def _chunks(states: mx.array, size: int, found: Sequence[Sequence[mx.array]]) -> Iterator[tuple[slice, mx.array]]:
    """Slices and the states there; each chunk waits for what was last put into `found`."""
    for start in range(0, len(states), size):
        chunk = states[start : start + size]
        if found:
            (chunk,) = mx.depends([chunk], list(found[-1]))
        yield slice(start, start + size), chunk


def _apart(array: mx.array) -> mx.array:
    return copied(array) if on_cpu() else array


def _added(total: mx.array | None, part: mx.array) -> mx.array:
    """The sum in float32; on the CPU in the memory of the total, which nobody else has seen."""
    part = part.astype(mx.float32)
    if not on_cpu():
        return part if total is None else total + part
    given = np.asarray(part)
    if total is None:  # it lies as the parts do, transposed or not, or adding would take four times as long
        return mx.array(given.T).T if given.flags.f_contiguous else mx.array(given)
    values = np.asarray(total)
    values += given
    return total


def _for(statistics: Statistics, tokens: mx.array) -> Callable[..., tuple[mx.array, mx.array]]:
    return lambda states, *arrays: statistics(states, tokens, *arrays)
