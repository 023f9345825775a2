"""Models without weights, and arrays that are there but take no memory, for what is traced."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_ppo.compute.needs import tracing
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


def shapes_of_call(function: Callable[..., Any], *arrays: mx.array) -> Any:
    """What a function of arrays returns, of which shapes and types mean something; nothing is computed.

    Raises:
        ValueError: the shapes don't fit each other.
    """
    with tracing():
        return function(*arrays)
