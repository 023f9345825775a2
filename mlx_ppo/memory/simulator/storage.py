"""Buffers and views as mlx's allocator and arrays handle them: who shares, what is freed when, how high it goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mlx_ppo.memory.simulator.graph import Tensor

_DONATION_SLACK = 16384  # bytes a donated buffer may be larger than what is put into it


class Layout(NamedTuple):
    """How an array lies in its buffer; the flags are mlx's own."""

    strides: tuple[int, ...]
    data_size: int  # elements that the view spans
    contiguous: bool  # without holes
    row: bool  # row-major
    column: bool  # column-major


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a row-major array, in elements."""
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def contiguity(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, bool, bool]:
    """Elements without broadcast dimensions; whether row-major; whether column-major."""
    size = forward = backward = 1
    row = column = True
    last = len(shape) - 1
    for axis, (length, stride) in enumerate(zip(shape, strides, strict=True)):
        mirror = last - axis
        column &= stride == forward or length == 1
        row &= strides[mirror] == backward or shape[mirror] == 1
        forward *= length
        backward *= shape[mirror]
        size *= length if stride > 0 else 1
    return size, row, column


def dense(tensor: Tensor) -> Layout:
    """The layout of a newly made array."""
    column = tensor.size <= 1 or tensor.size == max(tensor.shape)
    return Layout(row_major(tensor.shape), tensor.size, True, True, column)


@dataclass(eq=False, slots=True)
class Buffer:
    """A piece of memory, and the moments between which it was there."""

    nbytes: int
    shape: tuple[int, ...] | None  # of what it was made for; None: it was there from the start
    born: int
    references: int = 1
    died: int | None = None


@dataclass(eq=False, slots=True)
class Value:
    """What the replay knows of one tensor."""

    buffer: Buffer | None = None
    layout: Layout | None = None
    uses: int = 0  # references to the array: inputs of operations still to come, and the caller
    evaluated: bool = False


class Memory:
    """The allocator's state in the middle of an evaluation.

    Rules (see `primitives`) call `fresh`, `donate`, `view` and `temporary`; each call but `view` is one piece of work
    for the device.
    """

    def __init__(self) -> None:
        """Nothing is allocated."""
        self.values: dict[Tensor, Value] = {}
        self.buffers: list[Buffer] = []
        self.temporaries: list[Buffer] = []
        self.active = self.peak = self.peak_moment = 0
        self.together = 0  # the highest sum of active and outside bytes
        self.work = 0
        self.may_donate = True

    def of(self, tensor: Tensor) -> Value:
        """A tensor's state."""
        if tensor not in self.values:
            self.values[tensor] = Value()
        return self.values[tensor]

    def layout(self, tensor: Tensor) -> Layout:
        """How an evaluated tensor lies in memory."""
        layout = self.of(tensor).layout
        assert layout is not None, "operations come after those that they read"
        return layout

    def buffer(self, tensor: Tensor) -> Buffer:
        """Where an evaluated tensor lies."""
        buffer = self.of(tensor).buffer
        assert buffer is not None, "operations come after those that they read"
        return buffer

    def fresh(self, tensor: Tensor, layout: Layout | None = None, nbytes: int | None = None) -> None:
        """Allocate a tensor; densely unless a layout is given."""
        value = self.of(tensor)
        value.buffer = self._allocate(tensor.nbytes if nbytes is None else nbytes, tensor.shape)
        value.layout = dense(tensor) if layout is None else layout
        self.work += 1

    def temporary(self, tensor: Tensor) -> None:
        """Allocate a dense copy of a tensor for the length of this operation."""
        self.temporaries.append(self._allocate(tensor.nbytes, tensor.shape))
        self.work += 1

    def view(self, tensor: Tensor, source: Tensor, layout: Layout | None = None) -> None:
        """Let a tensor share a source's buffer."""
        value = self.of(tensor)
        value.buffer = self.buffer(source)
        value.buffer.references += 1
        value.layout = self.layout(source) if layout is None else layout

    def donate(self, tensor: Tensor, source: Tensor) -> bool:
        """Write a tensor over a source that nobody else needs, if that is possible."""
        fits = source.itemsize == tensor.itemsize and self.buffer(source).nbytes <= tensor.nbytes + _DONATION_SLACK
        return fits and self.take_over(tensor, source)

    def take_over(self, tensor: Tensor, source: Tensor) -> bool:
        """The same whatever their sizes."""
        if not self.may_donate or self.of(source).uses != 1 or self.buffer(source).references != 1:
            return False
        self.view(tensor, source)
        self.work += 1
        return True

    def resident(self, tensor: Tensor, *, held: bool) -> None:
        """Put a tensor there from the start; `held`: the caller keeps it."""
        value = self.of(tensor)
        value.buffer = self._allocate(tensor.nbytes, None)
        value.layout = dense(tensor)
        value.evaluated = True
        value.uses += held

    def drop_use(self, tensor: Tensor) -> None:
        """One reference to an array fewer; with the last one its hold on the buffer goes."""
        value = self.of(tensor)
        value.uses -= 1
        self.drop_if_unused(tensor)

    def drop_if_unused(self, tensor: Tensor) -> None:
        """Let go of an array that nothing refers to."""
        value = self.of(tensor)
        if value.uses <= 0 and value.buffer is not None:
            self.release(value.buffer)
            value.buffer = None

    def release(self, buffer: Buffer) -> None:
        """One reference to a buffer fewer; with the last one it is freed."""
        buffer.references -= 1
        if buffer.references == 0:
            self.active -= buffer.nbytes
            buffer.died = len(self.buffers)

    def reach(self, more: int) -> None:
        """Note that there are so many bytes more than those of buffers at this moment."""
        self.together = max(self.together, self.active + more)
        if self.active + more > self.peak:
            self.peak, self.peak_moment = self.active + more, len(self.buffers)

    def at_peak(self) -> dict[tuple[int, ...], int]:
        """Bytes that were there at the moment of the peak, by shape; what was there from the start excluded."""
        moment = self.peak_moment
        found: dict[tuple[int, ...], int] = {}
        for buffer in self.buffers[:moment]:
            if buffer.shape is not None and (buffer.died is None or buffer.died >= moment):
                found[buffer.shape] = found.get(buffer.shape, 0) + buffer.nbytes
        return found

    def _allocate(self, nbytes: int, shape: tuple[int, ...] | None) -> Buffer:
        buffer = Buffer(nbytes, shape, len(self.buffers))
        self.buffers.append(buffer)
        self.active += nbytes
        self.reach(0)
        return buffer
