"""The Python with torch that tests compare with, named by MLX_PPO_TORCH_PYTHON: started once, for many scripts."""

import functools
import json
import os
import select
import subprocess
from pathlib import Path

import pytest

PYTHON = os.environ.get("MLX_PPO_TORCH_PYTHON")
needs_torch = pytest.mark.skipif(not PYTHON, reason="MLX_PPO_TORCH_PYTHON names no Python with torch and transformers")
_SERVER = Path(__file__).parent / "importing" / "torch_server.py"
_PATIENCE = 900.0  # seconds


def by_torch(script: Path, *words: object) -> str:
    """What a script prints there; it ends at the end of the file."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps([str(script), *map(str, words)]) + "\n")
    server.stdin.flush()
    ready, _, _ = select.select([server.stdout], [], [], _PATIENCE)
    if not ready:
        server.kill()
    came_to_its_end, shown = json.loads(server.stdout.readline() or '[false, "it ended, or took too long"]')
    assert came_to_its_end, shown
    return str(shown)


@functools.cache
def _server() -> "subprocess.Popen[str]":
    """It ends with its standard input, which ends with this process."""
    return subprocess.Popen([str(PYTHON), str(_SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
