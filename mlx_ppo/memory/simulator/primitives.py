"""What each primitive of mlx's CPU backend allocates, shares and reuses.

Source: mlx 0.32, mlx/backend/common (unary.h, binary.h, ternary.h, copy.h, compiled.cpp) and mlx/backend/cpu
(matmul.cpp, softmax.cpp, logsumexp.cpp, primitives.cpp, indexing.cpp). Primitives that are not named here make dense
new arrays, which holds for reductions, gathers, random bits and most others.
"""

from collections.abc import Callable, Sequence

from mlx_ppo.memory.simulator.graph import Operation, Tensor
from mlx_ppo.memory.simulator.storage import Memory
from mlx_ppo.memory.simulator.views import VIEWS

_UNARY = (
    "Abs", "ArcCos", "ArcCosh", "ArcSin", "ArcSinh", "ArcTan", "ArcTanh", "AsType", "BitwiseInvert", "Ceil",
    "Conjugate", "Cos", "Cosh", "Erf", "ErfInv", "Exp", "Expm1", "Floor", "Imag", "Log", "Log10", "Log1p", "Log2",
    "LogicalNot", "Negative", "Real", "Round", "Rsqrt", "Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Square", "Tan",
    "Tanh",
)  # fmt: skip
_BINARY = (
    "Add", "ArcTan2", "BitwiseAnd", "BitwiseBinary", "BitwiseOr", "BitwiseXor", "Divide", "Equal", "Greater",
    "GreaterEqual", "LeftShift", "Less", "LessEqual", "LogAddExp", "LogicalAnd", "LogicalOr", "Maximum", "Minimum",
    "Multiply", "NotEqual", "Power", "Remainder", "RightShift", "Subtract",
)  # fmt: skip


def evaluate(memory: Memory, operation: Operation) -> None:
    """Do to the memory what evaluating an operation does."""
    _RULES.get(operation.name, _new)(memory, operation)


def _new(memory: Memory, operation: Operation) -> None:
    for tensor in operation.outputs:
        memory.fresh(tensor)


def _like(memory: Memory, tensor: Tensor, source: Tensor) -> None:
    """A new array that lies as its source does, broadcast dimensions and all."""
    layout = memory.layout(source)
    memory.fresh(tensor, layout, layout.data_size * tensor.itemsize)


def _unary(memory: Memory, operation: Operation) -> None:
    source, made = operation.inputs[0], operation.outputs[0]
    if not memory.layout(source).contiguous:
        memory.fresh(made)
    elif not memory.donate(made, source):
        _like(memory, made, source)


def _binary(memory: Memory, operation: Operation) -> None:
    a, b = operation.inputs
    made = operation.outputs[0]
    left, right = memory.layout(a), memory.layout(b)
    if left.data_size == 1 and right.data_size == 1:
        memory.fresh(made, left, made.itemsize)
    elif left.data_size == 1 and right.contiguous:
        _first_or_like(memory, made, [b], b)
    elif right.data_size == 1 and left.contiguous:
        _first_or_like(memory, made, [a], a)
    elif (left.row and right.row) or (left.column and right.column):
        _first_or_like(memory, made, [a, b], a)
    else:
        _first_or_new(memory, made, [x for x in (a, b) if memory.layout(x).row and x.size == made.size])


def _first_or_like(memory: Memory, made: Tensor, candidates: Sequence[Tensor], pattern: Tensor) -> None:
    if not any(memory.donate(made, source) for source in candidates):
        _like(memory, made, pattern)


def _first_or_new(memory: Memory, made: Tensor, candidates: Sequence[Tensor]) -> None:
    if not any(memory.donate(made, source) for source in candidates):
        memory.fresh(made)


def _select(memory: Memory, operation: Operation) -> None:
    made = operation.outputs[0]
    layouts = [memory.layout(source) for source in operation.inputs]
    if all(layout.data_size == 1 for layout in layouts):
        memory.fresh(made, layouts[1], made.itemsize)
    elif all(layout.row for layout in layouts) or all(layout.column for layout in layouts):
        _first_or_like(memory, made, operation.inputs, operation.inputs[1])
    else:
        _first_or_new(memory, made, [source for source in operation.inputs if memory.layout(source).row])


