"""Model folders that a test may change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def copy(make_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A model folder of one's own, with keys of config.json added or changed, or removed where None."""

    def make(kind: str = "llama", **changes: Any) -> Path:
        folder = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(make_model(kind), folder)
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return folder

    return make
