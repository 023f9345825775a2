"""The marks that `compute.needs` leaves in a trace: found, and taken away."""

from collections.abc import Mapping, Sequence

from mlx_ppo.memory.simulator.graph import Operation, Tensor


def all_readers(operations: Sequence[Operation]) -> dict[Tensor, list[int]]:
    """The places of the operations that read each tensor."""
    found: dict[Tensor, list[int]] = {}
    for place, operation in enumerate(operations):
        for tensor in operation.inputs:
            found.setdefault(tensor, []).append(place)
    return found


def unmarked(operation: Operation, removed: set[Operation]) -> tuple[Tensor, ...]:
    """Remove a mark, and return what it waited for: the arrays that the code outside reads."""
    removed.add(operation)
    while operation.name != "Depends":
        maker = operation.inputs[0].operation
        assert maker is not None, "a mark always follows a Depends"
        operation = maker
        removed.add(operation)
    return operation.inputs[1:]


def readers_of_mark(
    mark: Tensor, operations: Sequence[Operation], readers_of: Mapping[Tensor, Sequence[int]], removed: set[Operation]
) -> list[Operation]:
    """Remove a mark, and conditions derived from it, from what reads them; returns that."""
    marks, places = [mark], set()
    for tensor in marks:
        for place in readers_of.get(tensor, ()):
            operation = operations[place]
            if operation.name in ("AsType", "LogicalNot"):
                marks.append(operation.outputs[0])
                removed.add(operation)
            elif operation not in removed:
                places.add(place)
    readers = [operations[place] for place in sorted(places)]
    for operation in readers:
        operation.inputs = tuple(tensor for tensor in operation.inputs if tensor not in marks)
    return readers
