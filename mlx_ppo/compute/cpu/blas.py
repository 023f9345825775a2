"""An optimised BLAS for mlx on Linux.

The Linux wheel of mlx binds netlib's reference BLAS (2 to 3 GFLOP/s). `scipy-openblas32` is the OpenBLAS that NumPy's
and SciPy's developers build: kernels for every processor, chosen when it is loaded. Its functions have a prefix, so
that it can't take another library's place by itself; the addresses through which mlx's library calls the functions are
therefore set to its functions, before or after `import mlx.core`.

Source: System V ABI, "Global Offset Table" and "Relocation"; its supplements for x86-64 and AArch64.
"""

import ctypes
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PREFIX = "scipy_"  # of every function's name
VARIABLE, CHOSEN = "OPENBLAS_NUM_THREADS", "MLX_PPO_CHOOSES_THREADS"  # the second where the first isn't the user's
_LIBRARY = "scipy_openblas32/lib/libscipy_openblas.so"
_MLX = "mlx/lib/libmlx.so"
_PRODUCTS = ("cblas_sgemm", "cblas_dgemm")
_STRINGS, _SYMBOLS, _RELOCATIONS, _RELOCATIONS_SIZE, _CALLS, _CALLS_SIZE = 5, 6, 7, 8, 23, 2  # DT_...
_ADDRESS_OF_FUNCTION = {6, 7, 1025, 1026}  # R_X86_64_GLOB_DAT, ..._JUMP_SLOT, R_AARCH64_GLOB_DAT, ..._JUMP_SLOT
_SYMBOL_SIZE = 24  # Elf64_Sym
_RELOCATION = struct.Struct("<QQq")  # Elf64_Rela


class Blas(NamedTuple):
    """What serves mlx's products."""

    library: Path | None  # None: mlx's own
    problem: str  # why an optimised one could not be loaded; "" where it was, or where mlx needs none (macOS)


class _LinkMap(ctypes.Structure):
    """The loader's record of a library: `struct link_map`."""

    _fields_ = (("base", ctypes.c_size_t), ("name", ctypes.c_char_p), ("dynamic", ctypes.c_size_t))


def load_blas() -> Blas:
    """Load OpenBLAS from the scipy-openblas32 package, and have mlx's CPU backend call it."""
    mlx = _find(_MLX) if sys.platform.startswith("linux") else None
    if mlx is None or _find("mlx_cpu.libs") is None:  # a GPU's backend loads much and needs no such products
        return Blas(None, "")
    library = _find(_LIBRARY)
    if library is None:
        return Blas(
            None, "mlx's slow reference BLAS stays: scipy-openblas32 isn't installed; pip install scipy-openblas32"
        )
    if VARIABLE not in os.environ:  # numpy's own reads it too, when it is imported
        os.environ.update({VARIABLE: "1", CHOSEN: "1"})
    try:
        loaded = ctypes.CDLL(str(library))
        places = list(_places(ctypes.CDLL(str(mlx)), _PRODUCTS))
        if "cblas_sgemm" not in (name for name, _ in places):
            raise OSError("mlx's library calls no cblas_sgemm")
        for name, place in places:
            _set(place, ctypes.cast(getattr(loaded, PREFIX + name), ctypes.c_void_p).value or 0)
    except OSError as error:
        return Blas(None, f"OpenBLAS could not be loaded ({error}); mlx's slow reference BLAS stays")
    return Blas(library, "")


def loaded_blas() -> ctypes.CDLL | None:
    """OpenBLAS, to call functions of it by their names with `PREFIX`; None where `load_blas` did not load it."""
    library = _find(_LIBRARY) if sys.platform.startswith("linux") else None
    try:
        return ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_LAZY) if library else None
    except OSError:
        return None


def _find(relative: str) -> Path | None:
    for folder in sys.path:
        matches = sorted(Path(folder).glob(relative)) if folder else []
        if matches:
            return matches[0]
    return None


def _places(library: ctypes.CDLL, names: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Where a library keeps the addresses of the functions of these names that it calls: (name, place in memory)."""
    record = ctypes.POINTER(_LinkMap)()
    query = ctypes.CDLL(None).dlinfo
    query.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    if query(library._handle, 2, ctypes.byref(record)):  # RTLD_DI_LINKMAP
        raise OSError("the loader doesn't say where mlx's library lies")
    of = dict(_dynamic(record.contents.dynamic))
    if not {_STRINGS, _SYMBOLS, _CALLS, _CALLS_SIZE} <= of.keys():
        raise OSError("mlx's library names no functions that it calls")
    calls, others = (of[_CALLS], of[_CALLS_SIZE]), (of.get(_RELOCATIONS, 0), of.get(_RELOCATIONS_SIZE, 0))
    for begin, size in (calls, others):
        for offset, info, _ in _RELOCATION.iter_unpack(ctypes.string_at(begin, size)):
            if info & 0xFFFFFFFF in _ADDRESS_OF_FUNCTION:
                symbol = of[_SYMBOLS] + (info >> 32) * _SYMBOL_SIZE
                name = ctypes.string_at(of[_STRINGS] + (_word(symbol) & 0xFFFFFFFF)).decode(errors="replace")
                if name in names:
                    yield name, record.contents.base + offset


def _dynamic(at: int) -> Iterator[tuple[int, int]]:
    """The entries of a library's dynamic section: tag and value."""
    while tag := _word(at):
        yield tag, _word(at + 8)
        at += 16


def _word(at: int) -> int:
    return ctypes.c_uint64.from_address(at).value


def _set(place: int, address: int) -> None:
    """Write an address to a place in a library's data, which may have been made read-only after loading."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    page = place // mmap.PAGESIZE * mmap.PAGESIZE
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if libc.mprotect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    ctypes.c_uint64.from_address(place).value = address
