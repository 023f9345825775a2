"""What stands in for parts of a model for the length of a call."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn


class States:
    """Stands in for a model's inner part and returns hidden states that are already there."""

    def __init__(self, inner: nn.Module, hidden: mx.array) -> None:
        """Keep the part, for its other attributes, and the states [B, S, D]."""
        self._inner = inner
        self._hidden = hidden

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        """The states, whatever is asked."""
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        """Of the part itself."""
        return getattr(self._inner, name)


class Entered(Exception):
    """A block was reached; carries the states that enter it."""

    def __init__(self, states: mx.array) -> None:
        """Keep the states [B, S, D]."""
        super().__init__()
        self.states = states


class Context(NamedTuple):
    """How many positions a model knows."""

    tokens: int
    learned: bool  # by a table, beyond which there is nothing; False: trained on so many


class NotReached(ValueError):
    """A block that should have been reached was not."""


class InPlace:
    """Stands in for a block: calls something else instead, and is the block in every other respect."""

    def __init__(self, block: nn.Module, call: Callable[..., mx.array]) -> None:
        """Keep the block and what is called instead."""
        self._block = block
        self._call = call

    def __call__(self, *given: Any, **named: Any) -> mx.array:
        """What the other function gives."""
        return self._call(*given, **named)

    def __getattr__(self, name: str) -> Any:
        """Of the part itself."""
        return getattr(self._block, name)

    def __getitem__(self, name: str) -> Any:
        """Of the block itself."""
        return self._block[name]

    def __contains__(self, name: str) -> bool:
        """Of the block itself."""
        return name in self._block


def placeholder(array: mx.array) -> mx.array:
    """An evaluated array of the same shape and type that takes the room of one element; its values mean nothing."""
    empty = mx.broadcast_to(mx.zeros((), array.dtype), array.shape)
    mx.eval(empty)
    return empty
