"""A function of mlx arrays into a graph of operations with shapes and types. Nothing is computed, nothing loaded."""

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ppo.compute.needs import Inside, Own, Place, Work, mark_of, tracing
from mlx_ppo.memory.simulator.fusing import fused
from mlx_ppo.memory.simulator.graph import Graph, Operation, Pause, Tensor
from mlx_ppo.memory.simulator.marks import all_readers, readers_of_mark, unmarked
from mlx_ppo.memory.simulator.own_gradients import with_own_gradients


def trace(function: Callable[..., Any], *arrays: Any) -> Graph:
    """Record what a function would compute.

    Arguments stand for arrays that are in memory already; they themselves are never evaluated, so `mx.zeros(shape)`
    does, whatever its size. Evaluated arrays that the function captures count as in memory too (use
    `memory.weightless` for a model whose weights are not loaded); lazy arrays that it captures are computed inside
    the graph. Operations that differ in nothing are merged, as by `mx.compile`.

    Args:
        function: pure; returns arrays, or nested lists and dictionaries of them; must not read an array's values.
        *arrays: its arguments: arrays, or nested lists and dictionaries of arrays.
    Raises:
        ValueError: the function evaluates an array, or uses `mx.custom_function` or `mx.checkpoint`, which mlx can't
            trace; see `mlx_ppo.compute.needs`.
    """
    graph, spelt_out = _recorded(function, *arrays)
    return graph if spelt_out else fused(graph, _activations())


def _recorded(function: Callable[..., Any], *arrays: Any) -> tuple[Graph, bool]:
    """The graph, and whether activation functions appear in it as they are computed: not as one kernel."""

    def flat(*values: mx.array) -> list[mx.array]:
        left = iter(values)
        return _leaves(function(*(_filled(argument, left) for argument in arrays)))

    records: list[dict[str, Any]] = []
    with tracing() as marks, _spelt_out():
        mx.export_function(records.append, flat, *_leaves(arrays))
    return _graph(records, [len(_leaves(argument)) for argument in arrays], marks), marks.spelt_out


@functools.cache
def _activations() -> tuple[Graph, ...]:
    """Compiled functions of models as they appear in a trace, those that contain others first."""
    from mlx_lm.models.activations import swiglu

    functions: list[tuple[Callable[..., Any], int]] = [
        (swiglu, 2),
        (nn.gelu_approx, 1),
        (nn.gelu_fast_approx, 1),
        (nn.gelu, 1),
        (nn.silu, 1),
    ]
    return tuple(_recorded(function, *[mx.zeros((2, 3))] * count)[0] for function, count in functions)


def _leaves(tree: Any) -> list[mx.array]:
    """The arrays of nested lists and dictionaries, in order; whatever else is there doesn't count."""
    if isinstance(tree, mx.array):
        return [tree]
    inner = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ()
    return [leaf for part in inner for leaf in _leaves(part)]


def _filled(tree: Any, leaves: Iterator[mx.array]) -> Any:
    """The same nesting around other arrays; mlx's own functions would split names at their dots."""
    if isinstance(tree, mx.array):
        return next(leaves)
    if isinstance(tree, Mapping):
        return {name: _filled(part, leaves) for name, part in tree.items()}
    if not isinstance(tree, list | tuple):
        return tree
    parts = [_filled(part, leaves) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else parts


def _graph(records: Sequence[dict[str, Any]], lengths: Sequence[int], marks: Sequence[Work | Place]) -> Graph:
    tensors: dict[str, Tensor] = {}

    def known(entries: Sequence[tuple[str, tuple[int, ...], mx.Dtype]]) -> tuple[Tensor, ...]:
        for name, shape, dtype in entries:
            if name not in tensors:
                tensors[name] = Tensor(tuple(shape), dtype)
        return tuple(tensors[name] for name, _, _ in entries)

    parts: dict[str, tuple[Tensor, ...]] = {}
    operations: list[Operation] = []
    for record in records:
        kind = record["type"]
        if kind == "primitive":
            made = known(record["outputs"])
            operation = Operation(record["name"], list(record["arguments"]), known(record["inputs"]), made)
            for tensor in made:
                tensor.operation = operation
            operations.append(operation)
        elif kind == "constants":
            parts[kind] = known([(name, array.shape, array.dtype) for name, array in record[kind]])
        elif kind in ("inputs", "outputs"):
            parts[kind] = known(record[kind])
    left = iter(parts["inputs"])
    arguments = tuple(tuple(itertools.islice(left, length)) for length in lengths)
    graph = Graph(arguments, parts["constants"], parts["outputs"], tuple(operations))
    graph = with_own_gradients(graph, marks, _gradient)
    operations = list(graph.operations)
    pauses = _pauses(operations, marks)
    return replace(graph, operations=tuple(operations), pauses=pauses)


def _gradient(own: Own) -> Graph:
    return _recorded(own.gradient, own.primals, own.results, own.results)[0]


def _pauses(operations: list[Operation], marks: Sequence[Work | Place]) -> tuple[Pause, ...]:
    """The places that `needs.outside` marked, in the order of calls; the marks themselves are taken away."""
    found: dict[int, Pause] = {}
    graphs: dict[Hashable, Graph] = {}
    readers_of = all_readers(operations)
    removed: set[Operation] = set()
    for operation in operations:
        number = mark_of(operation.name, operation.arguments)
        if number is None:
            continue
        reads = unmarked(operation, removed)
        readers = readers_of_mark(operation.outputs[0], operations, readers_of, removed)
        (result,) = [other for other in readers if any(tensor in other.inputs for tensor in reads)]
        gradients = tuple(other for other in readers if other is not result)
        mark = marks[number]
        assert isinstance(mark, Work), "the others have been replaced"
        forward, gradient, forward_arrays, gradient_arrays, inside = mark
        work, arrays = (forward, gradient), (forward_arrays, gradient_arrays)
        nested = (_inside(inside[0], graphs), _inside(inside[1], graphs))
        found[number] = Pause(reads, result, gradients, work, arrays, nested)
    operations[:] = [operation for operation in operations if operation not in removed]
    return tuple(found[number] for number in sorted(found))


def _inside(inside: Inside | None, known: dict[Hashable, Graph]) -> tuple[Graph, int] | None:
    if inside is None:
        return None
    key = inside.key if inside.key is not None else id(inside)
    if key not in known:
        known[key] = trace(inside.function, *inside.arguments)
    return known[key], inside.beside


@contextmanager
def _spelt_out() -> Iterator[None]:
    """Switch `mx.compile` off for the length of a `with` block, because mlx can't trace what it makes."""
    if not _compiling():
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def _compiling() -> bool:
    """Whether `mx.compile` is on; mlx has no way to ask, but what is compiled runs in Python just once."""
    runs: list[int] = []

    def count(array: mx.array) -> mx.array:
        runs.append(1)
        return array + 1

    compiled = mx.compile(count)
    compiled(mx.zeros(()))
    compiled(mx.zeros(()))
    return len(runs) == 1
