"""What code that leaves mlx needs in memory, said beside that code to a planner that traces it.

mlx can't trace a function that reads an array's values, such as one that computes in numpy. Such a function is given
a stand-in (`planned`): operations that allocate the same arrays, with a mark (`outside`) where it leaves mlx. The
stand-in takes its place while a planner traces, and at no other time.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import mlx.core as mx

_MARK = 1 << 60  # a mark is a strided view with an offset that no real array has


class Inside(NamedTuple):
    """A function that is evaluated by itself, and arrays like those that it is called with, which are there already."""

    function: Callable[..., Any]
    arguments: Sequence[mx.array]
    beside: int  # bytes of arrays that are there only meanwhile
    key: Hashable = None  # functions with the same one need the same; None: this one is like no other


class Work(NamedTuple):
    """What code outside of mlx needs while it runs, and while its gradient does.

    In bytes that mlx doesn't count, in arrays of mlx, and in evaluations of its own.
    """

    forward: int
    gradient: int
    forward_arrays: int = 0
    gradient_arrays: int = 0
    inside: tuple[Inside | None, Inside | None] = (None, None)


_marks: ContextVar[list[Work] | None] = ContextVar("marks", default=None)


def planned(function: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """A function that leaves mlx, and in a trace `stand_in`, with the same arguments."""

    def call(*given: Any, **named: Any) -> Any:
        return (stand_in if is_traced() else function)(*given, **named)

    return call


def is_traced() -> bool:
    """Whether a planner traces what is computed now."""
    return _marks.get() is not None


@contextmanager
def tracing() -> Iterator[list[Work]]:
    """Let stand-ins take their places for the length of a `with` block; the marks that are made are collected."""
    collected: list[Work] = []
    before = _marks.set(collected)
    try:
        yield collected
    finally:
        _marks.reset(before)


def outside(result: mx.array, reads: Sequence[mx.array], work: Work) -> mx.array:
    """Mark, while tracing, a place where code leaves mlx and needs `reads` evaluated.

    The mark has to be an input of the one operation that stands for the code's result, which must read one of `reads`
    itself; operations that mlx derives from that one for the gradient read the mark too, and so are found. All of
    these stand for new arrays. What only local variables of callers still hold at that moment isn't known and isn't
    counted.

    Args:
        result: what the mark is to look like.
        reads: what the code reads. No gradient flows through the mark.
        work: what the code needs.
    Raises:
        RuntimeError: nothing is being traced.
    """
    marks = _marks.get()
    if marks is None:
        raise RuntimeError("stand-ins are for tracing only")
    marks.append(work)
    (waiting,) = mx.depends([result], [mx.stop_gradient(array) for array in reads])
    return mx.as_strided(waiting, result.shape, [0] * result.ndim, _MARK + len(marks) - 1)


def mark_of(name: str, arguments: Sequence[Any]) -> int | None:
    """The number of the mark that an operation is, None if it is an ordinary one."""
    return arguments[-1] - _MARK if name == "AsStrided" and arguments[-1] >= _MARK else None


def made_outside(array: mx.array, columns: int, reads: Sequence[mx.array], work: Work) -> mx.array:
    """A new array [..., columns] made outside of mlx; so is a gradient like `array`."""
    index = outside(mx.zeros((*array.shape[:-1], columns), mx.int32), reads, work)
    return mx.take_along_axis(array, index, axis=-1)


def with_gradient(array: mx.array, gradient: mx.array, rows: mx.array) -> mx.array:
    """Something like `rows` [N], after them, that has this gradient [N, D] by `array` [N, D]."""
    found: mx.array = mx.depends([(array * gradient).sum(axis=-1)], [rows])[0]
    return found.astype(rows.dtype)
