"""The gated activation of feed-forward blocks, by the device's fastest exact way.

mlx's elementwise functions run on one core and unvectorised on the CPU (silu times gate: 24 ns an element), so there
numpy computes the same, with its own gradient, in pieces that stay in the processor's cache.

Source: Shazeer 2020, arXiv:2002.05202, eq. 6 (SwiGLU).
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ppo.compute.device import on_cpu

Floats = np.ndarray[Any, np.dtype[np.float32]]
_PIECE = 1 << 15  # elements at once: a handful of such arrays fits a core's cache
_NAMES = {"down_proj", "swiglu", "gate_proj", "up_proj"}


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, elementwise, for arrays of one shape."""
    if not on_cpu() or gate.dtype != mx.float32 or up.dtype != mx.float32:
        product: mx.array = nn.silu(gate) * up
        return product
    found: mx.array = _on_cpu(gate, up)  # type: ignore[assignment]
    return found


class GatedMLP(nn.Module):
    """A feed-forward block `down(silu(gate(x)) * up(x))`; takes the place of an architecture's own class."""

    def __call__(self, x: mx.array) -> mx.array:
        """[..., D] to [..., D]."""
        down: mx.array = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return down


def use_fast_gates(model: nn.Module) -> None:
    """Give every feed-forward block that computes exactly this formula the class above; others are left alone."""
    for module in model.modules():
        code = getattr(type(module).__call__, "__code__", None) if callable(module) else None
        if code is not None and set(code.co_names) == _NAMES:
            module.__class__ = GatedMLP


def swiglu_into(gate: Floats, up: Floats, out: Floats) -> None:
    """silu(gate) * up, elementwise, for contiguous arrays of one shape."""
    _by_pieces(_forward, gate, up, out)


def swiglu_back(gate: Floats, up: Floats, given: Floats, by_gate: Floats, by_up: Floats) -> None:
    """Fill in the gradients by gate and up for a gradient by silu(gate) * up; contiguous arrays of one shape."""
    _by_pieces(_backward, gate, up, given, by_gate, by_up)


def by_rows(function: Callable[..., None], *arrays: Floats) -> None:
    """Call a function that fills some of its arguments, with a few rows at a time of all of them."""
    count = len(arrays[0])
    size = max(1, _PIECE * count // max(1, arrays[0].size))
    for start in range(0, count, size):
        function(*(array[start : start + size] for array in arrays))


def _sigmoid(values: Floats) -> Floats:
    found = np.negative(values)
    np.exp(found, out=found)
    found += 1
    return np.reciprocal(found, out=found)


def _by_pieces(function: Callable[..., None], *arrays: Floats) -> None:
    """Call a function that fills some of its arguments, with flat pieces of all of them."""
    with np.errstate(over="ignore"):  # exp(-x) of a large negative x is infinite, its reciprocal rightly 0
        by_rows(function, *(array.reshape(-1) for array in arrays))


def _forward(gate: Floats, up: Floats, out: Floats) -> None:
    np.multiply(gate, _sigmoid(gate), out=out)
    out *= up


def _backward(gate: Floats, up: Floats, cotangent: Floats, by_gate: Floats, by_up: Floats) -> None:
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    np.multiply(cotangent, silu, out=by_up)
    np.subtract(1, sigmoid, out=by_gate)
    by_gate *= silu
    by_gate += sigmoid  # silu' = sigmoid + silu * (1 - sigmoid)
    by_gate *= up
    by_gate *= cotangent


@mx.custom_function
def _on_cpu(gate: mx.array, up: mx.array) -> mx.array:
    values, factors = np.asarray(gate), np.asarray(up)
    out = np.empty_like(values, order="C")
    swiglu_into(np.ascontiguousarray(values), np.ascontiguousarray(factors), out)
    return mx.array(out)


@_on_cpu.vjp
def _on_cpu_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    given = [np.ascontiguousarray(np.asarray(array)) for array in (*primals, cotangent)]
    by_gate, by_up = np.empty_like(given[0]), np.empty_like(given[0])
    _by_pieces(_backward, *given, by_gate, by_up)
    return mx.array(by_gate), mx.array(by_up)
