"""Checkpoints: complete or absent, verified, rotated. Written beside their place, then renamed into it."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ppo.data.model_files import read_arrays
from mlx_ppo.errors import ModelError, RunError
from mlx_ppo.files import room
from mlx_ppo.runs.folder import read_record, remove, sync
from mlx_ppo.runs.provenance import sha256

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
    temporary, aside = _beside(target, "new"), _beside(target, "old")
    try:
        if not target.parent.exists():
            target.parent.mkdir(mode=0o700)
            sync(run)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        _write(temporary, checkpoint)
        found = verify(temporary)
        if found:
            raise OSError(found)
        _put(temporary, target, aside)
        sync(target.parent)
    except (OSError, RuntimeError) as error:
        why = f"{error}; {room(target.parent)}" if isinstance(error, RuntimeError) else error
        raise RunError(f"{target}: the checkpoint cannot be written ({why}); earlier ones are untouched") from None
    finally:
        remove(temporary)
        if target.exists():
            remove(aside)
    _rotate(run, keep_last, best)
    return target


def _beside(target: Path, kind: str) -> Path:
    """Where a checkpoint waits to be put in its place ("new"), stands aside ("old"), or is removed ("gone")."""
    return target.with_name(f".{target.name}.{kind}")


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    for name, arrays in checkpoint.arrays.items():
        # in one order: mlx keeps that of insertion, and equal states are to be equal files
        mx.save_safetensors(str(folder / f"{name}.safetensors"), {key: arrays[key] for key in sorted(arrays)})
    documents = {**checkpoint.documents, STATE: {"format": FORMAT, "step": checkpoint.step, **checkpoint.state}}
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(_manifest(files), "utf-8")
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def _manifest(files: Mapping[str, str]) -> str:
    """The manifest's text, of which no other spelling is accepted."""
    return json.dumps({**files, MANIFEST: _digest(files)}, indent=2) + "\n"


