"""For the tests' subprocesses, which have this folder on their PYTHONPATH: Metal's rounding, once mlx.nn is there.

mlx itself is imported by the package, which prepares the process for it; so this waits until that has happened.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class _AfterMlx(importlib.abc.MetaPathFinder):
    """Installs the imitation when `mlx.nn` has been imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != "mlx.nn":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def execute(module: ModuleType) -> None:
            run(module)
            import metal_rounding

            metal_rounding.install()

        spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _AfterMlx())
