"""Activation functions that mlx runs as one kernel, found again in a trace, where they appear spelt out.

In a gradient `mx.compile` does nothing, and the backward pass reads what lies between; so a function is one kernel just
where nothing outside it reads what lies between.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mlx_ppo.memory.simulator.graph import Graph, Operation, Tensor


def fused(graph: Graph, patterns: Sequence[Graph]) -> Graph:
    """A graph in which every occurrence of a pattern is a single operation named `Compiled`.

    Args:
        graph: must not be used any more: its tensors and operations belong to the result.
        patterns: traces of functions with one result each; an earlier one takes precedence.
    """
    readers: dict[Tensor, set[Operation]] = defaultdict(set)
    for operation in graph.operations:
        for tensor in operation.inputs:
            readers[tensor].add(operation)
    gone: set[Operation] = set()
    for pattern in patterns:
        last = pattern.outputs[0].operation
        assert last is not None
        for operation in graph.operations:
            if operation in gone or operation.name != last.name:
                continue
            found = _Match(graph, readers).run(pattern, operation)
            if found is not None:
                gone |= found
    return replace(graph, operations=tuple(operation for operation in graph.operations if operation not in gone))


class _Match:
    """One attempt to find a pattern in a graph, from the pattern's result backwards."""

    def __init__(self, graph: Graph, readers: Mapping[Tensor, set[Operation]]) -> None:
        self.graph = graph
        self.readers = readers
        self.bound: dict[Tensor, Tensor] = {}
        self.inside: list[Operation] = []

    def run(self, pattern: Graph, operation: Operation) -> set[Operation] | None:
        """Turn `operation` into the fused one and return those that it makes superfluous, None if it doesn't match."""
        if not self._same(pattern.outputs[0], operation.outputs[0], pattern):
            return None
        between = set(self.inside) - {operation}
        results = set(self.graph.outputs)
        for other in between:
            made = other.outputs[0]
            if made in results or not self.readers[made] <= set(self.inside):
                return None
        operation.name = "Compiled"
        operation.arguments = []
        operation.inputs = tuple(self.bound[tensor] for tensor in pattern.inputs)
        for tensor in operation.inputs:
            self.readers[tensor].difference_update(between)
            self.readers[tensor].add(operation)
        return between

    def _same(self, wanted: Tensor, given: Tensor, pattern: Graph) -> bool:
        if wanted in self.bound:
            return self.bound[wanted] is given
        self.bound[wanted] = given
        if wanted in pattern.inputs:
            return True
        if wanted.operation is None:
            return given.operation is None and given.size == 1
        if given.operation is None or given.operation.name != wanted.operation.name:
            return False
        self.inside.append(given.operation)
        pairs = zip(wanted.operation.inputs, given.operation.inputs, strict=False)
        return all(self._same(x, y, pattern) for x, y in pairs)
