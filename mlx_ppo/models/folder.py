"""A local model folder, checked before mlx, mlx-lm or transformers see it.

mlx reads damaged safetensors without complaint, mlx-lm takes a mistyped path for a Hub id, and both may want to run
code that comes with a model. So the files are checked here, by the standard library and then by safetensors' parser.
"""

import ast
import difflib
import functools
import glob
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ppo.data.model_files import Tensors, check_regular, check_safetensors, json_object, quoted, wrong
from mlx_ppo.errors import ModelError
from mlx_ppo.models.foreign import PICKLES, foreign

_WEIGHTS = "model*.safetensors"  # mlx-lm reads all of these and nothing else
_INDEX = "model.safetensors.index.json"
_CODE = ("model_file", "auto_map", "trust_remote_code")
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_DEEPEST = 10_000


@dataclass(frozen=True)
class ModelFolder:
    """A folder that passed: its files are whole, safe to read, and of a type that mlx-lm knows."""

    path: Path
    config: dict[str, Any]
    weight_files: tuple[Path, ...]  # sorted; empty where none are there yet
    tensors: Tensors  # name -> dtype as safetensors writes it, shape


def check_model_folder(path: Path, *, weights: bool = True) -> ModelFolder:
    """Check a model folder without importing mlx-lm.

    A link in the folder may lead to a place inside it. In the Hugging Face cache, `models--*/snapshots/<revision>`, it
    may also lead to the `blobs` folder of that model or of the cache. The folder's own path may be a link to anywhere.

    Args:
        path: folder with config.json, safetensors and a tokenizer.
        weights: False where weights may be missing, to train from scratch; those that are there are checked all the
            same, since mlx-lm reads them.

    Raises:
        ModelError: the first thing found wrong, in one line.
    """
    try:
        check_place(path)
        _check_links(path)
        config = json_object(path / "config.json")
        _check_model_type(path, config)
        _check_code(path, config)
        _check_tokenizer(path)
        files = tuple(sorted(path.glob(_WEIGHTS)))
        if not files and weights:
            raise _no_weights(path)
        tensors = _check_weights(path, files) if files else {}
        check_depth(path / "config.json", config, len(tensors) or _DEEPEST)
        return ModelFolder(path, config, files, tensors)
    except OSError as error:
        raise wrong(Path(error.filename or path), f"can't be read: {error.strerror or error}") from None


def _nearest(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def check_place(path: Path) -> None:
    """ModelError unless there is a folder, and a config.json in it."""
    if path.exists() and not path.is_dir():
        mend = "a model is a folder with config.json, safetensors and a tokenizer; give the folder"
        if path.suffix.lower() == ".gguf":
            mend = "a GGUF file has to be imported into a model folder first"
        raise wrong(path, foreign(path) or f"a file, not a model folder: {mend}")
    if not path.is_dir():
        raise wrong(path, _missing_folder(path))
    if not os.path.lexists(path / "config.json"):
        inner = sorted([*path.glob("*/config.json"), *path.glob("snapshots/*/config.json")])
        mend = (
            f"Did you mean '{inner[0].parent}'?"
            if inner
            else "A model folder as transformers or mlx-lm save it has one."
        )
        raise wrong(path, f"no config.json in this folder. {mend}")


def _missing_folder(path: Path) -> str:
    offline = "nothing is ever downloaded: bring the model's folder to this machine and give its path"
    if re.match(r"(https?|hf|s3|gs|file):", str(path)):
        return f"an address, not a folder; {offline}"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    near = _nearest(path.name, names)
    if near is not None:
        return f"no such folder. Did you mean '{path.parent / near}'?"
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        return f"no such folder. If this is a Hugging Face Hub id: {offline}"
    return f"no such folder; {offline}"


def _check_links(path: Path) -> None:
    real = Path(os.path.realpath(path))
    roots = [real]
    for parent in real.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            roots += [parent.parent / "blobs", parent.parent.parent / "blobs"]
    for folder, subfolders, files in os.walk(path):
        for entry in (Path(folder, name) for name in subfolders + files):
            if not entry.is_symlink():
                continue
            target = Path(os.path.realpath(entry))
            if not any(target.is_relative_to(root) for root in roots):
                raise wrong(entry, f"a link that leads out of the model folder, to '{target}'; put a copy in its place")
            if not target.exists():
                raise wrong(entry, f"a link to '{target}', which doesn't exist")


@functools.cache
def _model_types() -> frozenset[str]:
    """Every `model_type` that the installed mlx-lm has a module for, found without importing it."""
    files = (_mlx_lm() / "models").glob("*.py")
    types = {
        file.stem for file in files if re.search(r"\bModelArgs\b", file.read_text(encoding="utf-8"))
    }  # the rest are helpers
    return frozenset(types | set(remapped_types()))


@functools.cache
def remapped_types() -> dict[str, str]:
    """The kinds of model that mlx-lm computes with another one's module, and which."""
    for node in ast.parse((_mlx_lm() / "utils.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "MODEL_REMAPPING" for t in node.targets
        ):
            return dict(ast.literal_eval(node.value))
    return {}


def _mlx_lm() -> Path:
    spec = importlib.util.find_spec("mlx_lm")
    return Path(next(iter((spec and spec.submodule_search_locations) or ["mlx_lm isn't installed"])))


def _check_model_type(path: Path, config: dict[str, Any]) -> None:
    file, kind = path / "config.json", config.get("model_type")
    if kind is None:
        raise wrong(file, "no 'model_type', such as \"llama\"; this isn't a language model's config")
    if not isinstance(kind, str):
        raise wrong(file, f"'model_type' must be a string, not {quoted(json.dumps(kind))}")
    if kind not in _model_types():
        near = _nearest(kind, _model_types())
        mend = f"Did you mean '{near}'?" if near else "A newer mlx-lm may know it."
        raise wrong(file, f"the installed mlx-lm has no model type {quoted(kind)}. {mend}")


def check_depth(file: Path, config: dict[str, Any], most: int = _DEEPEST) -> None:
    """ModelError where a config.json asks for too many blocks: each of them is made, and has a tensor at least."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for key in _DEPTHS:
            count = section.get(key)
            if isinstance(count, int | float) and count > most:
                raise wrong(
                    file, f"'{key}' is {quoted(count)}, more than there can be ({most}); it is damaged or forged"
                )


def _check_code(path: Path, config: dict[str, Any]) -> None:
    tokenizer = path / "tokenizer_config.json"
    configs = [(path / "config.json", config)]
    if os.path.lexists(tokenizer):
        configs.append((tokenizer, json_object(tokenizer)))
    for file, content in configs:
        for key in _CODE:
            if content.get(key) not in (None, {}, False):
                mend = "If the model also works without it, delete the key"
                raise wrong(file, f"'{key}' asks to run code that comes with the model, which is never done. {mend}")


def _check_tokenizer(path: Path) -> None:
    fast, pieces = path / "tokenizer.json", path / "tokenizer.model"
    if not os.path.lexists(fast) and not os.path.lexists(pieces):
        raise wrong(path, "no tokenizer: neither tokenizer.json nor tokenizer.model is in this folder")
    if os.path.lexists(fast) and not isinstance(json_object(fast).get("model"), dict):
        raise wrong(fast, "not a tokenizer: it has no object 'model'")
    if os.path.lexists(pieces):
        check_regular(pieces)


def _no_weights(path: Path) -> ModelError:
    names = sorted(entry.name for entry in path.iterdir())
    for suffixes, why in (
        (PICKLES, "a pickle, which can run code; only safetensors are read. Convert it where you trust it"),
        ((".gguf",), "a GGUF file, which has to be imported into a model folder first"),
        ((".safetensors",), f"not named {_WEIGHTS}, which is all that mlx-lm reads. Rename it if it's the model"),
    ):
        found = [name for name in names if name.lower().endswith(suffixes)]
        if found:
            return wrong(path, f"no weights in safetensors: {quoted(found[0])} is {why}")
    return wrong(path, f"no weights: no {_WEIGHTS} in this folder")


def _check_weights(path: Path, files: tuple[Path, ...]) -> Tensors:
    if glob.has_magic(str(path)):
        raise wrong(path, "mlx-lm can't find weights in a path with *, ? or [ in it; rename the folder")
    tensors: Tensors = {}
    owner: dict[str, str] = {}
    index = _index(path)
    if index is None:
        _check_numbering(path, files)
    else:
        _check_shards(path, index, {file.name for file in files})
    for file in files:
        for name, entry in check_safetensors(file).items():
            if name in owner:
                raise wrong(file, f"tensor {quoted(name)} is also in {owner[name]}; remove the stray file")
            tensors[name], owner[name] = entry, file.name
    if index is not None and index != owner:
        name = min(set(index.items()) ^ set(owner.items()))[0]
        places = f"{_INDEX} puts it in {index.get(name, 'no file')}, it is in {owner.get(name, 'no file')}"
        raise wrong(path, f"tensor {quoted(name)}: {places}")
    return tensors


def _index(path: Path) -> dict[str, str] | None:
    """Which shard the index says that each tensor is in; None without an index."""
    file = path / _INDEX
    if not os.path.lexists(file):
        return None
    shards = json_object(file).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise wrong(file, "'weight_map' must be an object that names a file for each tensor")
    return shards


def _check_shards(path: Path, index: dict[str, str], present: set[str]) -> None:
    wanted = set(index.values())
    odd = sorted(name for name in wanted if not re.fullmatch(r"model[^/\\]*\.safetensors", name))
    if odd:
        raise wrong(path / _INDEX, f"names the file {quoted(odd[0])}; mlx-lm reads only {_WEIGHTS} in this folder")
    missing, stray = sorted(wanted - present), sorted(present - wanted)
    if missing:
        count = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise wrong(path, f"{quoted(missing[0])}{count} missing, though {_INDEX} names it; copy the folder again")
    if stray:
        raise wrong(path / stray[0], f"a stray file that {_INDEX} doesn't name, but mlx-lm would read; remove it")


def _check_numbering(path: Path, files: tuple[Path, ...]) -> None:
    """Without an index, `model-00001-of-00003.safetensors` still tells that there are three."""
    present = {file.name for file in files}
    for name in sorted(present):
        numbered = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.safetensors", name)
        if numbered is None:
            continue
        for number in range(1, int(numbered[3]) + 1):
            sibling = f"{numbered[1]}{number:05d}-of-{numbered[3]}.safetensors"
            if sibling not in present:
                raise wrong(path, f"'{sibling}' is missing; copy the folder again")
