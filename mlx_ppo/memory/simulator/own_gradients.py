"""Functions with gradients of their own, whose stand-ins in a trace give way to what mlx evaluates for them.

Source: mlx 0.32, mlx/transforms.cpp (custom_function, checkpoint) and mlx/primitives.cpp (CustomTransforms).
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from mlx_ppo.compute.needs import Own, Place, Work, mark_of
from mlx_ppo.memory.simulator.graph import Graph, Operation, Tensor
from mlx_ppo.memory.simulator.marks import all_readers, readers_of_mark, unmarked


@dataclass(eq=False)
class _Call:
    """One call of such a function: what it reads and gives, and what its gradient reads and gives."""

    own: Own
    primals: list[Tensor] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)  # by its forward pass
    results: dict[int, Tensor] = field(default_factory=dict)
    cotangents: dict[int, Tensor] = field(default_factory=dict)  # of results that a gradient comes from
    gradients: dict[int, Tensor] = field(default_factory=dict)  # of primals


def with_own_gradients(graph: Graph, marks: Sequence[Work | Place], traced: Callable[[Own], Graph]) -> Graph:
    """A graph in which the stand-ins of `needs.planned_gradient` are replaced by the real functions' operations.

    Args:
        graph: must not be used any more: its tensors and operations belong to the result.
        marks: of its trace.
        traced: a gradient's graph, which has primals, cotangents and results as its arguments.
    """
    if not any(isinstance(mark, Place) for mark in marks):
        return graph
    operations, constants = list(graph.operations), list(graph.constants)
    instead: dict[Tensor, Tensor] = {}
    known: dict[Hashable, Graph] = {}
    for call in _calls(operations, marks):
        results = tuple(call.results[number] for number in range(len(call.made)) if number in call.results)
        made = [call.made[number] for number in range(len(call.made)) if number in call.results]
        join = Operation("CustomTransforms", [], (*call.primals, *made), results)
        for tensor in results:
            tensor.operation = join
        operations.append(join)
        if call.gradients:
            key = call.own.key if call.own.key is not None else id(call.own)
            if key not in known:
                known[key] = traced(call.own)
            _put(known[key], call, operations, constants, instead)
    for operation in operations:
        operation.inputs = tuple(_final(tensor, instead) for tensor in operation.inputs)
    outputs = tuple(_final(tensor, instead) for tensor in graph.outputs)
    return replace(graph, constants=tuple(constants), outputs=outputs, operations=tuple(_reached(outputs)))


def _calls(operations: Sequence[Operation], marks: Sequence[Work | Place]) -> Iterator[_Call]:
    found: dict[int, _Call] = {}
    readers_of, removed = all_readers(operations), set[Operation]()
    for operation in operations:
        number = mark_of(operation.name, operation.arguments)
        place = None if number is None else marks[number]
        if not isinstance(place, Place):
            continue
        call = found.setdefault(id(place.own), _Call(place.own))
        reads = unmarked(operation, removed)
        readers = readers_of_mark(operation.outputs[0], operations, readers_of, removed)
        backward = [reader for reader in readers if reader.name == "ScatterAxis"]
        if place.given:
            call.gradients.update((place.number, reader.outputs[0]) for reader in backward)
            continue
        count = len(place.own.primals)
        call.primals, call.made = [_stopped(tensor) for tensor in reads[:count]], list(map(_stopped, reads[count:]))
        (call.results[place.number],) = (reader.outputs[0] for reader in readers if reader.name == "GatherAxis")
        call.cotangents.update((place.number, reader.inputs[-1]) for reader in backward)
    yield from found.values()


def _stopped(tensor: Tensor) -> Tensor:
    """What a stopped gradient is of."""
    maker = tensor.operation
    return maker.inputs[0] if maker is not None and maker.name == "StopGradient" else tensor


def _put(
    gradient: Graph, call: _Call, operations: list[Operation], constants: list[Tensor], instead: dict[Tensor, Tensor]
) -> None:
    """Add a gradient's operations, and let its results stand instead of the stand-in's."""
    assert not gradient.pauses, "what leaves mlx has stand-ins of another kind"
    primals, cotangents, results = gradient.arguments
    same: dict[Tensor, Tensor] = dict(zip(primals, call.primals, strict=True))
    same.update((tensor, call.results[number]) for number, tensor in enumerate(results) if number in call.results)
    same.update(
        (tensor, call.cotangents[number]) for number, tensor in enumerate(cotangents) if number in call.cotangents
    )
    there = [tensor for tensor in (*gradient.constants, *gradient.inputs) if tensor not in same]
    constants += there
    same.update((tensor, tensor) for tensor in there)
    for operation in gradient.operations:
        made = tuple(Tensor(tensor.shape, tensor.dtype) for tensor in operation.outputs)
        same.update(zip(operation.outputs, made, strict=True))
        own = Operation(operation.name, operation.arguments, tuple(same[tensor] for tensor in operation.inputs), made)
        for tensor in made:
            tensor.operation = own
        operations.append(own)
    instead.update((tensor, same[gradient.outputs[number]]) for number, tensor in call.gradients.items())


def _final(tensor: Tensor, instead: dict[Tensor, Tensor]) -> Tensor:
    while tensor in instead:
        tensor = instead[tensor]
    return tensor


def _reached(outputs: Sequence[Tensor]) -> list[Operation]:
    """The operations that lead to some tensors, each after those that it reads from."""
    found: dict[Operation, None] = {}
    waiting = [(tensor.operation, False) for tensor in outputs]
    while waiting:
        operation, ready = waiting.pop()
        if operation is None or operation in found:
            continue
        if ready:
            found[operation] = None
        else:
            waiting.append((operation, True))
            waiting.extend((tensor.operation, False) for tensor in operation.inputs)
    return list(found)
