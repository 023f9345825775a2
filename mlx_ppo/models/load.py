"""A checked local folder into a trunk: model, tokenizer, compute type. Nothing is ever looked up elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_ppo.compute.cpu.activations import use_fast_gates
from mlx_ppo.compute.cpu.compact import keep_compact
from mlx_ppo.compute.cpu.rotary import share_turns
from mlx_ppo.compute.device import on_cpu
from mlx_ppo.data.model_files import read_arrays
from mlx_ppo.data.random import mx_key
from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import BRANCH_ENDS, parameters_of
from mlx_ppo.models.folder import ModelFolder, check_depth, check_model_folder
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.runtime.open_files import open_files_limit_kept
from mlx_ppo.tokenizers.load import load_tokenizer

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_LONGEST_ERROR = 300  # characters
_INITIAL_DEVIATION = 0.02
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
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, where half precision and quantised
            products are slow; the stored types on a GPU.
        random_seed: start from random weights of this seed instead of the folder's.
        embeddings: then take the token embeddings from this model folder.
        classifier: the folder has a sequence classifier's head and may lack an output layer; neither is loaded.
        compact: leave a quantised folder's matrices quantised on a CPU too, computing in float32 with the same numbers:
            less memory, more time. Of no effect with random weights or half precision.
    Raises:
        ModelError: whatever is wrong with the folder, in one line.
    """
    folder = check_model_folder(path, weights=random_seed is None)
    given = random_seed is None
    model, config, remark = _read(folder, dtype, strict=given, classifier=classifier, compact=compact and given)
    if random_seed is not None:
        _randomise(model, random_seed)
        if embeddings is not None:
            _take_embeddings(model, embeddings)
    _settle(model, _target(dtype), path)
    use_fast_gates(model)
    share_turns(model)
    tokenizer = load_tokenizer(path, config)  # with what generation_config.json says of end-of-sequence
    _check_vocabulary(folder, model, tokenizer.vocab_size, tokenizer.eos_id)
    with computing_with(str(path)):
        trunk = Trunk(model, tokenizer, str(path))
    trunk.remark = remark
    if random_seed is None:
        trunk.reload = _reload(folder, dtype, classifier=classifier, compact=compact)
    return trunk


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
        raise ModelError(f"{name}: mlx-lm cannot compute with this model ({_said(error)})") from None


def _read(
    folder: ModelFolder, dtype: str, *, strict: bool, classifier: bool, compact: bool
) -> tuple[nn.Module, dict[str, Any], str]:
    """A model whose weights are read when they are needed, its config, and what a person should know of how.

    Raises:
        ModelError: mlx-lm can't load it, or a tensor is missing.
    """
    path = folder.path
    with open_files_limit_kept():
        from mlx_lm.utils import dequantize_model, load_model
    given = {**rope_keys(folder.config), **({"tie_word_embeddings": True} if classifier else {})}
    try:
        model, config = load_model(
            path, lazy=True, strict=strict and not classifier, model_config=given, trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(f"{path}: mlx-lm cannot load this model ({_said(error)})") from None
    missing = sorted(set(parameters_of(model)) - set(folder.tensors)) if classifier else []
    if missing:
        raise ModelError(f"{path}: tensor {missing[0]!r} is missing")
    quantised = any(isinstance(module, nn.QuantizedLinear) for module in model.modules())
    if not (on_cpu() and dtype in ("auto", "float32") and quantised):
        return model, config, ""
    model.set_dtype(mx.float32)  # scales too: in half precision the blocks would lose what they hold
    remark = f"{path.name}: quantised; computed in float32 here, because a CPU is slow with quantised products"
    if not compact:
        return dequantize_model(model), config, remark
    keep_compact(model)
    return model, config, remark + ", of one matrix at a time"


def _target(dtype: str) -> mx.Dtype | None:
    """The compute type; None for the stored one."""
    return DTYPES.get(dtype, mx.float32 if on_cpu() else None)


def _reload(folder: ModelFolder, dtype: str, *, classifier: bool, compact: bool) -> Callable[[], dict[str, mx.array]]:
    """A function that reads the same weights again, for a trunk that was evicted."""
    seen = _stamps(folder)

    def read() -> dict[str, mx.array]:
        if _stamps(folder) != seen:
            raise ModelError(f"{folder.path}: its weights changed on disk while a run was reading them in turns")
        model, _, _ = _read(folder, dtype, strict=True, classifier=classifier, compact=compact)
        _settle(model, _target(dtype), folder.path)
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
        model: nn.Module = model_class(arguments.from_dict({**config, **rope_keys(config)}))
        quantisation = config.get("quantization")
        if quantisation is not None:
            bits, group = int(quantisation["bits"]), int(quantisation["group_size"])

            def chosen(path: str, module: nn.Module) -> Any:
                fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % group == 0
                return quantisation.get(path, fits)  # a layer may have bits of its own

            nn.quantize(
                model, group_size=group, bits=bits, mode=quantisation.get("mode", "affine"), class_predicate=chosen
            )
    except Exception as error:
        raise ModelError(f"{name}: mlx-lm cannot make this model ({_said(error)})") from None
    return model


def rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Top-level rope keys for folders of transformers 5: they stand in `rope_parameters`, where mlx-lm may not look."""
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return {}
    found: dict[str, Any] = {}
    if "rope_theta" in parameters and "rope_theta" not in config:
        found["rope_theta"] = parameters["rope_theta"]
    if parameters.get("rope_type", "default") != "default" and not config.get("rope_scaling"):
        found["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return found


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


def _settle(model: nn.Module, dtype: mx.Dtype | None, path: Path) -> None:
    """Read and cast tensor by tensor, so that the peak is one tensor above the model; refuse NaN and infinity."""
    arrays = parameters_of(model)
    for name in list(arrays):
        array = arrays.pop(name)  # whatever else held it would keep it in memory, once read, beside what it is cast to
        if mx.issubdtype(array.dtype, mx.floating):
            settled = array if dtype is None else array.astype(dtype)
            if not mx.isfinite(settled).all().item():
                raise ModelError(f"{path}: {name} contains NaN or infinity; the weights are damaged")
            model.update(tree_unflatten([(name, settled)]))
    mx.eval(parameters_of(model))


def _check_vocabulary(folder: ModelFolder, model: nn.Module, tokens: int, end: int) -> None:
    """Nothing below checks a token's number: mlx would read beside the embeddings."""
    rows = int(model_vocabulary(model, folder))
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
