"""A traced computation: operations, and the arrays between them."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx


@dataclass(eq=False, slots=True)
class Tensor:
    """An array of the graph: its shape and type, and the operation that makes it (None: it is there already)."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    operation: "Operation | None" = None
    size: int = field(init=False)  # elements
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Count elements and bytes once; the replay asks often."""
        self.size = 1
        for length in self.shape:
            self.size *= length
        self.nbytes = self.size * self.dtype.size

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.size


@dataclass(eq=False, slots=True)
class Operation:
    """One of mlx's primitives, its arguments beside arrays (axes, strides, ...), what it reads and makes."""

    name: str
    arguments: list[Any]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Pause:
    """Where a function leaves mlx: what it reads has to be evaluated there, and its result is a new array.

    `gradients` stand for the arrays that the code's own vector-Jacobian product makes; none outside of a gradient.
    `inside` is what the code has mlx evaluate by itself while it runs, and while its gradient does, and the bytes that
    are there meanwhile.
    """

    reads: tuple[Tensor, ...]
    result: Operation
    gradients: tuple[Operation, ...]
    work: tuple[int, int]  # bytes the code needs outside of mlx while it runs, and while its gradient does
    arrays: tuple[int, int]  # the same in arrays of mlx
    inside: "tuple[tuple[Graph, int] | None, tuple[Graph, int] | None]" = (None, None)


@dataclass(frozen=True, slots=True)
class Graph:
    """A traced function.

    `arguments` has the arrays of each of its arguments; `constants` are the evaluated arrays that it captured; `pauses`
    come in the order of calls.
    """

    arguments: tuple[tuple[Tensor, ...], ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operations: tuple[Operation, ...]
    pauses: tuple[Pause, ...] = ()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arrays of all arguments."""
        return tuple(tensor for argument in self.arguments for tensor in argument)
