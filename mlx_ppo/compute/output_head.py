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

from mlx_ppo.algo.logprobs import logprobs_and_entropy
from mlx_ppo.algo.truncation import limited
from mlx_ppo.compute.engine import Body
from mlx_ppo.compute.needs import is_traced, own_gradient

_TOGETHER = 64_000_000  # bytes of float32 logits
_LOWEST = -1e30  # in place of the minus infinity of a token that cannot be, whose mass 0 it is multiplied by

# (states [C, D], asked [C] or [C, 1 + W], see `_asked`, *arrays) -> [C], [C]
Statistics = Callable[..., tuple[mx.array, mx.array]]


class OutputHead:
    """Log-probabilities by chunks, in mlx; an engine may compute parts of it otherwise."""

    # Take the gradient along also where all positions are one chunk; that of `summed` statistics is then right for any
    # weighted sum of the log-probabilities.
    always_ahead = False

    def statistics(
        self,
        body: Body,
        states: mx.array,
        tokens: mx.array,
        *,
        temperature: float,
        support: mx.array | None = None,
        learning: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Log-probabilities and entropies [N], in nats, of tokens [N] that states [N, D] predict.

        Args:
            body: with the role's weights on it; `body.positions` rows are worked on together.
            states: after the final norm.
            tokens: integers.
            temperature: of the sampling distribution.
            support: [N, ceil(V / 32)] uint32, the tokens that could be drawn, see `algo.truncation`; None: all.
            learning: a gradient by the log-probabilities will be taken, and the entropies not be read: they may be NaN.
                Gradients are the same without; the logits are then computed again for them, or kept where they are few.
        """
        if not len(states):
            return mx.zeros((0,)), mx.zeros((0,))
        size = self._together(body, states)
        ahead = learning and not body.replaced and len(states) > (0 if self.always_ahead else size)
        if len(states) <= size and not ahead:
            summed = learning and self.always_ahead
            return self.vocabulary(self.logits(body, states), tokens, support, temperature=temperature, summed=summed)
        names = _names_read(body, states) if body.replaced else ()

        def statistics(
            states: mx.array, asked: mx.array, *arrays: mx.array, summed: bool = False
        ) -> tuple[mx.array, mx.array]:
            with body.bearing(dict(zip(names, arrays, strict=True))):
                logits = self.logits(body, states)
                return self.vocabulary(logits, *_parts(asked), temperature=temperature, summed=summed)

        by_chunks, asked = self.planned_chunks if is_traced() else self._by_chunks, _asked(tokens, support)
        found = by_chunks(statistics, size, ahead, states, asked, *(body.replaced[name] for name in names))
        return found[0], found[1]

    def vocabulary(
        self,
        logits: mx.array,
        tokens: mx.array,
        support: mx.array | None = None,
        *,
        temperature: float,
        summed: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Log-probabilities [N] of tokens [N] and entropies [N], in nats, under softmax(logits [N, V] / temperature).

        With a support, of the distribution on it: other logits count as minus infinity, and have gradient 0.

        d log p_a / d z_j = ([j = a] - p_j) / temperature,   d H / d z_j = -p_j (log p_j + H) / temperature

        `summed`: whatever gradient is taken is that of the sum of the log-probabilities, which is computed along; the
        entropies aren't read, and may be NaN.
        """
        if not summed:
            within = logits if support is None else limited(logits, support)
            return logprobs_and_entropy(within, tokens, temperature=temperature)
        given = logits.astype(mx.float32), tokens, mx.array(1.0 / temperature)
        found = _summed(*given) if support is None else _summed(*given, support)
        return found[0], found[1]

    def logits(self, body: Body, states: mx.array) -> mx.array:
        """Logits [C, V] of states [C, D]."""
        return body.logits(states)

    def apart(self, array: mx.array) -> mx.array:
        """The same values; where what is evaluated in a gradient's trace would stay in memory, without its graph."""
        return array

    def added(self, total: mx.array | None, part: mx.array) -> mx.array:
        """The sum in float32 of what there was, if anything, and a part; the total may be used up."""
        part = part.astype(mx.float32)
        return part if total is None else total + part

    def planned_chunks(
        self, statistics: Statistics, size: int, ahead: bool, states: mx.array, asked: mx.array, *arrays: mx.array
    ) -> Sequence[mx.array]:
        """What stands for `_by_chunks` while a planner traces: itself, unless an engine leaves mlx there."""
        return self._by_chunks(statistics, size, ahead, states, asked, *arrays)

    def _together(self, body: Body, states: mx.array) -> int:
        """How many positions to work on together: at most what is set, and about equally many each time."""
        vocabulary = body.logits(states[:1]).shape[-1]  # a shape is known without computing
        count = -(-len(states) // (body.positions or max(1, _TOGETHER // (4 * vocabulary))))
        return -(-len(states) // max(1, count))

    def _by_chunks(
        self, statistics: Statistics, size: int, ahead: bool, states: mx.array, asked: mx.array, *arrays: mx.array
    ) -> Sequence[mx.array]:
        """What `statistics` gives for all states, and, `ahead`, d log-probability / d state; with gradients."""

        def forward(states: mx.array, asked: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
            return self._forward(statistics, size, ahead, states, asked, *arrays)

        def gradient(
            primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
        ) -> tuple[mx.array, ...]:
            states, asked, *arrays = primals
            by_logprob, by_entropy = cotangents[:2]
            if ahead:  # nobody reads the entropies then
                return self.apart((by_logprob[:, None] * outputs[2]).astype(states.dtype)), mx.zeros_like(asked)
            found: list[Sequence[mx.array]] = []
            totals: Sequence[mx.array] = ()
            for part, chunk in _chunks(self.apart(states), size, found):
                by_part = [by_logprob[part], by_entropy[part]]
                pulled, totals = self._pulled_back(_for(statistics, asked[part]), [chunk, *arrays], by_part, totals)
                found.append([pulled, *totals])
            by_states = mx.concatenate([parts[0] for parts in found])
            by_arrays = (total.astype(array.dtype) for total, array in zip(totals, arrays, strict=True))
            return by_states, mx.zeros_like(asked), *by_arrays

        return own_gradient(forward, gradient)(states, asked, *arrays)

    def _forward(
        self, statistics: Statistics, size: int, ahead: bool, states: mx.array, asked: mx.array, *arrays: mx.array
    ) -> tuple[mx.array, ...]:
        """Chunk by chunk; each waits for the one before, or mlx would begin with the logits of all."""
        found: list[Sequence[mx.array]] = []
        for part, chunk in _chunks(self.apart(states), size, found):
            if ahead:
                found.append([*map(self.apart, one_ahead(statistics, chunk, asked[part]))])
            else:
                found.append([*map(self.apart, statistics(chunk, asked[part], *arrays))])
        return tuple(mx.concatenate(list(column)) for column in zip(*found, strict=True))

    def _pulled_back(
        self,
        function: Callable[..., tuple[mx.array, mx.array]],
        given: list[mx.array],
        cotangents: list[mx.array],
        totals: Sequence[mx.array],
    ) -> tuple[mx.array, list[mx.array]]:
        """The gradient by the states, and those by the arrays added to totals; nothing else outlives the call."""
        gradient, *others = mx.vjp(function, given, cotangents)[1]
        before: Sequence[mx.array | None] = totals or [None] * len(others)
        return self.apart(gradient), [*map(self.added, before, others)]


def _asked(tokens: mx.array, support: mx.array | None) -> mx.array:
    """What is asked of each position, in one array: its token [N], or token and set of tokens [N, 1 + W] uint32."""
    if support is None:
        return tokens
    return mx.concatenate([tokens[:, None].astype(mx.uint32), support], axis=1)


def _parts(asked: mx.array) -> tuple[mx.array, ...]:
    """Of `_asked` the tokens [N], and the sets [N, W] where there are any."""
    return (asked,) if asked.ndim == 1 else (asked[:, 0].astype(mx.int32), asked[:, 1:])


def one_ahead(statistics: Statistics, states: mx.array, asked: mx.array) -> tuple[mx.array, ...]:
    """Log-probabilities and entropies [C], and the former's gradients by the states [C, D]."""

    def function(states: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        logprobs, entropies = statistics(states, asked, summed=True)
        return logprobs.sum(), logprobs, entropies

    (_, logprobs, entropies), gradient = mx.value_and_grad(function)(states)
    return logprobs, entropies, gradient


def _names_read(body: Body, states: mx.array) -> tuple[str, ...]:
    """Names of those of a role's own parameters that the head reads."""
    records: list[dict[str, Any]] = []

    def logits(states: mx.array, *arrays: mx.array) -> mx.array:
        with body.bearing(dict(zip(body.replaced, arrays, strict=True))):
            return body.logits(states)

    mx.export_function(records.append, logits, mx.zeros(states[:1].shape, states.dtype), *body.replaced.values())
    given = next(record["inputs"] for record in records if record["type"] == "inputs")[1:]
    read = {tensor[0] for record in records if record["type"] == "primitive" for tensor in record["inputs"]}
    return tuple(name for name, tensor in zip(body.replaced, given, strict=True) if tensor[0] in read)


def _chunks(states: mx.array, size: int, found: Sequence[Sequence[mx.array]]) -> Iterator[tuple[slice, mx.array]]:
    """Slices and the states there; each chunk waits for what was last put into `found`."""
    for start in range(0, len(states), size):
        chunk = states[start : start + size]
        if found:
            (chunk,) = mx.depends([chunk], list(found[-1]))
        yield slice(start, start + size), chunk


def _for(statistics: Statistics, asked: mx.array) -> Callable[..., tuple[mx.array, mx.array]]:
    return lambda states, *arrays: statistics(states, asked, *arrays)


def _summed_forward(
    logits: mx.array, tokens: mx.array, inverse: mx.array, *support: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Log-probabilities, entropies, and the gradient [N, V] of each log-probability by its logits."""
    if support:
        logits = limited(logits, *support)
    scaled = (logits - logits.max(axis=-1, keepdims=True)) * inverse
    masses, log_total = mx.softmax(scaled, axis=-1), mx.logsumexp(scaled, axis=-1)
    logprobs = mx.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0] - log_total
    entropies = log_total - (masses * mx.maximum(scaled, _LOWEST)).sum(axis=-1)
    (masses,) = mx.depends([masses], [logprobs, entropies])
    gradient = (masses * -inverse).at[mx.arange(len(tokens)), tokens].add(inverse)
    return logprobs, entropies, gradient


def _summed_gradient(
    primals: Sequence[mx.array], cotangents: Sequence[mx.array], results: Sequence[mx.array]
) -> tuple[mx.array, ...]:
    return results[2], *map(mx.zeros_like, primals[1:])


_summed = own_gradient(_summed_forward, _summed_gradient)
