"""A checked local folder into a trunk: model, tokenizer, compute type. Nothing is ever looked up elsewhere."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_ppo.compute.adapted import BRANCH_ENDS, parameters_of
from mlx_ppo.compute.choose import chosen_engine
from mlx_ppo.compute.engine import Engine
from mlx_ppo.data.model_files import read_arrays
from mlx_ppo.data.random import mx_key
from mlx_ppo.errors import ModelError
from mlx_ppo.models.corrections import naming, put_right
from mlx_ppo.models.folder import ModelFolder, check_depth, check_model_folder
from mlx_ppo.models.gate import translated, translations, unknown_keys
from mlx_ppo.models.positions import context_of
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.runtime.device_errors import device_failure
from mlx_ppo.runtime.open_files import open_files_limit_kept
from mlx_ppo.tokenizers.load import FolderTokenizer, load_tokenizer
from mlx_ppo.tokenizers.piece_tokenizer import PieceTokenizer

_LONGEST_ERROR = 300  # characters
_INITIAL_DEVIATION = 0.02
_FEW_TOKENS = 8  # so many can be named
_EMBEDDINGS = ("embed_tokens.weight", "embeddings.weight", "wte.weight")


def load_trunk(
    path: Path,
    *,
    dtype: str = "auto",
    random_seed: int | None = None,
    embeddings: Path | None = None,
    classifier: bool = False,
    compact: bool = False,
) -> Trunk:
    """Load a model folder.

    Args:
        path: folder with config.json, safetensors and a tokenizer.
        dtype: "float32", "bfloat16", "float16", or "auto": what suits the engine, see `Engine.dtype`.
        random_seed: start from random weights of this seed instead of the folder's.
        embeddings: then take the token embeddings from this model folder.
        classifier: the folder has a sequence classifier's head and may lack an output layer; neither is loaded.
        compact: leave a quantised folder's matrices quantised on a CPU too, computing in float32 with the same numbers:
            less memory, more time. Of no effect with random weights or half precision.
    Raises:
        ModelError: whatever is wrong with the folder, in one line.
    """
    folder, engine = check_model_folder(path, weights=random_seed is None), chosen_engine()
    form = _Form(dtype, classifier=classifier, compact=compact and random_seed is None)
    if random_seed is not None and is_quantised(folder.config):  # its stored forms say nothing of random weights
        model, config, remarks = empty_model(unquantised(folder.config), str(path)), folder.config, list[str]()
    else:
        model, config, remarks = _read(folder, engine, form, strict=random_seed is None)
    if random_seed is not None:
        _randomise(model, random_seed)
        if embeddings is not None:
            _take_embeddings(model, embeddings)
    remarks += _settle(model, engine, form, folder)
    engine.prepare(model)
    tokenizer = load_tokenizer(path, config)  # with what generation_config.json says of end-of-sequence
    _check_vocabulary(folder, model, tokenizer)
    with computing_with(str(path)):
        trunk = Trunk(model, tokenizer, str(path), engine)
    trunk.remarks[:0] = [*remarks, *unknown_keys(folder.config, path.name)]
    trunk.context = context_of(trunk.inner, folder.config, trunk.name)
    if random_seed is None:
        trunk.reload = _reload(folder, engine, form)
    return trunk


class _Form(NamedTuple):
    """How a model is to be read."""

    dtype: str
    classifier: bool
    compact: bool


@contextmanager
def computing_with(name: str) -> Iterator[None]:
    """Say that a model can't be computed with: its config.json has numbers that fit the weights' shapes, no more.

    Raises:
        ModelError: whatever mlx or mlx-lm raises within.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if device_failure(error) is not None:
            raise
        raise ModelError(f"{name}: mlx-lm cannot compute with this model ({_said(error)})") from None


