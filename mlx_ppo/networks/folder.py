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
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ppo.errors import ModelError

Tensors = dict[str, tuple[str, tuple[int, ...]]]

_ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4},
    **{"U64": 8, "I64": 8, "C64": 8},
}  # the types that mlx reads
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_LARGEST_RANK = 32
_WEIGHTS = "model*.safetensors"  # mlx-lm reads all of these and nothing else
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_POINTER = b"version https://git-lfs"
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z")


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
        _check_place(path)
        _check_links(path)
        config = _json_object(path / "config.json")
        _check_model_type(path, config)
        _check_code(path, config)
        _check_tokenizer(path)
        files = tuple(sorted(path.glob(_WEIGHTS)))
        if not files and weights:
            raise _no_weights(path)
        return ModelFolder(path, config, files, _check_weights(path, files) if files else {})
    except OSError as error:
        raise _wrong(Path(error.filename or path), f"can't be read: {error.strerror or error}") from None


def _wrong(where: Path, what: str) -> ModelError:
    """One line, whatever the names in it hold."""
    return ModelError("".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{where}: {what}"))


def _quoted(name: object) -> str:
    """A name from a file, cut: it may be as long as the file."""
    text = str(name)
    return f"'{text if len(text) <= 100 else text[:100] + '…'}'"


def _nearest(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def _check_place(path: Path) -> None:
    """There is a folder, and a config.json in it."""
    if path.is_file():
        suffix = path.suffix.lower()
        mend = "a model is a folder with config.json, safetensors and a tokenizer; give the folder"
        if suffix == ".gguf":
            mend = "a GGUF file has to be imported into a model folder first"
        elif suffix in _ARCHIVES:
            mend = "an archive has to be unpacked into a folder first"
        raise _wrong(path, f"a file, not a model folder: {mend}")
    if not path.is_dir():
        raise _wrong(path, _missing_folder(path))
    if not os.path.lexists(path / "config.json"):
        inner = sorted([*path.glob("*/config.json"), *path.glob("snapshots/*/config.json")])
        mend = (
            f"Did you mean '{inner[0].parent}'?"
            if inner
            else "A model folder as transformers or mlx-lm save it has one."
        )
        raise _wrong(path, f"no config.json in this folder. {mend}")


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
                raise _wrong(
                    entry, f"a link that leads out of the model folder, to '{target}'; put a copy in its place"
                )
            if not target.exists():
                raise _wrong(entry, f"a link to '{target}', which doesn't exist")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Parsers differ in which of two equal keys they take."""
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"the key {_quoted(twice[0])} appears twice")
    return dict(pairs)


def _parsed(file: Path, content: bytes, *, header: bool = False) -> dict[str, Any]:
    what = "header: " if header else ""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique if header else None)
    except UnicodeDecodeError as error:
        raise _wrong(file, f"{what}not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:  # besides syntax: a repeated key, thousands of digits, deep nesting
        raise _wrong(file, f"{what}malformed JSON: {error}") from None
    if not isinstance(value, dict):
        raise _wrong(file, f"{what}not a JSON object")
    return value


def _json_object(file: Path) -> dict[str, Any]:
    _check_regular(file)
    return _parsed(file, file.read_bytes())


def _check_regular(file: Path) -> None:
    if not file.is_file():  # a pipe would block whoever opens it
        raise _wrong(file, "not a regular file")
    with file.open("rb") as stream:
        start = stream.read(len(_POINTER))
    if not start:
        raise _wrong(file, "an empty file; copy it again")
    if start == _POINTER:
        raise _wrong(file, "a Git LFS pointer, not the file itself; fetch it with git lfs pull")


@functools.cache
def _model_types() -> frozenset[str]:
    """Every `model_type` that the installed mlx-lm has a module for, found without importing it."""
    spec = importlib.util.find_spec("mlx_lm")
    root = Path(next(iter((spec and spec.submodule_search_locations) or ["mlx_lm isn't installed"])))
    files = (root / "models").glob("*.py")
    types = {
        file.stem for file in files if re.search(r"\bModelArgs\b", file.read_text(encoding="utf-8"))
    }  # the rest are helpers
    for node in ast.parse((root / "utils.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "MODEL_REMAPPING" for t in node.targets
        ):
            types.update(ast.literal_eval(node.value))
    return frozenset(types)


def _check_model_type(path: Path, config: dict[str, Any]) -> None:
    file, kind = path / "config.json", config.get("model_type")
    if kind is None:
        raise _wrong(file, "no 'model_type', such as \"llama\"; this isn't a language model's config")
    if not isinstance(kind, str):
        raise _wrong(file, f"'model_type' must be a string, not {_quoted(json.dumps(kind))}")
    if kind not in _model_types():
        near = _nearest(kind, _model_types())
        mend = f"Did you mean '{near}'?" if near else "A newer mlx-lm may know it."
        raise _wrong(file, f"the installed mlx-lm has no model type {_quoted(kind)}. {mend}")


def _check_code(path: Path, config: dict[str, Any]) -> None:
    tokenizer = path / "tokenizer_config.json"
    configs = [(path / "config.json", config)]
    if os.path.lexists(tokenizer):
        configs.append((tokenizer, _json_object(tokenizer)))
    for file, content in configs:
        for key in ("model_file", "auto_map"):
            if content.get(key) not in (None, {}):
                mend = "If the model also works without it, delete the key"
                raise _wrong(file, f"'{key}' asks to run code that comes with the model, which is never done. {mend}")


def _check_tokenizer(path: Path) -> None:
    fast, pieces = path / "tokenizer.json", path / "tokenizer.model"
    if not os.path.lexists(fast) and not os.path.lexists(pieces):
        raise _wrong(path, "no tokenizer: neither tokenizer.json nor tokenizer.model is in this folder")
    if os.path.lexists(fast) and not isinstance(_json_object(fast).get("model"), dict):
        raise _wrong(fast, "not a tokenizer: it has no object 'model'")
    if os.path.lexists(pieces):
        _check_regular(pieces)


def _no_weights(path: Path) -> ModelError:
    names = sorted(entry.name for entry in path.iterdir())
    for suffixes, why in (
        (_PICKLES, "a pickle, which can run code; only safetensors are read. Convert it where you trust it"),
        ((".gguf",), "a GGUF file, which has to be imported into a model folder first"),
        ((".safetensors",), f"not named {_WEIGHTS}, which is all that mlx-lm reads. Rename it if it's the model"),
    ):
        found = [name for name in names if name.lower().endswith(suffixes)]
        if found:
            return _wrong(path, f"no weights in safetensors: {_quoted(found[0])} is {why}")
    return _wrong(path, f"no weights: no {_WEIGHTS} in this folder")


def _check_weights(path: Path, files: tuple[Path, ...]) -> Tensors:
    if glob.has_magic(str(path)):
        raise _wrong(path, "mlx-lm can't find weights in a path with *, ? or [ in it; rename the folder")
    tensors: Tensors = {}
    owner: dict[str, str] = {}
    index = _index(path)
    if index is None:
        _check_numbering(path, files)
    else:
        _check_shards(path, index, {file.name for file in files})
    for file in files:
        for name, entry in _safetensors(file).items():
            if name in owner:
                raise _wrong(file, f"tensor {_quoted(name)} is also in {owner[name]}; remove the stray file")
            tensors[name], owner[name] = entry, file.name
    if index is not None and index != owner:
        name = min(set(index.items()) ^ set(owner.items()))[0]
        places = f"{_INDEX} puts it in {index.get(name, 'no file')}, it is in {owner.get(name, 'no file')}"
        raise _wrong(path, f"tensor {_quoted(name)}: {places}")
    return tensors


def _index(path: Path) -> dict[str, str] | None:
    """Which shard the index says that each tensor is in; None without an index."""
    file = path / _INDEX
    if not os.path.lexists(file):
        return None
    shards = _json_object(file).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise _wrong(file, "'weight_map' must be an object that names a file for each tensor")
    return shards


def _check_shards(path: Path, index: dict[str, str], present: set[str]) -> None:
    wanted = set(index.values())
    odd = sorted(name for name in wanted if not re.fullmatch(r"model[^/\\]*\.safetensors", name))
    if odd:
        raise _wrong(path / _INDEX, f"names the file {_quoted(odd[0])}; mlx-lm reads only {_WEIGHTS} in this folder")
    missing, stray = sorted(wanted - present), sorted(present - wanted)
    if missing:
        count = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise _wrong(path, f"{_quoted(missing[0])}{count} missing, though {_INDEX} names it; copy the folder again")
    if stray:
        raise _wrong(path / stray[0], f"a stray file that {_INDEX} doesn't name, but mlx-lm would read; remove it")


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
                raise _wrong(path, f"'{sibling}' is missing; copy the folder again")


def _safetensors(file: Path) -> Tensors:
    """The tensors of one file whose header tells the truth about every byte."""
    _check_regular(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise _wrong(file, f"truncated, or not safetensors: its header should have {length} bytes; copy it again")
        if length > _LARGEST_HEADER:
            raise _wrong(file, f"a header of {length} bytes; safetensors allows {_LARGEST_HEADER}")
        content = stream.read(length)
    if not content.startswith(b"{"):
        raise _wrong(file, "header: doesn't begin with {; not safetensors, or damaged")
    header = _parsed(file, content, header=True)
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # as mlx writes where it has nothing to say
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _wrong(file, "header: '__metadata__' must hold strings only")
    if not header:
        raise _wrong(file, "holds no tensors")
    ranges = sorted((*_range(file, name, entry), name) for name, entry in header.items())
    _check_ranges(file, ranges, size - 8 - length)
    _check_with_library(file, set(header))
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def _range(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end; as many as its type and shape need."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end], **rest}:
            whole = not rest and len(shape) <= _LARGEST_RANK
        case _:
            whole = False
    if not whole or not all(type(count) is int and 0 <= count < 2**63 for count in (*shape, begin, end)):
        raise _wrong(file, f"header: tensor {_quoted(name)} is malformed")
    if dtype not in _ITEM_BYTES:
        raise _wrong(file, f"tensor {_quoted(name)} has the type {_quoted(dtype)}, which mlx doesn't read")
    needed = math.prod(shape) * _ITEM_BYTES[dtype]
    if needed != end - begin:
        raise _wrong(file, f"tensor {_quoted(name)}: {dtype} {shape} needs {needed} bytes, its range has {end - begin}")
    return begin, end


def _check_ranges(file: Path, ranges: list[tuple[int, int, str]], size: int) -> None:
    """The ranges follow one another from the first byte to the last."""
    last = max(end for _, end, _ in ranges)
    if last > size:
        raise _wrong(file, f"truncated: its tensors need {last} bytes, {size} are there; copy it again")
    position = 0
    for begin, end, name in ranges:
        if begin != position:
            what = (
                "overlaps the one before" if begin < position else f"leaves {begin - position} bytes before it unused"
            )
            raise _wrong(file, f"the range of tensor {_quoted(name)} {what}; the file is damaged or forged")
        position = end
    if position < size:
        raise _wrong(file, f"{size - position} bytes after the last tensor; the file is damaged or forged")


def _check_with_library(file: Path, names: set[str]) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            same = set(opened.keys()) == names
    except SafetensorError as error:
        raise _wrong(file, f"safetensors refuses it: {error}") from None
    if not same:
        raise _wrong(file, "safetensors finds other tensors in it than its header names")
