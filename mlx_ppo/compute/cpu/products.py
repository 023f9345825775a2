"""Many products of small matrices by one call of the BLAS that is loaded, prepared once and run many times.

OpenBLAS copies a large matrix into another order before it multiplies by it, which for few rows takes longer than the
product. For small products it has kernels that don't; a large matrix is therefore multiplied in blocks.

Source: `cblas_sgemm_batch`, of Intel's MKL first, in OpenBLAS since 0.3.29.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlx_ppo.compute.cpu.blas import PREFIX, loaded_blas

Floats = np.ndarray[Any, np.dtype[np.float32]]
Place = tuple[
    Floats, Sequence[int], int
]  # an array, where matrices begin in it, and the step from row to row: elements
Run = Callable[[], Any]
_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112
_BLOCK = 24  # columns of the result: of 16 to 96, the fastest or nearly so for 8 to 64 rows
_MOST = 50  # rows at once: OpenBLAS has its kernels for 1,200 results at most
_FIRST = 32  # of more rows than that, so many by themselves
_WITHOUT_SMALL_KERNELS = ("Haswell", "Zen", "Excavator", "Sandybridge", "Nehalem")  # names of processors in OpenBLAS
_FLOAT = 4  # bytes


def can_prepare() -> bool:
    """Whether the BLAS that is loaded has the function."""
    return _batched() is not None


@functools.cache
def _batched() -> Any:
    return getattr(loaded_blas(), PREFIX + "cblas_sgemm_batch", None)


def prepare(
    shape: tuple[Any, Any, Any],
    left: Place,
    right: Place,
    out: Place,
    *,
    sizes: Sequence[int] = (),
    transposed: bool,
    left_transposed: bool = False,
    factor: float = 1.0,
    add: bool = False,
) -> Run:
    """A function that sets every out[i] to factor * left[i] @ right[i]. All arrays live as long as it.

    Args:
        shape: M, N and K of [M, K] @ [K, N], as `integers`, one for each group of equal shape; changed, they count at
            the next run.
        left: matrices [M, K], or [K, M] where they are to be transposed.
        right: matrices [K, N], or [N, K] where they are to be transposed.
        out: matrices [M, N]; no two may lie on each other.
        sizes: how many matrices each group has; by default there is one group.
        transposed: the right ones are.
        left_transposed: the left ones are.
        factor: on all of them.
        add: add to what is there.
    """
    sizes = sizes or (len(left[1]),)
    groups = len(sizes)
    orders = [integers([_TRANSPOSED if turn else _PLAIN] * groups) for turn in (left_transposed, transposed)]
    factors, kept = (ctypes.c_float * groups)(*[factor] * groups), (ctypes.c_float * groups)(*[float(add)] * groups)
    (of_left, left_step), (of_right, right_step), (of_out, out_step) = (
        (_addresses(array, starts), integers([step] * groups)) for array, starts, step in (left, right, out)
    )
    arguments = (
        *(_ROW_MAJOR, *orders, *shape, factors, of_left, left_step, of_right, right_step, kept, of_out, out_step),
        *(groups, integers(sizes)),
    )
    function, held = _batched(), (left[0], right[0], out[0])

    def run(_: Any = held) -> None:
        function(*arguments)

    return run


def multiply(left: Floats, right: Floats, out: Floats, *, factor: float = 1.0, add: bool = False) -> Floats:
    """Set out [M, N] to factor * left [M, K] @ right [K, N], and return it.

    Args:
        left: contiguous in either order.
        right: contiguous in either order.
        out: contiguous, row by row.
        factor: on the product.
        add: add to what is there.
    Raises:
        ValueError: shapes or orders don't fit.
    """
    (rows, inner), columns = left.shape, right.shape[1]
    sides = [(array.ctypes.data, *_order(array)) for array in (left, right)]
    if right.shape[0] != inner or out.shape != (rows, columns) or not out.flags.c_contiguous:
        raise ValueError(f"products of {left.shape} and {right.shape} don't fit {out.shape}")
    (of_left, left_order, left_step), (of_right, right_order, right_step) = sides
    if out.size:
        _plain()(
            *(_ROW_MAJOR, left_order, right_order, rows, columns, inner, factor, of_left, left_step),
            *(of_right, right_step, float(add), out.ctypes.data, columns),
        )
    return out


@functools.cache
def _has_small_kernels() -> bool:
    """Whether the BLAS has kernels that leave a matrix as it lies; OpenBLAS has none for AVX2."""
    name = getattr(loaded_blas(), PREFIX + "openblas_get_corename", None)
    if name is None:
        return True
    name.restype = ctypes.c_char_p
    return name().decode() not in _WITHOUT_SMALL_KERNELS


@functools.cache
def _plain() -> Any:
    function = getattr(loaded_blas(), PREFIX + "cblas_sgemm")
    integer, real, address = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    function.argtypes = [*[integer] * 6, real, address, integer, address, integer, real, address, integer]
    function.restype = None
    return function


def _order(array: Floats) -> tuple[int, int]:
    """How a matrix lies in memory, and its step from row to row, or column to column: elements."""
    if array.dtype != np.float32 or not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise ValueError(f"a matrix {array.shape} of {array.dtype} doesn't lie contiguously")
    return (_PLAIN, max(1, array.shape[1])) if array.flags.c_contiguous else (_TRANSPOSED, max(1, array.shape[0]))


def by_matrix(rows: Any, left: Floats, matrix: Floats, out: Floats, *, add: bool = False) -> Run:
    """A function that sets the first rows of out [R, N] to those of left [R or more, K] @ matrix.T [K, N].

    Args:
        rows: how many, as `integers`, twice.
        left: contiguous.
        matrix: [N, K], contiguous in either order.
        out: contiguous.
        add: add to what is there.
    Raises:
        ValueError: the shapes don't fit.
    """
    count, inner = matrix.shape
    if left.shape[1] != inner or out.shape[1] != count or len(out) > len(left):
        raise ValueError(f"products of {left.shape} and {matrix.shape} don't fit {out.shape}")
    if not _has_small_kernels():

        def whole() -> None:
            multiply(left[: rows[0]], matrix.T, out[: rows[0]], add=add)

        return whole
    starts = range(0, count, _BLOCK)
    full, rest = divmod(count, _BLOCK)
    sizes = [full] * (full > 0) + [1] * (rest > 0)
    columns = [_BLOCK] * (full > 0) + [rest] * (rest > 0)
    plain = matrix.flags.c_contiguous

    def prepared(rows: Any, first: int) -> Run:
        return prepare(
            (rows, integers(columns), integers([inner] * len(sizes))),
            (left, [first * inner] * len(starts), inner),
            (matrix, [start * inner for start in starts], inner) if plain else (matrix, starts, count),
            (out, [first * count + start for start in starts], count),
            sizes=sizes,
            transposed=plain,
            add=add,
        )

    together = prepared(rows, 0)
    if len(out) <= _MOST:
        return together
    others = integers([0, 0])
    apart = prepared(integers([_FIRST] * 2), 0), prepared(others, _FIRST)

    def run() -> None:
        if rows[0] <= _MOST:
            together()
            return
        others[:] = [rows[0] - _FIRST] * 2
        for some in apart:
            some()

    return run


def integers(values: Sequence[int]) -> Any:
    """An array of C."""
    return (ctypes.c_int * len(values))(*values)


def _addresses(array: Floats, starts: Sequence[int]) -> Any:
    found = array.ctypes.data + _FLOAT * np.asarray(starts, np.uintp)
    return (ctypes.c_void_p * len(found)).from_buffer(found.data)
