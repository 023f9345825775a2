"""Gradient checkpointing: a block keeps what enters it, and its inside is computed again for the gradient.

Source: Chen et al. 2016, arXiv:1604.06174.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Adapter = tuple[mx.array, mx.array]


def checkpointed(block: nn.Module) -> Callable[..., mx.array]:
    """A function that does what the block does.

    Gradients flow to the states that enter and to the weights that are on the block at the call: its attached adapters
    or, where there are none, its parameters. These weights are put on the block once more while it is computed again,
    which is after the caller has taken them off.
    """

    def call(states: mx.array, *given: Any, **named: Any) -> mx.array:
        layers = [layer for layer in block.modules() if getattr(layer, "attached", None) is not None]
        scales = [layer.attached[2] for layer in layers]
        parameters: dict[str, Any] = {} if layers else block.parameters()

        def inside(states: mx.array, adapters: list[Adapter], parameters: dict[str, Any]) -> mx.array:
            attached = [(a, b, scale) for (a, b), scale in zip(adapters, scales, strict=True)]
            with _carrying(block, layers, attached, parameters):
                after: mx.array = block(states, *given, **named)
            return after

        after: mx.array = mx.checkpoint(inside)(states, [layer.attached[:2] for layer in layers], parameters)
        return after

    return call


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