def _read(
    folder: ModelFolder, engine: Engine, form: _Form, *, strict: bool
) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """A model whose weights are read when they are needed, its config, and what a person should know of how.

    Raises:
        ModelError: mlx-lm can't load it, or a tensor is missing.
    """
    path = folder.path
    with open_files_limit_kept():
        from mlx_lm.utils import _get_classes, load_model
    given = translations(folder, classifier=form.classifier)
    given = {**given, **({"tie_word_embeddings": True} if form.classifier else {})}
    try:
        model, config = load_model(
            path,
            lazy=True,
            strict=strict and not form.classifier,
            model_config=given,
            get_model_classes=naming(_get_classes),
            trust_remote_code=False,
        )
    except Exception as error:
        raise ModelError(f"{path}: mlx-lm cannot load this model ({_said(error)})") from None
    missing = sorted(set(parameters_of(model)) - set(folder.tensors)) if form.classifier else []
    if missing:
        raise ModelError(f"{path}: tensor {missing[0]!r} is missing")
    model, remark = engine.unpacked(model, form.dtype, compact=form.compact)
    put_right(model, config)
    return model, config, [f"{path.name}: {remark}"] if remark else []


def _reload(folder: ModelFolder, engine: Engine, form: _Form) -> Callable[[], dict[str, mx.array]]:
    """A function that reads the same weights again, for a trunk that was evicted."""
    seen = _stamps(folder)

    def read() -> dict[str, mx.array]:
        if _stamps(folder) != seen:
            raise ModelError(f"{folder.path}: its weights changed on disk while a run was reading them in turns")
        model, _, _ = _read(folder, engine, form, strict=True)
        _settle(model, engine, form, folder)
        return parameters_of(model)

    return read


def _stamps(folder: ModelFolder) -> list[tuple[int, int]]:
    try:
        facts = [file.stat() for file in folder.weight_files]
    except OSError as error:
        raise ModelError(f"{folder.path}: its weights can't be read again ({error.strerror})") from None
    return [(fact.st_size, fact.st_mtime_ns) for fact in facts]


