"""The matrix products of a traced function."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mlx_ppo.memory.simulator.graph import Graph, Operation, Tensor
from mlx_ppo.memory.simulator.trace import trace

_PRODUCTS = {"Matmul", "AddMM", "QuantizedMatmul", "GatherMM", "GatherQMM"}
_ATTENTION = "ScaledDotProductAttention"


class Product(NamedTuple):
    """One product, as an operation of mlx."""

    flops: int  # multiplications and additions
    read: int  # bytes of what it reads
    inputs: tuple[Tensor, ...]
    name: str


def products(function: Callable[..., Any], *arrays: Any) -> list[Product]:
    """Those of a function, code that leaves mlx and comes back included; see `trace` for the arguments."""
    return [
        Product(_flops(one), sum(tensor.nbytes for tensor in one.inputs), one.inputs, one.name)
        for one in _found(trace(function, *arrays))
    ]


def _found(graph: Graph) -> Iterator[Operation]:
    yield from (operation for operation in graph.operations if operation.name in _PRODUCTS | {_ATTENTION})
    for pause in graph.pauses:
        forward, gradient = pause.inside
        for inside in (forward, gradient if pause.gradients else None):
            if inside is not None:
                yield from _found(inside[0])


def _flops(operation: Operation) -> int:
    first, second = operation.inputs[:2]
    if operation.name == _ATTENTION:
        return 4 * first.size * second.shape[-2]
    return 2 * operation.outputs[0].size * first.shape[-1]
