"""Weights into folders that stock mlx-lm loads: adapters, or a whole model. A folder appears complete or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx

from mlx_ppo.compute.portable import DTYPES
from mlx_ppo.errors import RunError
from mlx_ppo.files import room
from mlx_ppo.models.adapters import HEAD, Weights, adapter_config
from mlx_ppo.models.trunk import Trunk

_CARRIED = (".json", ".model", ".jinja", ".txt")
_LEFT_BEHIND = (".index.json", "reward.json")


def write_adapters(target: Path, weights: Weights, blocks: int) -> Path:
    """Write `adapters.safetensors` and `adapter_config.json`; a head goes elsewhere.

    Raises:
        RunError: the folder cannot be written.
    """
    return write_folder(target, lambda folder: fill_with_adapters(folder, weights, blocks))


def fill_with_adapters(folder: Path, weights: Weights, blocks: int) -> None:
    """The files of `write_adapters`, into a folder that is there."""
    # in one order, so that a resumed job writes the same files
    arrays = {name: array for name, array in sorted(weights.arrays.items()) if not name.startswith(HEAD)}
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    document = json.dumps(adapter_config(weights, blocks), indent=2)
    (folder / "adapter_config.json").write_text(document + "\n", "utf-8")


def write_model(target: Path, source: Path, trunk: Trunk, weights: Weights, *, dtype: str) -> Path:
    """Write a whole model: the trunk with full weights in place, with the source folder's tokenizer and configuration.

    Raises:
        RunError: the folder cannot be written.
    """
    return write_folder(target, lambda folder: fill_with_model(folder, source, trunk, weights, dtype=dtype))


def fill_with_model(folder: Path, source: Path, trunk: Trunk, weights: Weights, *, dtype: str) -> None:
    """The files of `write_model`, into a folder that is there."""
    carry(source, folder)
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["torch_dtype"] = dtype
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    arrays = {name: weights.arrays.get(name, array).astype(DTYPES[dtype]) for name, array in trunk.base.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})


def carry(source: Path, folder: Path) -> None:
    """Copy a model folder's configuration, tokenizer and chat template; neither weights nor code."""
    for file in source.iterdir():
        if file.is_file() and file.name.endswith(_CARRIED) and not file.name.endswith(_LEFT_BEHIND):
            shutil.copyfile(file, folder / file.name)


def write_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a temporary sibling and rename it into place, replacing what was there.

    Raises:
        RunError: it cannot be written; what was there stays.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
    except (OSError, RuntimeError) as error:
        why = f"{error}; {room(target.parent)}" if isinstance(error, RuntimeError) else error
        raise RunError(f"{target}: cannot be written ({why})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


@contextmanager
def new_parents(target: Path) -> Iterator[None]:
    """Folders above the target that are made for it go again if it isn't."""
    missing = [folder for folder in target.absolute().parents if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise
