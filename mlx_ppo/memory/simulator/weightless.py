"""Models without weights, and arrays that are there but take no memory, for what is traced."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_ppo.models.parts import placeholder


def weightless(model: nn.Module) -> nn.Module:
    """Put in place of each of a model's arrays an evaluated one of the same shape and type that takes four bytes.

    The model can then be captured by functions to be traced, without its weights being loaded; its outputs mean
    nothing, and computing them would allocate whole weights. Changes and returns `model`.
    """
    model.update(tree_map(placeholder, model.parameters()))
    return model


def present(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """An array that is in memory already, as far as a trace can see; it takes no more than an element."""
    array = mx.broadcast_to(mx.zeros((), dtype), shape)
    mx.eval(array)
    return array


@contextmanager
def spelt_out() -> Iterator[None]:
    """Switch `mx.compile` off for the length of a `with` block, because mlx can't trace what it makes."""
    if not _compiling():
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def _compiling() -> bool:
    """Whether `mx.compile` is on; mlx has no way to ask, but what is compiled runs in Python just once."""
    runs: list[int] = []

    def count(array: mx.array) -> mx.array:
        runs.append(1)
        return array + 1

    compiled = mx.compile(count)
    compiled(mx.zeros(()))
    compiled(mx.zeros(()))
    return len(runs) == 1
