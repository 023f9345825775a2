"""What a config.json says beside what mlx-lm's classes read of it: translated, or refused by the key's name.

A class of mlx-lm drops the keys that it doesn't know, without a word. Here every key that is known to change the
numbers is held to the source of the class that will compute; the reference is transformers 5.
"""

import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ppo.data.model_files import quoted, read_arrays
from mlx_ppo.errors import ModelError
from mlx_ppo.models.folder import ModelFolder, remapped_types
from mlx_ppo.models.parts import Context

_SHARED = ("base", "cache", "rope_utils", "activations", "switch_layers")  # not architectures of their own
_ACTIVATIONS = {
    r"\b(swiglu|silu)\(": {"silu", "swish"},
    r"\bgelu_approx\b": {"gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate"},
    r"\bgelu\(": {"gelu", "gelu_python"},
    r"\brelu\(": {"relu"},
    r"\b(relu2|relu_squared)\b|square\(nn\.relu": {"relu2"},
}
_ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function")  # the first that is given holds
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # values with which a key that isn't read changes nothing
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "rope_interleaved": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "clip_qkv": (None,),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "use_bidirectional_attention": (None, False),
    "alibi": (None, False),
}
_YARN_UNREAD = {"attention_factor": (None,), "truncate": (None, True)}


def translated(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The top-level keys that mlx-lm has to be given beside, or in place of, those of a config.json.

    Args:
        config: a folder's config.json.
        name: the folder, for messages.
    Returns:
        Empty where mlx-lm reads the folder as it is.
    Raises:
        ModelError: a key changes the numbers and the installed mlx-lm would leave it out.
    """
    text = config.get("text_config")
    if not isinstance(text, dict):
        kind = str(config.get("model_type"))
        found = _section(config, kind, name)
        return {key: value for key, value in found.items() if key not in config or config[key] != value}
    kind = str(text.get("model_type") or f"{config.get('model_type')}_text")
    own = {} if "tie_word_embeddings" in text or "tie_word_embeddings" not in config else {
        "tie_word_embeddings": config["tie_word_embeddings"]
    }  # fmt: skip
    found = {**own, **_section(text, kind, name)}
    if all(key in text and text[key] == value for key, value in found.items()):
        return {}
    return {"text_config": {**text, **found}}


def translations(folder: ModelFolder, *, classifier: bool = False) -> dict[str, Any]:
    """The keys that mlx-lm has to be given, with what the tensors say of the output layer where config.json doesn't.

    Raises:
        ModelError: a key changes the numbers and would be left out.
    """
    given = translated(folder.config, str(folder.path))
    return given if classifier else _output_layer(folder, given)


def _output_layer(folder: ModelFolder, given: Mapping[str, Any]) -> dict[str, Any]:
    heads = [name for name in folder.tensors if name.split(".")[-2:] == ["lm_head", "weight"]]
    config = {**folder.config, **given}
    nested = isinstance(config.get("text_config"), dict)
    section = config["text_config"] if nested else config
    said = section.get("tie_word_embeddings")
    if not heads or said is False:
        return dict(given)
    if (
        said is None
        and _differ(folder, heads[0])
        and "tie_word_embeddings" in _source(str(section.get("model_type", "")))
    ):
        own = {"tie_word_embeddings": False}
        return {**given, "text_config": {**section, **own}} if nested else {**given, **own}
    return dict(given)


def positions_of(config: Mapping[str, Any]) -> Context | None:
    """How far a model without a table of positions reaches, by its config.json, as translated."""
    text = config.get("text_config")
    section = text if isinstance(text, dict) else config
    kind = str(section.get("model_type") or f"{config.get('model_type')}_text")
    rope = section.get("rope_scaling") or section.get("rope_parameters") or {}
    bounds = [Context(window, learned=True) for window in _ignored_window(section, kind)]
    trained = section.get("max_position_embeddings")
    first = rope.get("original_max_position_embeddings") or section.get("original_max_position_embeddings")
    if _kind_of_rope(rope) in ("longrope", "su") and isinstance(first, int):
        bounds.append(Context(first, learned=True))
    if isinstance(trained, int):
        stretched = first * rope["factor"] if isinstance(first, int) and rope.get("factor") else 0
        bounds.append(Context(int(max(trained, stretched)), learned=False))
    return min(bounds, key=lambda bound: (bound.tokens, not bound.learned), default=None)


def _section(section: Mapping[str, Any], kind: str, name: str) -> dict[str, Any]:
    """The changed keys of the part of a config.json that describes the language model."""
    source = _source(kind)
    found = _rope(section, source, name)
    _check_unread({**section, **found}, source, name)
    _check_activation(section, source, name)
    if "n_ctx" in source and "n_ctx" not in section and "n_positions" in section:
        found["n_ctx"] = section["n_positions"]
    return {**found, **_pattern(section, source, name)}


def _rope(section: Mapping[str, Any], source: str, name: str) -> dict[str, Any]:
    """Rope as the class reads it: transformers 5 writes `rope_parameters`, one object or one per type of layer."""
    parameters, found = section.get("rope_parameters"), dict[str, Any]()
    if isinstance(parameters, dict) and not _reads(source, "rope_parameters"):
        local: dict[str, Any] = {}
        if any(isinstance(value, dict) for value in parameters.values()):
            parameters, local = _by_layer(parameters, source, name)
        found = _flat(section, parameters, source, name) | local
    scaling = found.get("rope_scaling", section.get("rope_scaling"))
    if not isinstance(scaling, dict) or _kind_of_rope(scaling) == "default":
        return found
    if not _reads(source, "rope_scaling") and not _reads(source, "rope_parameters"):
        raise _unread(name, "rope_scaling", scaling)
    changed = _scaling({**section, **found}, scaling, name)
    return found | ({"rope_scaling": changed} if changed != scaling else {})


def _by_layer(parameters: Mapping[str, Any], source: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Objects per type of layer into one, and the base of a class that has another for its local layers."""
    kinds = {kind: value for kind, value in parameters.items() if isinstance(value, dict)}
    whole = kinds.get("full_attention", next(iter(kinds.values())))
    local = kinds.get("sliding_attention", whole)
    if set(kinds) <= {"full_attention", "sliding_attention"}:
        if _reads(source, "rope_local_base_freq") and _kind_of_rope(local) == "default" and "rope_theta" in local:
            return whole, {"rope_local_base_freq": local["rope_theta"]}
        if local == whole:
            return whole, {}
    raise _unread(name, "rope_parameters", parameters)


def _flat(section: Mapping[str, Any], parameters: Mapping[str, Any], source: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if key not in parameters:
            continue
        if key == "rope_theta" and section.get(key, parameters[key]) != parameters[key]:
            raise ModelError(
                f"{name}: config.json has {key} {quoted(section[key])}, and {quoted(parameters[key])} in "
                "rope_parameters; delete the wrong one"
            )
        found[key] = parameters[key]
    if "rope_theta" in found and not _reads(source, "rope_theta"):
        raise _unread(name, "rope_theta", found["rope_theta"])
    if _kind_of_rope(parameters) != "default":
        own = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
        given = section.get("rope_scaling")
        if isinstance(given, dict) and any(given.get(key, value) != value for key, value in own.items()):
            raise ModelError(f"{name}: config.json's rope_scaling and rope_parameters differ; delete the wrong one")
        found["rope_scaling"] = own
    return found


def _scaling(section: Mapping[str, Any], scaling: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One scaling with what transformers takes from elsewhere where mlx-lm has a default of its own."""
    kind, found = _kind_of_rope(scaling), dict(scaling)
    if kind == "yarn":
        for key, neutral in _YARN_UNREAD.items():
            if scaling.get(key) not in neutral:
                raise _unread(name, f"rope_scaling.{key}", scaling[key])
        found.setdefault("original_max_position_embeddings", section.get("max_position_embeddings"))
    elif kind in ("longrope", "su") and "short_factor" in scaling:
        found["type"] = kind
        found["long_factor"] = scaling["short_factor"]  # mlx-lm takes these alone; see `positions_of`
    elif kind == "dynamic":
        raise _unread(name, "rope_scaling.rope_type", kind)
    return found


def _kind_of_rope(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def _check_unread(section: Mapping[str, Any], source: str, name: str) -> None:
    for key, neutral in _NEUTRAL.items():
        if section.get(key) not in neutral and not _reads(source, key):
            raise _unread(name, key, section[key])


def _check_activation(section: Mapping[str, Any], source: str, name: str) -> None:
    key = next((key for key in _ACTIVATION_KEYS if section.get(key) is not None), None)
    if key is None or _reads(source, key):
        return
    computed = set[str]().union(*(names for pattern, names in _ACTIVATIONS.items() if re.search(pattern, source)))
    if section.get("model_type") == "gemma":  # mlx-lm computes the first Gemma with the exact GELU, 5e-4 beside it
        computed.add("gelu_pytorch_tanh")
    if computed and section[key] not in computed:
        raise _unread(name, key, section[key])


def _pattern(section: Mapping[str, Any], source: str, name: str) -> dict[str, Any]:
    """Which layers look at everything, for a class that knows only of every nth."""
    kinds = section.get("layer_types")
    if not isinstance(kinds, list) or "layer_types" in source or "sliding_window_pattern" not in source:
        return {}
    for every in range(1, len(kinds) + 2):
        made = ["sliding_attention" if number % every else "full_attention" for number in range(1, len(kinds) + 1)]
        if made == kinds:
            return {"sliding_window_pattern": every}
    raise _unread(name, "layer_types", kinds)


def _ignored_window(section: Mapping[str, Any], kind: str) -> list[int]:
    """The window of attention, where transformers uses it and the class doesn't."""
    window, source = section.get("sliding_window"), _source(kind)
    kinds = section.get("layer_types")
    off = section.get("use_sliding_window", not kind.startswith("qwen")) is False
    if not isinstance(window, int) or isinstance(window, bool) or off:
        return []
    if isinstance(kinds, list) and "sliding_attention" not in kinds:
        return []
    known = _reads(source, "sliding_window") and (isinstance(kinds, list) or "layer_types" not in source)
    return [] if known else [window]


def _differ(folder: ModelFolder, head: str) -> bool:
    ends = ("embed_tokens.weight", "wte.weight")
    other = next((name for name in folder.tensors if name.endswith(ends)), None)
    if other is None or folder.tensors[head] != folder.tensors[other]:
        return True
    arrays = {name: array for file in folder.weight_files for name, array in read_arrays(file).items()}
    return not bool(mx.array_equal(arrays[head], arrays[other]).item())


def _reads(source: str, key: str) -> bool:
    return re.search(rf"\b{key}\b", source) is not None


def _unread(name: str, key: str, value: Any) -> ModelError:
    return ModelError(
        f"{name}: config.json has '{key}': {quoted(str(value))}, which the installed mlx-lm doesn't compute for this "
        "kind of model: its numbers would be another model's. Only folders that do without can be used"
    )


@functools.cache
def _source(kind: str) -> str:
    """The code of mlx-lm that computes a kind of model, with the modules that it builds on; "" where there is none."""
    spec = importlib.util.find_spec("mlx_lm")
    root = Path(next(iter((spec and spec.submodule_search_locations) or [""]))) / "models"
    file = root / f"{remapped_types().get(kind, kind)}.py"
    if not re.fullmatch(r"\w+(-\w+)*", kind) or not file.is_file():
        return ""
    content = file.read_text("utf-8")
    others = [*re.findall(r"^from \.(\w+) import", content, re.M)]
    for line in re.findall(r"^from \. import (.+)$", content, re.M):
        others += re.findall(r"\w+", line)
    return "\n".join([content, *(_source(other) for other in others if other not in _SHARED)])