def _compiled(memory: Memory, operation: Operation) -> None:
    """A fused elementwise kernel; its scalar constants are not among the inputs."""
    made = operation.outputs[0]
    arrays = [source for source in operation.inputs if source.size > 1]
    layouts = [memory.layout(source) for source in arrays]
    alike = all(source.shape == made.shape for source in arrays)
    together = all(x.row for x in layouts) or all(x.column for x in layouts) or (len(layouts) == 1)
    if alike and together and all(x.contiguous for x in layouts):
        _first_or_like(memory, made, arrays, arrays[0])
    else:
        _first_or_new(memory, made, [source for source in arrays if memory.layout(source).row])


def _copied_over(memory: Memory, operation: Operation) -> None:
    """A copy of the first input, in its place where possible, into which the others are then written."""
    source, made = operation.inputs[0], operation.outputs[0]
    layout = memory.layout(source)
    exact = layout.row or (layout.contiguous and source.size == layout.data_size and operation.name == "SliceUpdate")
    if not exact or source.size != layout.data_size:
        memory.fresh(made)
    elif not memory.donate(made, source):
        _like(memory, made, source)
    memory.work += 1


def _sorted(memory: Memory, operation: Operation) -> None:
    _unary(memory, operation)
    memory.work += 1


def _matmul(memory: Memory, operation: Operation) -> None:
    """Row-major or transposed matrices are read as they are, any other is copied."""
    _accumulator(memory, operation)
    for source in operation.inputs[:2]:
        rows, columns = memory.layout(source).strides[-2:]
        if not ((rows == source.shape[-1] and columns == 1) or (rows == 1 and columns == source.shape[-2])):
            memory.temporary(source)


def _accumulator(memory: Memory, operation: Operation) -> None:
    """Where a product is written: over what it is added to, where there is such a thing and nobody else needs it."""
    made = operation.outputs[0]
    added = operation.inputs[2] if operation.name == "AddMM" else None
    if added is None or not memory.layout(added).row or memory.layout(added).data_size == 1:
        memory.fresh(made)
    elif not memory.donate(made, added):
        _like(memory, made, added)


def _quantized_matmul(memory: Memory, operation: Operation) -> None:
    memory.fresh(operation.outputs[0])
    for source in operation.inputs:
        if not memory.layout(source).row:
            memory.temporary(source)


def _softmax(memory: Memory, operation: Operation) -> None:
    source, made = operation.inputs[0], operation.outputs[0]
    layout = memory.layout(source)
    if not (layout.contiguous and layout.strides[-1] == 1):
        memory.fresh(made)
        memory.work += 1
    elif not memory.take_over(made, source):
        _like(memory, made, source)


def _logsumexp(memory: Memory, operation: Operation) -> None:
    source = operation.inputs[0]
    layout = memory.layout(source)
    if not (layout.contiguous and layout.strides[-1] == 1):
        memory.temporary(source)
    memory.fresh(operation.outputs[0])


def _scan(memory: Memory, operation: Operation) -> None:
    source = operation.inputs[0]
    if not memory.layout(source).row:
        memory.temporary(source)
    memory.fresh(operation.outputs[0])


def _contiguous(memory: Memory, operation: Operation) -> None:
    source, made = operation.inputs[0], operation.outputs[0]
    if memory.layout(source).row and memory.buffer(source).nbytes <= made.nbytes + 16384:
        memory.view(made, source)
    else:
        memory.fresh(made)


def _concatenate(memory: Memory, operation: Operation) -> None:
    memory.fresh(operation.outputs[0])
    memory.work += len(operation.inputs) - 1  # one copy for each


_RULES: dict[str, Callable[[Memory, Operation], None]] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BINARY, _binary),
    "Select": _select,
    "Compiled": _compiled,
    **dict.fromkeys(["Scatter", "ScatterAxis", "SliceUpdate"], _copied_over),
    **dict.fromkeys(["Sort", "Partition"], _sorted),
    **dict.fromkeys(["Matmul", "AddMM"], _matmul),
    "QuantizedMatmul": _quantized_matmul,
    "Softmax": _softmax,
    "LogSumExp": _logsumexp,
    "Scan": _scan,
    "Contiguous": _contiguous,
    "Concatenate": _concatenate,
    **VIEWS,
}
