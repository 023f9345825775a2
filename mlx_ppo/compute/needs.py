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

Gradient = Callable[[Sequence[mx.array], Sequence[mx.array], Sequence[mx.array]], Sequence[mx.array]]
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


class Own(NamedTuple):
    """A gradient that a function brings along, as `mx.custom_function` has it, and arrays like what it is given."""

    gradient: Gradient
    primals: Sequence[mx.array]
    results: Sequence[mx.array]
    key: Hashable  # gradients with the same one need the same; None: this one is like no other


class Place(NamedTuple):
    """Where a function with a gradient of its own is given something, or gives it."""

    own: Own
    given: bool
    number: int


class Seen(list["Work | Place"]):
    """The marks of a trace, and whether it saw a gradient's trace, in which `mx.compile` does nothing."""

    spelt_out = False


_marks: ContextVar[Seen | None] = ContextVar("marks", default=None)


def planned(function: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """A function that leaves mlx, and in a trace `stand_in`, with the same arguments."""

    def call(*given: Any, **named: Any) -> Any:
        return (stand_in if is_traced() else function)(*given, **named)

    return call


def is_traced() -> bool:
    """Whether a planner traces what is computed now."""
    return _marks.get() is not None


@contextmanager
def tracing() -> Iterator[Seen]:
    """Let stand-ins take their places for the length of a `with` block; the marks that are made are collected."""
    collected = Seen()
    before = _marks.set(collected)
    try:
        yield collected
    finally:
        _marks.reset(before)


def in_gradient() -> None:
    """Say, while tracing, that mlx will trace a gradient over what is computed, if only for its operations' sake."""
    marks = _marks.get()
    if marks is not None:
        marks.spelt_out = True


def outside(result: mx.array, reads: Sequence[mx.array], work: Work | Place) -> mx.array:
    """Mark, while tracing, a place where code leaves mlx and needs `reads` evaluated.

    The mark has to be an input of the one operation that stands for the code's result, which must read one of `reads`
    itself; operations that mlx derives from that one for the gradient read the mark too, and so are found. All of
    these stand for new arrays. What only local variables of callers still hold at that moment isn't known and isn't
    counted.

    Args:
        result: what the mark is to look like.
        reads: what the code reads. No gradient flows through the mark.
        work: what the code needs, or what else the mark stands for.
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


def own_gradient(function: Callable[..., Sequence[mx.array]], gradient: Gradient) -> Callable[..., Sequence[mx.array]]:
    """A function of arrays, at least two of them, with a gradient of its own, which a planner can trace as well.

    Args:
        function: returns at least two arrays.
        gradient: of (primals, cotangents, results), one for each primal.
    """
    made: Any = mx.custom_function(function)
    made.vjp(gradient)
    return planned(made, lambda *primals: planned_gradient(function, gradient, primals))


def planned_gradient(
    function: Callable[..., Sequence[mx.array]], gradient: Gradient, primals: Sequence[mx.array], key: Hashable = None
) -> Sequence[mx.array]:
    """What a function returns that has a gradient of its own, for a planner, which traces the gradient by itself.

    `key`: gradients with the same one need the same.
    """
    made = [mx.stop_gradient(array) for array in function(*primals)]
    own = Own(gradient, _like(primals), _like(made), key)
    total = mx.zeros(())
    for number, array in enumerate(primals):
        if array.ndim and mx.issubdtype(array.dtype, mx.floating):
            like = mx.zeros((*array.shape[:-1], 1), mx.int32)
            mark = outside(like, [array], Place(own, True, number))
            total = total + mx.take_along_axis(array, mark, axis=-1).sum().astype(mx.float32)
    found = []
    for number, array in enumerate(made):
        mark = outside(mx.zeros(array.shape, mx.int32), [*primals, *made], Place(own, False, number))
        whole = mx.broadcast_to(total.astype(array.dtype), array.shape)
        found.append(mx.take_along_axis(whole, mark, axis=-1))
    return found


def _like(arrays: Sequence[mx.array]) -> list[mx.array]:
    return [mx.zeros(array.shape, array.dtype) for array in arrays]
