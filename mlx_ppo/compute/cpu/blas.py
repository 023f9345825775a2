"""An optimised BLAS for mlx on Linux.

The Linux wheel of mlx binds netlib's reference BLAS (2 to 3 GFLOP/s). Symbols in the process's global scope win over
a library's own, so OpenBLAS, loaded with RTLD_GLOBAL before the first `import mlx.core`, serves mlx's products.
"""

import ctypes
import os
import sys
from pathlib import Path
from typing import NamedTuple

_LIBRARY = "cmeel.prefix/lib/libopenblas.so.0"
_SONAME = b"libgfortran.so.5\0"


class Blas(NamedTuple):
    """What serves mlx's products."""

    library: Path | None  # None: mlx's own
    problem: str  # why an optimised one could not be loaded; "" where it was, or where mlx needs none (macOS)


def load_blas() -> Blas:
    """Load OpenBLAS from the cmeel-openblas package into the global symbol scope."""
    if not sys.platform.startswith("linux"):
        return Blas(None, "")
    if "mlx.core" in sys.modules:
        return Blas(None, "mlx was imported before mlx_ppo, so its slow reference BLAS stays; import mlx_ppo first")
    library = _find(_LIBRARY)
    if library is None:
        return Blas(None, "mlx's slow reference BLAS stays: cmeel-openblas isn't installed; pip install cmeel-openblas")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        try:
            _load_bundled_gfortran()
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            return Blas(None, f"OpenBLAS could not be loaded ({error}); mlx's slow reference BLAS stays")
    return Blas(library, "")


def loaded_blas() -> ctypes.CDLL | None:
    """OpenBLAS, to call functions of it; None where `load_blas` did not load it."""
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


def _load_bundled_gfortran() -> None:
    """Give OpenBLAS the Fortran runtime that mlx's own wheel carries, where the system has none.

    The wheel renames the library, and the loader matches by name only; so a copy in memory is given its usual name
    back. OSError when the wheel's files aren't there.
    """
    quadmath = _find("mlx_cpu.libs/libquadmath-*.so*")
    gfortran = _find("mlx_cpu.libs/libgfortran-*.so*")
    if gfortran is None:
        raise OSError("libgfortran.so.5 is missing; install your system's libgfortran5")
    if quadmath is not None:
        ctypes.CDLL(str(quadmath), mode=ctypes.RTLD_GLOBAL)
    wheel_name = gfortran.name.encode() + b"\0"
    image = gfortran.read_bytes().replace(wheel_name, _SONAME.ljust(len(wheel_name), b"\0"))
    descriptor = os.memfd_create("libgfortran.so.5")
    try:
        with open(descriptor, "wb", closefd=False) as memory:
            memory.write(image)
        ctypes.CDLL(f"/proc/self/fd/{descriptor}", mode=ctypes.RTLD_GLOBAL)
    finally:
        os.close(descriptor)