def _said(error: Exception) -> str:
    """What a library said, on one line and cut; the names of missing tensors come on lines of their own."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words if len(words) <= _LONGEST_ERROR else words[:_LONGEST_ERROR] + '…'}"


def empty_model(config: dict[str, Any], name: str) -> nn.Module:
    """The modules of a config.json; nothing is computed for their weights, which are random, until somebody asks.

    Raises:
        ModelError: mlx-lm doesn't know the architecture, or something is missing.
    """
    check_depth(Path(name), config)
    with open_files_limit_kept():
        from mlx_lm.utils import _get_classes
    try:
        model_class, arguments = _get_classes(config)
        model: nn.Module = model_class(arguments.from_dict({**config, **translated(config, name)}))
        quantisation = config.get("quantization")
        if quantisation is not None:
            bits, group = int(quantisation["bits"]), int(quantisation["group_size"])

            def chosen(path: str, module: nn.Module) -> Any:
                fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % group == 0
                return quantisation.get(path, fits)  # a layer may have bits of its own

            nn.quantize(
                model, group_size=group, bits=bits, mode=quantisation.get("mode", "affine"), class_predicate=chosen
            )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{name}: mlx-lm cannot make this model ({_said(error)})") from None
    put_right(model, config)
    return model


def _randomise(model: nn.Module, seed: int) -> None:
    """Normal weights of deviation 0.02 for matrices; biases and the outputs of each block's branches 0; norms stay.

    So every block starts as the identity, which trains more steadily, on small data above all.
    """
    fresh: list[tuple[str, mx.array]] = []
    for name, array in parameters_of(model).items():
        if array.ndim < 2:
            if name.endswith(".bias"):
                fresh.append((name, mx.zeros_like(array)))  # mlx draws them from its global generator
            continue
        deviation = 0.0 if name.removesuffix(".weight").endswith(BRANCH_ENDS) else _INITIAL_DEVIATION
        fresh.append((name, deviation * mx.random.normal(array.shape, key=mx_key(seed, "initialise", name))))
    model.update(tree_unflatten(fresh))


def _take_embeddings(model: nn.Module, source: Path) -> None:
    """Put the token embeddings of another model folder into a model of the same width and vocabulary."""
    name, own = next(item for item in parameters_of(model).items() if item[0].endswith(_EMBEDDINGS))
    for file in check_model_folder(source).weight_files:
        found = read_arrays(file)
        if name in found and found[name].shape == own.shape:
            model.update(tree_unflatten([(name, found[name].astype(mx.float32))]))
            return
    raise ModelError(f"{source}: has no token embeddings {name} of shape {own.shape}")


def _settle(model: nn.Module, engine: Engine, form: _Form, folder: ModelFolder) -> list[str]:
    """Read and cast tensor by tensor, so that the peak is one tensor above the model.

    Returns:
        What a person should know of the type.
    Raises:
        ModelError: NaN and infinity, or a type whose range this model leaves.
    """
    path, arrays = folder.path, parameters_of(model)
    dtype, stored = compute_dtype(engine, form.dtype, arrays, model), _stored(arrays)
    if dtype == mx.float16 and str(folder.config.get("model_type", "")).startswith("gemma"):
        raise ModelError(
            f"{path}: a Gemma's states leave float16's range; choose model.dtype = 'bfloat16' or 'float32'"
        )
    for name in list(arrays):
        array = arrays.pop(name)  # whatever else held it would keep it in memory, once read, beside what it is cast to
        if mx.issubdtype(array.dtype, mx.floating):
            settled = array.astype(dtype)
            if not mx.isfinite(settled).all().item():
                raise ModelError(f"{path}: {name} contains NaN or infinity; the weights are damaged")
            model.update(tree_unflatten([(name, settled)]))
        elif name.endswith(".weight") and array.dtype != mx.uint32:  # of that type quantised matrices are packed
            kind = str(array.dtype).removeprefix("mlx.core.")
            raise ModelError(f"{path}: {name} holds {kind}, not floats; convert it where its scale is known")
    mx.eval(parameters_of(model))
    if form.dtype != "auto" or dtype in (stored, mx.float32):
        return []
    names = (str(kind).removeprefix("mlx.core.") for kind in (dtype, stored))
    return ["{}: computed in {}, stored in {}; model.dtype chooses another".format(path.name, *names)]


def _stored(arrays: Mapping[str, mx.array]) -> mx.Dtype:
    return next(array.dtype for array in arrays.values() if mx.issubdtype(array.dtype, mx.floating))


def is_quantised(config: dict[str, Any]) -> bool:
    """Whether a config.json says that the weights are quantised."""
    return "quantization" in config or "quantization_config" in config


def unquantised(config: dict[str, Any]) -> dict[str, Any]:
    """The same architecture with plain matrices."""
    return {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}


def compute_dtype(engine: Engine, wanted: str, arrays: Mapping[str, mx.array], model: nn.Module) -> mx.Dtype:
    """The type that an engine computes a model in, for a setting of `model.dtype`."""
    stored = _stored(arrays)
    packed = [module for module in model.modules() if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)]
    beyond = sum(module.weight.size * (32 // module.bits - 1) for module in packed)  # numbers that an element holds
    return engine.dtype(wanted, stored, sum(array.size for array in arrays.values()) + beyond)


def _check_vocabulary(folder: ModelFolder, model: nn.Module, tokenizer: FolderTokenizer | PieceTokenizer) -> None:
    """Nothing below checks a token's number: mlx would read beside the embeddings."""
    rows, tokens, end = int(model_vocabulary(model, folder)), tokenizer.vocab_size, tokenizer.eos_id
    if rows < tokens <= rows + _FEW_TOKENS:
        added = ", ".join(tokenizer.piece(index) for index in range(rows, tokens))
        raise ModelError(
            f"{folder.path}: the tokenizer has {tokens} tokens, the model only {rows}; {added} was "
            "added to the tokenizer without a row: delete it there, or take the model that it was added for"
        )
    if tokens > rows:
        raise ModelError(
            f"{folder.path}: the tokenizer has {tokens} tokens, the model only {rows}; they don't belong together"
        )
    if not 0 <= end < rows:
        raise ModelError(f"{folder.path}: the end-of-sequence token {end} is none of the model's {rows} tokens")


def model_vocabulary(model: nn.Module, folder: ModelFolder) -> int:
    """Rows of the output layer, from the config or from the model's own embedding."""
    text = folder.config.get("text_config")
    for config in (folder.config, text if isinstance(text, dict) else {}):
        if isinstance(config.get("vocab_size"), int):
            return int(config["vocab_size"])
    return max(m.weight.shape[0] for m in model.modules() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding))
