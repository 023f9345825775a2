"""Gradient checkpointing: a block keeps what enters it, and its inside is computed again for the gradient.

Source: Chen et al. 2016, arXiv:1604.06174.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_ppo.compute.cpu.attention import fast_attention
from mlx_ppo.compute.device import on_cpu
from mlx_ppo.models.adapters import parameters_of


def checkpointed(block: nn.Module) -> Callable[..., mx.array]:
    """A function that does what the block does.

    Gradients flow to the states that enter and to the weights that are on the block at the call: its attached adapters
    or, where there are none, its parameters. These weights are put on the block once more while it is computed again,
    which is after the caller has taken them off.
    """

    def call(states: mx.array, *given: Any, **named: Any) -> mx.array:
        layers = [layer for layer in block.modules() if getattr(layer, "attached", None) is not None]
        scales = [layer.attached[2] for layer in layers]
        own = {} if layers else parameters_of(block)
        names = list(own)
        arrays = [array for layer in layers for array in layer.attached[:2]] + list(own.values())

        def inside(states: mx.array, *arrays: mx.array) -> mx.array:
            pairs = [arrays[at : at + 2] for at in range(0, 2 * len(layers), 2)]
            attached = [(a, b, scale) for (a, b), scale in zip(pairs, scales, strict=True)]
            parameters = tree_unflatten(list(zip(names, arrays[2 * len(layers) :], strict=True)))
            with _carrying(block, layers, attached, parameters if names else {}), fast_attention():
                after: mx.array = block(states, *given, **named)
            return after

        return twice(inside)(states, *arrays)

    return call


def twice(inside: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The same function of arrays; its inside is computed again for the gradient, of which nothing else is kept."""
    return _by_itself(inside) if on_cpu() else cast(Callable[..., mx.array], mx.checkpoint(inside))


def _by_itself(inside: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The same function, whose inside is evaluated at once, both ways, and leaves nothing in memory.

    mlx keeps every array that it evaluates while it traces a gradient, for as long as its results live; and the numpy
    code of this project makes it evaluate. So what goes in and comes out here are copies that know of no graph.
    """

    @mx.custom_function
    def function(*primals: mx.array) -> mx.array:
        return copied(inside(*map(copied, primals)))

    @function.vjp
    def _(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        found = mx.vjp(inside, [copied(primal) for primal in primals], [copied(cotangent)])[1]
        return tuple(copied(gradient) for gradient in found)

    return cast(Callable[..., mx.array], function)


def copied(array: mx.array) -> mx.array:
    """The same values in an array that knows of no graph."""
    half = array.dtype in (mx.bfloat16, mx.float16)  # numpy has no bfloat16; float32 holds both exactly
    return mx.array(np.asarray(array.astype(mx.float32) if half else array)).astype(array.dtype)


@contextmanager
def _carrying(
    block: nn.Module, layers: Sequence[nn.Module], attached: Sequence[Any], parameters: dict[str, Any]
) -> Iterator[None]:
    """Weights on a block for the length of a `with` block; what was on it comes back."""
    before = [layer.attached for layer in layers]
    held = block.parameters() if parameters else {}
    try:
        for layer, weights in zip(layers, attached, strict=True):
            object.__setattr__(layer, "attached", weights)
        block.update(parameters)
        yield
    finally:
        for layer, weights in zip(layers, before, strict=True):
            object.__setattr__(layer, "attached", weights)
        block.update(held)