def _digest(files: Mapping[str, str]) -> str:
    """The manifest's own entry, so that damage to it is not taken for damage to a file."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _put(temporary: Path, target: Path, aside: Path) -> None:
    """Move a complete folder to its place, where an interruption right after a save may have left the same one."""
    if not target.exists():
        os.rename(temporary, target)
        return
    if not verify(target) and (target / MANIFEST).read_bytes() == (temporary / MANIFEST).read_bytes():
        return
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(target, aside)  # a kill before the next rename leaves the place empty: see `settle`
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(aside, target)
        raise


def settle(run: Path) -> None:
    """Put right what a process left that was killed while it saved: the last complete checkpoint is in its place again.

    Only for the process that holds the run's lock.

    Raises:
        RunError: the folder cannot be written.
    """
    for aside in (run / "checkpoints").glob(".[0-9]*.old"):
        place = aside.with_name(aside.name[1:-4])
        if not place.exists():
            try:
                os.rename(aside, place)
            except OSError as error:
                raise RunError(f"{place}: cannot be written ({error.strerror})") from None
    for left in (run / "checkpoints").glob(".[0-9]*"):
        remove(left)


def verify(folder: Path) -> str:
    """The first thing that is wrong with a checkpoint, naming the file; "" where all is as it was written."""
    return next(damage(folder), "")


def damage(folder: Path) -> Iterator[str]:
    """Everything that is wrong with a checkpoint, a line for each file."""
    wanted = _read_manifest(folder)
    if wanted is None:
        yield f"{folder / MANIFEST}: missing or damaged"
        return
    for name, digest in wanted.items():
        file = folder / name
        if not file.is_file():
            yield f"{file}: missing"
            continue
        try:
            if sha256(file) != digest:
                yield f"{file}: damaged (its SHA-256 is not the recorded one)"
        except OSError as error:
            yield f"{file}: cannot be read ({error.strerror})"


def strangers(folder: Path) -> list[Path]:
    """What lies in a checkpoint's folder and isn't part of it; nothing reads it. Only the manifest knows."""
    known = _read_manifest(folder)
    return [] if known is None else sorted(item for item in folder.iterdir() if item.name not in {MANIFEST, *known})


def _read_manifest(folder: Path) -> dict[str, str] | None:
    """File names and their digests; None where the manifest is missing or damaged."""
    try:
        text = (folder / MANIFEST).read_bytes().decode()
        wanted = {str(name): str(digest) for name, digest in json.loads(text).items()}
    except (OSError, ValueError, AttributeError):
        return None
    wanted.pop(MANIFEST, None)
    whole = STATE in wanted and text == _manifest(wanted) and all(Path(name).name == name for name in wanted)
    return wanted if whole else None


def steps(run: Path) -> list[int]:
    """The steps that have a checkpoint, oldest first."""
    folder = run / "checkpoints"
    names = [item.name for item in folder.iterdir() if item.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def newest(run: Path) -> Checkpoint | None:
    """The run's last checkpoint, None where there is none; only for the process that holds the run's lock.

    Raises:
        RunError: it is damaged, or written by a newer version.
    """
    settle(run)
    saved = steps(run)
    return load(run, saved[-1]) if saved else None


def require_sound(run: Path) -> None:
    """Raise RunError where the last checkpoint is damaged: before models are loaded to go on from it."""
    saved = steps(run)
    if saved:
        _require_intact(run, saved[-1])
        read_state(run, saved[-1])


def _require_intact(run: Path, step: int) -> None:
    found = verify(folder_of(run, step))
    if found:
        others = [other for other in steps(run) if other != step]
        raise RunError(found + (f"; the checkpoint of step {others[-1]} is still there" if others else ""))


def read_state(run: Path, step: int) -> dict[str, Any]:
    """The state in a checkpoint that was verified.

    Raises:
        RunError: it is in a folder of another name, or written by a newer version.
    """
    folder = folder_of(run, step)
    state: dict[str, Any] = json.loads((folder / STATE).read_text("utf-8"))
    if state.get("format") != FORMAT:
        raise RunError(f"{folder}: written in format {state.get('format')}; this version reads format {FORMAT}")
    if state.get("step") != step:
        raise RunError(f"{folder}: holds the checkpoint of step {state.get('step')}; give the folder its name back")
    return state


def load(run: Path, step: int) -> Checkpoint:
    """Read a checkpoint after verifying it.

    Raises:
        RunError: it is missing, damaged, in a folder of another name, or written by a newer version.
    """
    _require_intact(run, step)
    folder, state = folder_of(run, step), read_state(run, step)
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


def alike(arrays: Arrays, wanted: Arrays) -> bool:
    """Whether a checkpoint's arrays have the names and shapes of those that they are to replace."""
    shapes, others = ({name: array.shape for name, array in each.items()} for each in (arrays, wanted))
    return shapes == others


def chosen(run: Path) -> int | None:
    """The step that a health rule went back to, None where the newest checkpoint is the run's policy.

    Raises:
        RunError: `run.json` can't be read.
    """
    step = read_record(run).get("policy")
    return step if step in steps(run) else None


def remove_after(run: Path, step: int) -> None:
    """Remove the checkpoints after a step."""
    _remove(run, [later for later in steps(run) if later > step])


def _rotate(run: Path, keep_last: int, best: int | None) -> None:
    """Remove older checkpoints."""
    _remove(run, [step for step in steps(run)[:-keep_last] if step != best])
    for left in (run / "checkpoints").glob(".[0-9]*"):
        remove(left)


def _remove(run: Path, unwanted: Sequence[int]) -> None:
    """Remove checkpoints. Each first loses its name: a kill leaves no half of one that looks whole."""
    for step in unwanted:
        folder = folder_of(run, step)
        with suppress(OSError):
            os.rename(folder, _beside(folder, "gone"))
            remove(_beside(folder, "gone"))
