"""Counts what a GPU would be given, and how often the program waits for it, by wrapping mlx and numpy."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

_READS = ("item", "tolist", "__float__", "__int__", "__bool__")


@dataclass
class Counts:
    """Since the beginning of a `with` block."""

    operations: int = 0  # of graphs that were evaluated; some need no kernel, such as those that only see an array anew
    waits: int = 0  # evaluations, and readings of numbers, of work that hadn't been waited for
    numbers: int = 0  # that came back as numpy's
    under_way: bool = False  # something was begun, and not waited for

    def begin(self, given: Any) -> int:
        """Operations of what is about to be evaluated."""
        arrays = [array for _, array in tree_flatten(given) if isinstance(array, mx.array)]
        text = io.StringIO()
        mx.export_to_dot(text, *arrays)
        found = text.getvalue().count("shape=rectangle")
        self.operations += found
        return found

    def wait(self, given: Any) -> None:
        """For some arrays."""
        self.waits += bool(self.begin(given)) or self.under_way
        self.under_way = False


@contextmanager
def counting() -> Iterator[Counts]:
    """Count for the length of a `with` block."""
    counts = Counts()

    def waiting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            counts.wait(given)
            return real(*given, **named)

        return call

    def beginning(*given: Any) -> None:
        counts.under_way |= bool(counts.begin(given))
        async_eval(*given)

    def converting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(given: Any, *rest: Any, **named: Any) -> Any:
            if isinstance(given, mx.array):
                counts.wait(given)
                counts.numbers += given.size
            return real(given, *rest, **named)

        return call

    async_eval = mx.async_eval
    readings = {name: waiting(getattr(mx.array, name)) for name in _READS}
    with (
        mock.patch.multiple(mx.array, **readings),
        mock.patch.multiple(mx, eval=waiting(mx.eval), async_eval=beginning),
        mock.patch.multiple(np, array=converting(np.array), asarray=converting(np.asarray)),
    ):
        yield counts
