"""Stored tensors into mlx arrays: blocks that mlx can hold as they are stay quantised, all others become floats."""

import math

import mlx.core as mx
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from mlx_ppo.data.model_files import quoted, wrong
from mlx_ppo.importing.gguf_file import Array, GGUFFile, Kind
from mlx_ppo.importing.gguf_names import Wanted

GROUP = 32
_FLOATS = {Kind.F32: mx.float32, Kind.F16: mx.float16, Kind.BF16: mx.bfloat16}
_BITS = {Kind.Q8_0: 8, Kind.Q4_0: 4, Kind.Q4_1: 4}
_STEP = 1 << 24  # numbers dequantised at a time: 64 MB


def kept_bits(file: GGUFFile, tensor: Wanted) -> int:
    """Bits of a tensor's blocks where mlx can hold them as they are, else 0."""
    return _BITS.get(file.tensors[tensor.source].kind, 0) if len(tensor.shape) == 2 else 0


def floating_type(file: GGUFFile, tensors: tuple[Wanted, ...]) -> mx.Dtype:
    """The type that the model computes in: that of most of its matrices, float16 for quantised ones."""
    sizes = dict.fromkeys((mx.float16, mx.float32, mx.bfloat16), 0)
    for tensor in tensors:
        if len(tensor.shape) == 2:
            sizes[_FLOATS.get(file.tensors[tensor.source].kind, mx.float16)] += math.prod(tensor.shape)
    return max(sizes, key=lambda dtype: sizes[dtype])


def read_tensor(file: GGUFFile, tensor: Wanted, dtype: mx.Dtype | None, computed: mx.Dtype) -> dict[str, mx.array]:
    """One tensor of the model; three arrays where it stays quantised.

    Args:
        file: where it is stored.
        tensor: what it is.
        dtype: the type to convert to; None: keep what is stored.
        computed: then the type of vectors, and of blocks that mlx can't hold.
    Raises:
        ModelError: NaN or infinity, possibly only in the narrower type.
    """
    kind = file.tensors[tensor.source].kind
    if dtype is None and kept_bits(file, tensor):
        found = _quantised(file, tensor)
    else:
        matrix = len(tensor.shape) == 2
        target = dtype or (_FLOATS.get(kind, computed) if matrix else computed)
        found = {tensor.name: _dequantised(file, tensor, target)}
    if tensor.heads:
        order = mx.array(_head_order(tensor.shape[0], tensor.heads))
        found = {name: array[order] for name, array in found.items()}
    mx.eval(found)
    for array in found.values():
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            which = str(array.dtype).removeprefix("mlx.core.")
            mend = "damaged" if which == "float32" else f"damaged, or too large for {which}: try --dtype float32"
            raise wrong(file.path, f"tensor {quoted(tensor.source)} holds NaN or infinity; the file is {mend}")
    return found


def _head_order(rows: int, heads: int) -> Array:
    """Which stored row is row i of the model, [rows].

    llama.cpp pairs neighbours in its rope, Hugging Face the two halves of a head: its converter interleaves the halves.
    """
    stored = np.arange(rows, dtype=np.int32).reshape(heads, rows // heads // 2, 2)
    return np.ascontiguousarray(stored.swapaxes(1, 2)).reshape(rows)


def _chunks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    rows, step = (shape[0], max(1, _STEP // shape[1])) if len(shape) == 2 else (1, 1)
    return [(first, min(rows, first + step)) for first in range(0, rows, step)]


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _dequantised(file: GGUFFile, tensor: Wanted, target: mx.Dtype) -> mx.array:
    parts = []
    for first, last in _chunks(tensor.shape):
        raw = file.rows(tensor.source, first, last)
        part = _floats(raw, file.tensors[tensor.source].kind)
        part = (part.astype(mx.float32) - 1 if tensor.offset else part).astype(target)
        mx.eval(part)
        parts.append(part)
    return _joined(parts).reshape(tensor.shape)


def _floats(raw: Array, kind: Kind) -> mx.array:
    if kind is Kind.BF16:
        return mx.array(raw.view("<u2")).view(mx.bfloat16)
    if kind in _FLOATS:
        return mx.array(raw.view("<f4" if kind is Kind.F32 else "<f2"))
    with np.errstate(all="ignore"):  # what isn't finite is found afterwards
        return mx.array(dequantize(raw, kind).astype(np.float32, copy=False))


def _quantised(file: GGUFFile, tensor: Wanted) -> dict[str, mx.array]:
    """Blocks in mlx's affine form, w = scale * q + bias with q unsigned, without rounding anything.

    Q8_0: w = d (q - 128) after q + 128;   Q4_0: w = d (q - 8);   Q4_1: w = d q + m
    """
    kind = file.tensors[tensor.source].kind
    weights, scales, biases = [], [], []
    for first, last in _chunks(tensor.shape):
        packed, scale, bias = _blocks(file.rows(tensor.source, first, last), kind)
        weights.append(mx.array(packed))
        scales.append(mx.array(scale))
        biases.append(mx.array(bias))
    base = tensor.name.removesuffix("weight")
    parts = {"weight": weights, "scales": scales, "biases": biases}
    return {base + name: _joined(arrays) for name, arrays in parts.items()}


def _blocks(raw: Array, kind: Kind) -> tuple[Array, Array, Array]:
    """Packed numbers [rows, uint32 words], scales and biases [rows, blocks] of rows of blocks."""
    rows = raw.shape[0]
    blocks = raw.reshape(rows, -1, GGML_QUANT_SIZES[kind][1])
    header = 4 if kind is Kind.Q4_1 else 2
    heads = np.ascontiguousarray(blocks[..., :header]).view("<f2")
    scale = np.ascontiguousarray(heads[..., 0])
    body = blocks[..., header:]
    with np.errstate(all="ignore"):
        if kind is Kind.Q8_0:
            numbers, bias = body ^ 0x80, scale * np.float16(-128)
        else:
            low, high = body & 15, body >> 4  # numbers 0 to 15 and 16 to 31 of the block
            numbers = np.concatenate([low, high], axis=-1)
            numbers = numbers[..., 0::2] | (numbers[..., 1::2] << 4)
            bias = heads[..., 1] if kind is Kind.Q4_1 else scale * np.float16(-8)
    return np.ascontiguousarray(numbers).reshape(rows, -1).view("<u4"), scale, np.ascontiguousarray(bias)
