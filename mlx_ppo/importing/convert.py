"""`mlx-ppo import`: a GGUF file or a Hugging Face folder into a model folder, checked before it appears."""

import contextlib
import difflib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ppo.data.model_files import wrong
from mlx_ppo.errors import ModelError
from mlx_ppo.importing.folders import copy_folder
from mlx_ppo.importing.gguf_file import GGUFFile, read_gguf
from mlx_ppo.importing.gguf_names import Plan, Wanted, plan_model
from mlx_ppo.importing.gguf_tokenizer import write_tokenizer
from mlx_ppo.importing.gguf_weights import GROUP, floating_type, kept_bits, read_tensor
from mlx_ppo.importing.shards import ShardWriter
from mlx_ppo.models.foreign import foreign
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.write import write_folder

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_PROMPTS = (
    "The quick brown fox, 12 × 3.5 = 42:\n\tнаука, 日本, 🙂",  # noqa: RUF001
    "a plain text",  # for vocabularies that can't write everything
)


@dataclass(frozen=True)
class Summary:
    """What was imported."""

    folder: Path
    kind: str  # of model
    tensors: int
    bytes: int
    stored: str  # how the weights are kept

    def __str__(self) -> str:
        """One line."""
        return f"{self.folder}: {self.kind}, {self.tensors} tensors, {self.bytes / 1e6:,.0f} MB, {self.stored}; checked"


def import_model(source: Path, target: Path, *, dtype: str = "auto") -> Summary:
    """Turn a GGUF file, or copy a Hugging Face folder, into a model folder that doesn't exist yet.

    Args:
        source: the file or folder.
        target: the folder to make.
        dtype: "float32", "float16", "bfloat16", or "auto": keep what is stored; blocks that mlx can't hold become
            float16.
    Raises:
        ModelError: the source is wrong, the target exists, or what came out fails its check.
        RunError: the target can't be written.
    """
    if target.exists() or target.is_symlink():
        raise wrong(target, "exists already; give a new folder")
    if not source.exists():
        raise wrong(source, f"no such file or folder{_nearest(source)}; give a GGUF file or a model folder")
    _check_kind(source)
    made: list[Summary] = []
    convert = copy_folder if source.is_dir() else _convert_gguf

    def fill(folder: Path) -> None:
        made.append(Summary(target, *convert(source, folder, _DTYPES.get(dtype))))
        _check(folder, target)

    write_folder(target, _removed_on_error(fill))
    return made[0]


def _nearest(source: Path) -> str:
    others = source.parent.iterdir() if source.parent.is_dir() else ()
    names = [entry.name for entry in others if entry.name != source.name]
    near = difflib.get_close_matches(source.name, names, n=1)
    return f" (did you mean '{source.with_name(near[0])}'?)" if near else ""


def _check_kind(source: Path) -> None:
    """ModelError for files that are no GGUF at first sight: pickles, archives."""
    try:
        what = None if source.is_dir() else foreign(source)
    except OSError as error:
        raise wrong(source, f"can't be read: {error.strerror or error}") from None
    if what is not None:
        raise wrong(source, what)


def _removed_on_error(fill: Callable[[Path], None]) -> Callable[[Path], None]:
    def careful(folder: Path) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            fill(folder)
            stack.pop_all()

    return careful


def _convert_gguf(source: Path, folder: Path, dtype: mx.Dtype | None) -> tuple[str, int, int, str]:
    file = read_gguf(source)
    plan = plan_model(file)
    vocabulary = write_tokenizer(file, folder, plan.config["vocab_size"])
    computed = dtype or floating_type(file, plan.tensors)
    config = plan.config | {"torch_dtype": str(computed).removeprefix("mlx.core.")}
    config |= {f"{name}_token_id": vocabulary.named.get(name) for name in ("bos", "eos", "pad")}
    if dtype is None:
        config |= _quantization(file, plan.tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    shards = ShardWriter(folder)
    for tensor in plan.tensors:
        shards.add(read_tensor(file, tensor, dtype, computed))
    shards.finish()
    return plan.config["model_type"], len(plan.tensors), shards.bytes, _stored(file, plan, dtype, computed)


def _quantization(file: GGUFFile, tensors: tuple[Wanted, ...]) -> dict[str, Any]:
    """mlx-lm's description of the matrices that stay quantised: the most frequent width, and each exception."""
    bits = {tensor.name.removesuffix(".weight"): kept_bits(file, tensor) for tensor in tensors}
    kept = {name: width for name, width in bits.items() if width}
    if not kept:
        return {}
    usual = Counter(kept.values()).most_common(1)[0][0]
    described: dict[str, Any] = {"group_size": GROUP, "bits": usual, "mode": "affine"}
    for name, width in kept.items():
        if width != usual:
            described[name] = {"group_size": GROUP, "bits": width}
    return {"quantization": described, "quantization_config": described}


def _stored(file: GGUFFile, plan: Plan, dtype: mx.Dtype | None, computed: mx.Dtype) -> str:
    if dtype is not None:
        return str(dtype).removeprefix("mlx.core.")
    kinds: Counter[str] = Counter()
    for tensor in plan.tensors:
        if len(tensor.shape) == 2:
            kind = file.tensors[tensor.source].kind.name
            bits = kept_bits(file, tensor)
            plain = kind in ("F32", "F16", "BF16")
            kinds[f"{kind} kept" if plain else f"{kind} kept in {bits} bits" if bits else f"{kind} as float16"] += 1
    return ", ".join(f"{count} matrices {what}" for what, count in kinds.most_common())


def _check(folder: Path, target: Path) -> None:
    """Load what was written as any later command will; run a prompt; encode and decode it."""
    try:
        trunk = load_trunk(folder)
    except ModelError as error:
        raise ModelError(str(error).replace(str(folder), str(target))) from None
    tokenizer = trunk.tokenizer
    found = [tokenizer.decode(tokenizer.encode(prompt, bos=True)).strip() for prompt in _PROMPTS]
    if not any(text == prompt for text, prompt in zip(found, _PROMPTS, strict=True)):
        raise wrong(target, f"the tokenizer turns {_PROMPTS[-1]!r} into {found[-1]!r}")
    tokens = tokenizer.encode(_PROMPTS[0], bos=True)
    logits = trunk.model(mx.array([tokens]))
    if not mx.isfinite(logits).all().item():
        raise wrong(target, "the model's output on a short prompt isn't finite; the weights are damaged")
