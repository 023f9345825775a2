"""Checkpoints: complete or absent, verified, rotated. Written beside their place, then renamed into it."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from mlx_ppo.errors import RunError
from mlx_ppo.runs import sha256

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"

Arrays = Mapping[str, mx.array]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: named files of arrays, small JSON files, and the state."""

    step: int
    arrays: Mapping[str, Arrays]  # file name without ".safetensors" -> arrays
    state: Mapping[str, Any]
    documents: Mapping[str, Any]  # further JSON files by full name


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return run / "checkpoints" / f"{step:06d}"


def save(run: Path, checkpoint: Checkpoint, *, keep_last: int, best: int | None) -> Path:
    """Write a checkpoint; older ones go only after it has been read back and verified.

    Args:
        run: the run's folder.
        checkpoint: the content.
        keep_last: how many of the newest to keep.
        best: the step of one more to keep.
    Raises:
        RunError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    target = folder_of(run, checkpoint.step)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        _write(temporary, checkpoint)
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
        _sync(target.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"{target}: the checkpoint cannot be written ({error}); earlier ones are untouched") from None
    damage = verify(target)
    if damage:
        raise RunError(f"{damage}; earlier checkpoints are untouched")
    _rotate(run, keep_last, best)
    return target


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    for name, arrays in checkpoint.arrays.items():
        mx.save_safetensors(str(folder / f"{name}.safetensors"), dict(arrays))
    documents = {**checkpoint.documents, STATE: {"format": FORMAT, "step": checkpoint.step, **checkpoint.state}}
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    manifest = {file.name: sha256(file) for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(folder: Path) -> str:
    """What is wrong with a checkpoint, naming the file; "" where everything is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        wanted = {str(name): str(digest) for name, digest in manifest.items()}
    except (OSError, ValueError, AttributeError):
        return f"{folder / MANIFEST}: missing or damaged"
    if STATE not in wanted:
        return f"{folder / MANIFEST}: missing or damaged"
    for name, digest in wanted.items():
        file = folder / Path(name).name
        if not file.is_file():
            return f"{file}: missing"
        if sha256(file) != digest:
            return f"{file}: damaged (its SHA-256 is not the recorded one)"
    return ""


def steps(run: Path) -> list[int]:
    """The steps that have a checkpoint, oldest first."""
    folder = run / "checkpoints"
    return sorted(int(item.name) for item in folder.glob("[0-9]*") if item.is_dir()) if folder.is_dir() else []


def load(run: Path, step: int) -> Checkpoint:
    """Read a checkpoint after verifying it.

    Raises:
        RunError: it is missing, damaged, or written by a newer version.
    """
    folder = folder_of(run, step)
    damage = verify(folder)
    if damage:
        others = [other for other in steps(run) if other != step]
        raise RunError(damage + (f"; the checkpoint of step {others[-1]} is still there" if others else ""))
    state = json.loads((folder / STATE).read_text("utf-8"))
    if state.get("format") != FORMAT:
        raise RunError(f"{folder}: written in format {state.get('format')}; this version reads format {FORMAT}")
    arrays: dict[str, Arrays] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np"):
            loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        mx.eval(loaded)
        arrays[file.stem] = loaded
    documents = {
        file.name: json.loads(file.read_text("utf-8"))
        for file in folder.glob("*.json")
        if file.name not in (MANIFEST, STATE)
    }
    return Checkpoint(step, arrays, state, documents)


def _rotate(run: Path, keep_last: int, best: int | None) -> None:
    for step in steps(run)[:-keep_last]:
        if step != best:
            shutil.rmtree(folder_of(run, step), ignore_errors=True)
