"""The project's BLAS in a peer's process: run once in it.

The loader is read from its file: importing the package would need the project's dependencies.
"""

import importlib.util
import os
from pathlib import Path


def load_same_blas() -> None:
    """Load what `mlx_ppo` would load.

    Raises:
        RuntimeError: it isn't there, so that the comparison would be another one.
    """
    threads = os.environ.get("OPENBLAS_NUM_THREADS")
    file = Path(__file__).resolve().parents[2] / "mlx_ppo" / "compute" / "cpu" / "blas.py"
    spec = importlib.util.spec_from_file_location("blas", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    blas = module.load_blas()
    if blas.problem:
        raise RuntimeError(blas.problem)
    assert threads is None or os.environ["OPENBLAS_NUM_THREADS"] == threads
