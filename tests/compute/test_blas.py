"""mlx's products by OpenBLAS: on every processor, whatever is imported first, and told where it can't be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_ppo.compute.cpu import blas

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only mlx's Linux wheel needs one")

SHOW = """
import numpy
given = numpy.random.default_rng(0).normal(size=(2, 300, 300)).astype("float32")
found = mx.array(given[0]) @ mx.array(given[1])
assert abs(numpy.array(found) - given[0].astype("float64") @ given[1].astype("float64")).max() < 1e-3
from mlx_ppo.compute.cpu.blas import PREFIX, loaded_blas
import ctypes
name = getattr(loaded_blas(), PREFIX + "openblas_get_corename")
name.restype = ctypes.c_char_p
threads = getattr(loaded_blas(), PREFIX + "openblas_get_num_threads")()
print(name().decode(), threads, mlx_ppo.BLAS.problem)
"""


def shown(first: str, **surroundings: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", first + SHOW], env=os.environ | surroundings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("first", ["import mlx_ppo, mlx.core as mx", "import mlx.core as mx, mlx_ppo"])
def test_products_are_right_whatever_is_imported_first(first: str) -> None:
    assert shown(first, OPENBLAS_NUM_THREADS="1").split()[1:] == ["1"]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names of another architecture's kernels")
@pytest.mark.parametrize("kernels", ["Nehalem", "Sandybridge", "Haswell"])
def test_older_processors_have_kernels(kernels: str) -> None:
    """A build for one kind of processor ends in "Illegal instruction" on others, as one without AVX-512."""
    if kernels == "Haswell" and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    assert shown("import mlx_ppo, mlx.core as mx", OPENBLAS_CORETYPE=kernels).split()[0].lower() == kernels.lower()


def test_mlx_calls_it() -> None:
    """The addresses that mlx's library calls through are OpenBLAS's."""
    script = """
import ctypes, mlx_ppo
from mlx_ppo.compute.cpu import blas
places = dict(blas._places(ctypes.CDLL(str(blas._find(blas._MLX))), blas._PRODUCTS))
for name in blas._PRODUCTS:
    function = getattr(blas.loaded_blas(), blas.PREFIX + name)
    assert blas._word(places[name]) == ctypes.cast(function, ctypes.c_void_p).value, name
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_the_package_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_LIBRARY", "scipy_openblas32/lib/another.so")
    assert blas.load_blas() == blas.Blas(
        None, "mlx's slow reference BLAS stays: scipy-openblas32 isn't installed; pip install scipy-openblas32"
    )
    assert blas.loaded_blas() is None


def test_a_broken_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(blas, "_LIBRARY", "broken.so")
    found = blas.load_blas()
    assert found.library is None and found.problem.startswith("OpenBLAS could not be loaded (")
