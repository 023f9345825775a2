"""Quantised matrices that stay quantised on a CPU: a piece is dequantised in float32 when it is used, then forgotten.

mlx's own quantised products run at 2 to 3 GFLOP/s on a CPU; the product with what is dequantised goes through BLAS. The
numbers are those of a model that was dequantised when it was loaded. The gradient dequantises each matrix again, so
nothing of that size is kept for it. No gradient reaches the matrices themselves.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ppo.compute.cpu.products import Floats
from mlx_ppo.compute.needs import Work, outside, planned

PIECE = 1 << 22  # elements of a matrix that are dequantised at once
_IN_CACHE = 1 << 17  # elements that numpy works on at once
_KINDS = {8: np.float32, 4: np.float64, 2: np.complex128}  # by bits: a type as large as what a byte holds in float32


class Packed(NamedTuple):
    """A quantised matrix [out, in] and the bias [out] of its layer."""

    weight: mx.array  # [out, in * bits / 32] uint32
    scales: mx.array  # [out, in / group_size]
    biases: mx.array | None  # the same
    bias: mx.array | None  # [out]
    group_size: int
    bits: int
    mode: str

    @property
    def outputs(self) -> int:
        """Rows."""
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """Columns."""
        return self.weight.shape[1] * 32 // self.bits

    def pieces(self) -> Iterator[slice]:
        """Rows to be dequantised at once."""
        count = max(1, PIECE // self.inputs)
        return (slice(start, min(start + count, self.outputs)) for start in range(0, self.outputs, count))


class CompactLinear(nn.QuantizedLinear):
    """`nn.QuantizedLinear`, by the product with its matrix in float32."""

    def __call__(self, x: mx.array) -> mx.array:
        """[..., in] float32 to [..., out]."""
        found: mx.array = _product(x, _packed(self))
        return found


class CompactEmbedding(nn.QuantizedEmbedding):
    """`nn.QuantizedEmbedding`, likewise where it is the output layer too."""

    def __call__(self, x: mx.array) -> mx.array:
        """Rows in float32."""
        rows: mx.array = super().__call__(x)  # type: ignore[no-untyped-call]
        return rows.astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        """[..., in] float32 to [..., out]."""
        found: mx.array = _product(x, _packed(self))
        return found


_COMPACT: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedLinear: CompactLinear,
    nn.QuantizedEmbedding: CompactEmbedding,
}


def keep_compact(model: nn.Module) -> None:
    """Give a float32 model's quantised layers the classes above; of other kinds (experts) mlx's own stay."""
    for module in model.modules():
        module.__class__ = _COMPACT.get(type(module), type(module))


def _packed(layer: nn.Module) -> Packed:
    given = (layer["weight"], layer["scales"], layer.get("biases"), layer.get("bias"))
    return Packed(*given, layer.group_size, layer.bits, layer.mode)


def _product_numpy(x: mx.array, packed: Packed) -> mx.array:
    """Rows x [..., in] times the matrix transposed, plus the bias.

    All that is evaluated here is made of copies: mlx keeps what it evaluates while it traces a gradient for as long as
    its results live, and the matrix would be among it.
    """

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        states = _copy(x)
        if packed.outputs * packed.inputs <= PIECE:
            return _copy(_times(states, packed, slice(0, packed.outputs)))
        found = mx.zeros((*x.shape[:-1], packed.outputs))
        values = _values(found)
        for rows in packed.pieces():
            values[..., rows] = _values(_times(states, packed, rows))
        return found

    @product.vjp
    def _(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        given = _values(cotangent)
        found = mx.zeros(x.shape)
        values = _values(found)
        for rows in packed.pieces():
            values += _values(mx.array(given[..., rows]) @ dequantised(packed, rows))
        return found

    found: mx.array = product(x)  # type: ignore[assignment]
    return found


def _times(x: mx.array, packed: Packed, rows: slice) -> mx.array:
    """As `nn.Linear` computes it."""
    matrix = dequantised(packed, rows)
    return x @ matrix.T if packed.bias is None else mx.addmm(packed.bias[rows], x, matrix.T)


def dequantised(packed: Packed, rows: slice) -> mx.array:
    """Some rows of the matrix, [rows, in] float32: to the bit what `mx.dequantize` makes, in half of its memory."""
    if packed.mode != "affine" or packed.bits not in _KINDS:
        offsets = None if packed.biases is None else packed.biases[rows]
        given = (packed.weight[rows], packed.scales[rows], offsets)
        return mx.dequantize(*given, packed.group_size, packed.bits, packed.mode).astype(mx.float32)
    assert packed.biases is not None
    stored = np.asarray(packed.weight)[rows].view(np.uint8)
    scales, biases = (_values(array)[rows, :, None] for array in (packed.scales, packed.biases))
    found = mx.zeros((len(stored), packed.inputs))
    values = _values(found)
    count = max(1, _IN_CACHE // packed.inputs)
    for start in range(0, len(stored), count):
        part = slice(start, start + count)
        np.take(_table(packed.bits), stored[part], out=values[part].view(_KINDS[packed.bits]), mode="clip")
        groups = values[part].reshape(-1, scales.shape[1], packed.group_size)
        groups *= scales[part]
        groups += biases[part]
    return found


@functools.cache
def _table(bits: int) -> np.ndarray[Any, Any]:
    """[256]: what each byte holds, lowest bits first, as float32 numbers side by side in one wide element."""
    shifts = np.arange(0, 8, bits)
    numbers = (np.arange(256)[:, None] >> shifts) & ((1 << bits) - 1)
    wide: np.ndarray[Any, Any] = numbers.astype(np.float32).view(_KINDS[bits])[:, 0]
    return wide


def _values(array: mx.array) -> Floats:
    """An array's own memory, evaluated."""
    return np.asarray(array)


def _copy(array: mx.array) -> mx.array:
    return mx.array(_values(array))


def _planned(x: mx.array, packed: Packed) -> mx.array:
    """Gathering makes an array as the product does, its gradient one like x.

    There is a piece of the matrix, and what is multiplied with it; and what comes out, before it is copied.
    """
    shape = (*x.shape[:-1], packed.outputs)
    columns = next(packed.pieces()).stop
    matrix, part = columns * packed.inputs * 4, x.size // packed.inputs * columns * 4
    whole = x.size // packed.inputs * packed.outputs * 4 if columns < packed.outputs else 0
    work = Work(0, 0, x.nbytes + matrix + part + whole, part + matrix + 2 * x.nbytes)
    index = outside(mx.broadcast_to(mx.array(0), shape), [x], work)
    return mx.take_along_axis(x, index, axis=-1)


_product = planned(_product_numpy, _planned)
