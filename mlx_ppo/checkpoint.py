"""Checkpoints: complete or absent, verified, rotated. Written beside their place, then renamed into it."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ppo.errors import ModelError, RunError
from mlx_ppo.networks.model_files import read_arrays
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
    temporary = target.with_name(f".{target.name}.new")
    try:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        _write(temporary, checkpoint)
        damage = verify(temporary)
        if damage:
            raise OSError(damage)
        _put(temporary, target)
        _sync(target.parent)
    except (OSError, RuntimeError) as error:
        raise RunError(f"{target}: the checkpoint cannot be written ({error}); earlier ones are untouched") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _rotate(run, keep_last, best)
    return target


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    for name, arrays in checkpoint.arrays.items():
        # in one order: mlx keeps that of insertion, and equal states are to be equal files
        mx.save_safetensors(str(folder / f"{name}.safetensors"), {key: arrays[key] for key in sorted(arrays)})
    documents = {**checkpoint.documents, STATE: {"format": FORMAT, "step": checkpoint.step, **checkpoint.state}}
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
    manifest = {**files, MANIFEST: _digest(files)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def _digest(files: Mapping[str, str]) -> str:
    """The manifest's own entry, so that damage to it is not taken for damage to a file."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _put(temporary: Path, target: Path) -> None:
    """Move a complete folder to its place, where an interruption right after a save may have left the same one."""
    if not target.exists():
        os.rename(temporary, target)
        return
    if not verify(target) and (target / MANIFEST).read_bytes() == (temporary / MANIFEST).read_bytes():
        return
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(aside, target)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(folder: Path) -> str:
    """What is wrong with a checkpoint, naming the file; "" where everything is as it was written."""
    wanted = _read_manifest(folder)
    if wanted is None:
        return f"{folder / MANIFEST}: missing or damaged"
    for name, digest in wanted.items():
        file = folder / name
        if not file.is_file():
            return f"{file}: missing"
        try:
            intact = sha256(file) == digest
        except OSError as error:
            return f"{file}: cannot be read ({error.strerror})"
        if not intact:
            return f"{file}: damaged (its SHA-256 is not the recorded one)"
    return ""


def _read_manifest(folder: Path) -> dict[str, str] | None:
    """File names and their digests; None where the manifest is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        wanted = {str(name): str(digest) for name, digest in manifest.items()}
    except (OSError, ValueError, AttributeError):
        return None
    own = wanted.pop(MANIFEST, "")
    whole = STATE in wanted and own == _digest(wanted) and all(Path(name).name == name for name in wanted)
    return wanted if whole else None


def steps(run: Path) -> list[int]:
    """The steps that have a checkpoint, oldest first."""
    folder = run / "checkpoints"
    names = [item.name for item in folder.iterdir() if item.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


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
    documents: dict[str, Any] = {}
    for name in _read_manifest(folder) or ():  # not the folder's own listing: other files in it are not verified
        file = folder / name
        if file.suffix == ".safetensors":
            try:
                loaded = read_arrays(file)  # a run folder may be somebody else's: mlx reads no file unchecked
            except ModelError as error:
                raise RunError(str(error)) from None
            mx.eval(loaded)
            arrays[file.stem] = loaded
        elif name != STATE:
            documents[name] = json.loads(file.read_text("utf-8"))
    return Checkpoint(step, arrays, state, documents)


def _rotate(run: Path, keep_last: int, best: int | None) -> None:
    for step in steps(run)[:-keep_last]:
        if step != best:
            shutil.rmtree(folder_of(run, step), ignore_errors=True)
    for left in (run / "checkpoints").glob(".[0-9]*"):
        shutil.rmtree(left, ignore_errors=True)
