"""The output layer's log-probabilities on a CPU: each chunk is evaluated, and cut off from its graph.

Numpy makes mlx evaluate, and mlx keeps all that it evaluates while it traces a gradient, for as long as results live.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.cpu.common_blocks import output_of
from mlx_ppo.compute.cpu.vocabulary import vocabulary_statistics
from mlx_ppo.compute.engine import Body
from mlx_ppo.compute.needs import Inside, Work, made_outside, planned
from mlx_ppo.compute.output_head import OutputHead, Statistics, one_ahead


class CpuHead(OutputHead):
    """`OutputHead` in numpy where mlx is slow."""

    always_ahead = True

    def vocabulary(
        self,
        logits: mx.array,
        tokens: mx.array,
        support: mx.array | None = None,
        *,
        temperature: float,
        summed: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """By numpy."""
        return vocabulary_statistics(logits, tokens, support, temperature=temperature, summed=summed)

    def logits(self, body: Body, states: mx.array) -> mx.array:
        """As the model's; a plain matrix that learns gets a gradient that lies as it does.

        mlx's own lies transposed, and adding the embedding's, where both are one matrix, takes longer than the product.
        """
        if not body.replaced or not body.capabilities.steps:
            return body.logits(states)
        layer = output_of(body)
        if "bias" in layer:
            return body.logits(states)
        logits: mx.array = _times(states, layer.weight)
        return logits

    def apart(self, array: mx.array) -> mx.array:
        """A copy that knows of no graph."""
        return copied(array)

    def added(self, total: mx.array | None, part: mx.array) -> mx.array:
        """The sum in the memory of the total, which nobody else has seen."""
        given = np.asarray(part.astype(mx.float32))
        if total is None:  # it lies as the parts do, transposed or not, or adding would take four times as long
            return mx.array(given.T).T if given.flags.f_contiguous else mx.array(given)
        values = np.asarray(total)
        values += given
        return total

    def planned_chunks(
        self, statistics: Statistics, size: int, ahead: bool, states: mx.array, asked: mx.array, *arrays: mx.array
    ) -> Sequence[mx.array]:
        """A chunk by itself, and what is left of it."""

        def one(states: mx.array, *arrays: mx.array) -> Sequence[mx.array]:
            own = mx.zeros((len(states), *asked.shape[1:]), asked.dtype)
            return one_ahead(statistics, states, own) if ahead else statistics(states, own, *arrays)

        def gradient(states: mx.array, *arrays: mx.array) -> list[mx.array]:
            own, given = mx.zeros((len(states), *asked.shape[1:]), asked.dtype), [states, *arrays]
            cotangents = [mx.zeros(len(states)), mx.zeros(len(states))]
            values, made = mx.vjp(lambda states, *arrays: statistics(states, own, *arrays), given, cotangents)
            return [*values, *made, *(mx.zeros(array.shape) for array in arrays)]

        chunk = [
            mx.zeros((size, states.shape[-1]), states.dtype),
            *(mx.zeros(array.shape, array.dtype) for array in arrays),
        ]
        parts = states.nbytes * (len(states) - size) // len(states)  # gradients by the states of the chunks before
        forward = Inside(one, chunk, states.nbytes + (parts if ahead else 0))
        work = Work(0, 0, 0, 0, (forward, None if ahead else Inside(gradient, chunk, states.nbytes + parts)))
        picked = [made_outside(array, 1, [array], Work(0, 0)).sum() for array in arrays]
        kept = made_outside(states, states.shape[-1] if ahead else 1, [states, asked], work)
        logprobs = (kept * mx.stop_gradient(kept)).sum(axis=-1).astype(mx.float32) + sum(picked, mx.zeros(()))
        return logprobs, logprobs * 1.0


def copied(array: mx.array) -> mx.array:
    """The same values in an array that knows of no graph."""
    half = array.dtype in (mx.bfloat16, mx.float16)  # numpy has no bfloat16; float32 holds both exactly
    return mx.array(np.asarray(array.astype(mx.float32) if half else array)).astype(array.dtype)


@mx.custom_function
def _product(states: mx.array, matrix: mx.array) -> mx.array:
    return states @ matrix.T


@_product.vjp
def _product_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    states, matrix = primals
    return cotangent @ matrix, cotangent.T @ states


_times = planned(_product, lambda states, matrix: states @ matrix.T)
