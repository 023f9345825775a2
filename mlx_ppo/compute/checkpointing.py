"""Gradient checkpointing: a block keeps what enters it, and its inside is computed again for the gradient.

Source: Chen et al. 2016, arXiv:1604.06174.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_ppo.compute.adapted import parameters_of
from mlx_ppo.compute.needs import Inside, Work, made_outside, planned, planned_gradient

Function = Callable[..., mx.array]


def checkpointed(
    block: nn.Module, *, trained: bool, twice: Callable[[Function], Function], computing: Callable[[], Any]
) -> Function:
    """A function that does what the block does.

    Gradients flow to the states that enter and to the weights that are on the block at the call: its attached adapters
    and, if these are `trained`, its parameters. They are put on the block once more while it is computed again, which
    is after the caller has taken them off.

    Args:
        block: of a model.
        trained: the block's own parameters learn. A frozen block's may be quantised, and have no gradient.
        twice: makes a function of arrays whose inside is computed again for the gradient.
        computing: a context around whatever is computed.
    """

    def call(states: mx.array, *given: Any, **named: Any) -> mx.array:
        layers = [layer for layer in block.modules() if getattr(layer, "attached", None) is not None]
        scales = [layer.attached[2] for layer in layers]
        own = parameters_of(block) if trained else {}
        names = list(own)
        arrays = [array for layer in layers for array in layer.attached[:2]] + list(own.values())

        def inside(states: mx.array, *arrays: mx.array) -> mx.array:
            pairs = [arrays[at : at + 2] for at in range(0, 2 * len(layers), 2)]
            attached = [(a, b, scale) for (a, b), scale in zip(pairs, scales, strict=True)]
            parameters = tree_unflatten(list(zip(names, arrays[2 * len(layers) :], strict=True)))
            around: AbstractContextManager[None] = computing()
            with _carrying(block, layers, attached, parameters if names else {}), around:
                after: mx.array = block(states, *given, **named)
            return after

        return twice(inside)(states, *arrays)

    return call


def twice_in_mlx(inside: Function) -> Function:
    """The same function of arrays, by `mx.checkpoint`."""

    def gradient(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], _: Sequence[mx.array]
    ) -> Sequence[mx.array]:
        found: Sequence[mx.array] = mx.vjp(inside, mx.depends(list(primals), list(cotangents)), list(cotangents))[1]
        return found

    def stand_in(*primals: mx.array) -> mx.array:
        key = ("block", *((primal.shape, primal.dtype) for primal in primals))
        return planned_gradient(lambda *given: [inside(*given)], gradient, primals, key)[0]

    return planned(mx.checkpoint(inside), stand_in)


def planned_twice(inside: Function) -> Function:
    """What a block allocates that is evaluated at once, for a planner: by itself, and again with its gradient.

    It works on copies of what it is given.
    """

    def gradient(cotangent: mx.array, *primals: mx.array) -> Sequence[mx.array]:
        values, gradients = mx.vjp(inside, list(primals), [cotangent])
        return [*values, *gradients]  # the values too: what computes them outside of mlx does so whoever asks

    def function(*primals: mx.array) -> mx.array:
        states, *arrays = primals
        like = [mx.zeros(primal.shape, primal.dtype) for primal in primals]
        key = tuple((primal.shape, primal.dtype) for primal in primals)
        beside = sum(primal.nbytes for primal in primals)
        forward = Inside(inside, like, beside, ("block", key))
        backward = Inside(gradient, [like[0], *like], beside + states.nbytes, ("gradient", key))
        picked = [made_outside(array, 1, [array], Work(0, 0)).sum() for array in arrays]
        kept = made_outside(states, states.shape[-1], [states], Work(0, 0, 0, 0, (forward, backward)))
        return kept + sum(picked, mx.zeros((), kept.dtype)).astype(kept.dtype)

    return function


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
