"""Primitives of mlx whose results lie in their input's buffer: how they lie there.

Source: mlx 0.32, mlx/backend/common (common.cpp, broadcasting.cpp, transpose.h, slicing.cpp).
"""

from collections.abc import Callable, Sequence

from mlx_ppo.memory.simulator.graph import Operation, Tensor
from mlx_ppo.memory.simulator.storage import Layout, Memory, contiguity, dense, row_major


def _pass(memory: Memory, operation: Operation) -> None:
    """The outputs are the first inputs themselves."""
    for made, source in zip(operation.outputs, operation.inputs, strict=False):
        memory.view(made, source)


def _last(memory: Memory, operation: Operation) -> None:
    """The outputs are the last inputs themselves."""
    made = operation.outputs
    for tensor, source in zip(made, operation.inputs[-len(made) :], strict=True):
        memory.view(tensor, source)


def _transpose(memory: Memory, operation: Operation) -> None:
    source, made = operation.inputs[0], operation.outputs[0]
    layout = memory.layout(source)
    strides = tuple(layout.strides[axis] for axis in operation.arguments[0])
    if layout.contiguous and layout.data_size == source.size:
        _, row, column = contiguity(made.shape, strides)
        layout = layout._replace(row=row, column=column)
    memory.view(made, source, layout._replace(strides=strides))


def _broadcast(memory: Memory, operation: Operation) -> None:
    source, made = operation.inputs[0], operation.outputs[0]
    layout = memory.layout(source)
    own = [0 if n == 1 else stride for n, stride in zip(source.shape, layout.strides, strict=True)]
    strides = (*[0] * (len(made.shape) - len(own)), *own)
    if made.size > source.size:
        layout = layout._replace(row=False, column=False)
    memory.view(made, source, layout._replace(strides=strides))


def _expand(memory: Memory, operation: Operation) -> None:
    source, made = operation.inputs[0], operation.outputs[0]
    layout = memory.layout(source)
    strides = list(layout.strides)
    for axis in operation.arguments[0]:
        strides.insert(axis, 1)
    memory.view(made, source, layout._replace(strides=tuple(strides)))


def _squeeze(memory: Memory, operation: Operation) -> None:
    source, made = operation.inputs[0], operation.outputs[0]
    layout = memory.layout(source)
    gone = operation.arguments[0]
    strides = tuple(stride for axis, stride in enumerate(layout.strides) if axis not in gone)
    memory.view(made, source, layout._replace(strides=strides))


def _part(memory: Memory, made: Tensor, source: Tensor, strides: tuple[int, ...], spanned: int | None) -> None:
    """A view of a part of an array; `spanned`: elements from the first to the last one, None: without broadcasts."""
    whole = memory.layout(source)
    size, row, column = contiguity(made.shape, strides)
    if spanned is None:
        contiguous = size == 1 or (whole.contiguous and (row or column or size == whole.data_size))
    else:
        contiguous = row or column or (whole.contiguous and size == spanned)
    memory.view(made, source, Layout(strides, size if spanned is None else spanned, contiguous, row, column))


def _slice(memory: Memory, operation: Operation) -> None:
    source, made = operation.inputs[0], operation.outputs[0]
    steps = operation.arguments[2]
    strides = tuple(stride * step for stride, step in zip(memory.layout(source).strides, steps, strict=True))
    spanned = 1 + sum(abs(stride) * (length - 1) for stride, length in zip(strides, made.shape, strict=True))
    _part(memory, made, source, strides, spanned)


def _split(memory: Memory, operation: Operation) -> None:
    source = operation.inputs[0]
    for made in operation.outputs:
        _part(memory, made, source, memory.layout(source).strides, None)


def _as_strided(memory: Memory, operation: Operation) -> None:
    source, made = operation.inputs[0], operation.outputs[0]
    strides = tuple(operation.arguments[1])
    size, row, column = contiguity(made.shape, strides)
    span = size if row or column else made.size
    memory.view(made, source, Layout(strides, span, row or column, row, column))


def _reshape(memory: Memory, operation: Operation) -> None:
    source, made = operation.inputs[0], operation.outputs[0]
    layout = memory.layout(source)
    if layout.row or source.size == 0:
        column = dense(made).column if layout.row else layout.column
        memory.view(made, source, layout._replace(strides=row_major(made.shape), column=column))
        return
    strides = _reshaped_strides(source.shape, layout.strides, made.shape)
    if strides is None:
        memory.fresh(made)
    else:
        memory.view(made, source, layout._replace(strides=strides))


def _reshaped_strides(shape: Sequence[int], strides: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...] | None:
    """Strides of a reshaped view, None if the elements have to be copied."""
    lengths: list[int] = []
    steps: list[int] = []
    for length, stride in zip(shape, strides, strict=True):
        if length == 1:
            continue
        if lengths and steps[-1] == stride * length:
            lengths[-1] *= length
            steps[-1] = stride
        else:
            lengths.append(length)
            steps.append(stride)
    if not lengths:
        return (0,) * len(wanted)
    found: list[int] = []
    at = 0
    for length in wanted:
        if at < len(lengths) and lengths[at] % length == 0:
            lengths[at] //= length
            found.append(lengths[at] * steps[at])
            at += lengths[at] == 1
        elif length == 1:
            found.append(found[-1])
        else:
            return None
    return tuple(found)


VIEWS: dict[str, Callable[[Memory, Operation], None]] = {
    **dict.fromkeys(["Copy", "Depends", "StopGradient"], _pass),
    "CustomTransforms": _last,
    "Transpose": _transpose,
    **dict.fromkeys(["Broadcast", "BroadcastAxes"], _broadcast),
    "ExpandDims": _expand,
    "Squeeze": _squeeze,
    "Slice": _slice,
    "Split": _split,
    "AsStrided": _as_strided,
    **dict.fromkeys(["Reshape", "Flatten", "Unflatten"], _reshape),
}
