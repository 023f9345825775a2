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
from mlx_ppo.models.corrections import ACTIVATION_KEYS, BOTH_GELUS, GELUS, has_foreign_names
from mlx_ppo.models.folder import ModelFolder, remapped_types
from mlx_ppo.models.keys import left_out, mentions, reads, unknown

_SHARED = ("base", "cache", "rope_utils", "activations", "switch_layers")  # not architectures of their own
_ACTIVATIONS = {
    r"\b(swiglu|silu)\(": {"silu", "swish"},
    r"\bgelu_approx\b": {name for name, form in GELUS.items() if form == "tanh"},
    r"\bgelu\(": {name for name, form in GELUS.items() if form == "exact"},
    r"\brelu\(": {"relu"},
    r"\b(relu2|relu_squared)\b|square\(nn\.relu": {"relu2"},
}
_OLDER = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}  # names that GPT-NeoX has
_NAMED = 5
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
    try:
        return _translated(config, name)
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # a value of a kind that nobody expects
        said = f"{type(error).__name__}: {error}"
        raise ModelError(f"{name}: config.json has a value that can't be understood ({quoted(said)})") from None


def _translated(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    text, source = described(config)
    if text is config:
        found = _section(config, source, name)
        return {key: value for key, value in found.items() if key not in config or config[key] != value}
    own = {} if "tie_word_embeddings" in text or "tie_word_embeddings" not in config else {
        "tie_word_embeddings": config["tie_word_embeddings"]
    }  # fmt: skip
    found = {**own, **_section(text, source, name)}
    if all(key in text and text[key] == value for key, value in found.items()):
        return {}
    return {"text_config": {**text, **found}}


def described(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The part of a config.json that describes the language model, and the code of mlx-lm that computes it."""
    text, kind = config.get("text_config"), str(config.get("model_type"))
    if not isinstance(text, dict):
        return config, source_of(kind)
    return text, source_of(str(text.get("model_type") or f"{kind}_text")) or source_of(kind)


def unknown_keys(config: Mapping[str, Any], name: str) -> list[str]:
    """A line for a person, where there are keys of which nobody here knows what they do."""
    found = unknown(*described(config))
    if not found:
        return []
    keys = ", ".join(quoted(key) for key in found[:_NAMED]) + (
        f" and {len(found) - _NAMED} more" * (len(found) > _NAMED)
    )
    return [
        f"warning: {name}: config.json has {keys}, which the installed mlx-lm doesn't read; if that changes the "
        "model's numbers, they are another model's here"
    ]


def misread(folder: ModelFolder) -> list[str]:
    """What stock mlx-lm takes otherwise in a folder than it is taken here; empty: nothing.

    Raises:
        ModelError: see `translations`.
    """
    foreign = has_foreign_names(str(folder.config.get("model_type")), folder.tensors)
    return [*translations(folder), *["the tensors' names"] * foreign]


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
        and "tie_word_embeddings" in source_of(str(section.get("model_type", "")))
    ):
        own = {"tie_word_embeddings": False}
        return {**given, "text_config": {**section, **own}} if nested else {**given, **own}
    return dict(given)


def _section(section: Mapping[str, Any], source: str, name: str) -> dict[str, Any]:
    """The changed keys of the part of a config.json that describes the language model."""
    older = {key: old for key, old in _OLDER.items() if reads(source, old) and not reads(source, key)}
    found = _rope(section, source, name)
    found |= {old: section[key] for key, old in older.items() if key in section and old not in section}
    rest = {key: value for key, value in {**section, **found}.items() if older.get(key) not in found}
    _check_unread(rest, source, name)
    _check_activation(section, source, name)
    if "n_ctx" in source and "n_ctx" not in section and "n_positions" in section:
        found["n_ctx"] = section["n_positions"]
    return {**found, **_pattern(section, source, name)}


def _rope(section: Mapping[str, Any], source: str, name: str) -> dict[str, Any]:
    """Rope as the class reads it: transformers 5 writes `rope_parameters`, one object or one per type of layer."""
    parameters, found = section.get("rope_parameters"), dict[str, Any]()
    if isinstance(parameters, dict) and not reads(source, "rope_parameters"):
        local: dict[str, Any] = {}
        if any(isinstance(value, dict) for value in parameters.values()):
            parameters, local = _by_layer(parameters, source, name)
        found = _flat(section, parameters, source, name) | local
    scaling = found.get("rope_scaling", section.get("rope_scaling"))
    if not isinstance(scaling, dict) or kind_of_rope(scaling) == "default":
        return found
    if not reads(source, "rope_scaling") and not reads(source, "rope_parameters"):
        raise _unread(name, "rope_scaling", scaling)
    changed = _scaling({**section, **found}, scaling, name)
    return found | ({"rope_scaling": changed} if changed != scaling else {})


def _by_layer(parameters: Mapping[str, Any], source: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Objects per type of layer into one, and the base of a class that has another for its local layers."""
    kinds = {kind: value for kind, value in parameters.items() if isinstance(value, dict)}
    whole = kinds.get("full_attention", next(iter(kinds.values())))
    local = kinds.get("sliding_attention", whole)
    if set(kinds) <= {"full_attention", "sliding_attention"}:
        if reads(source, "rope_local_base_freq") and kind_of_rope(local) == "default" and "rope_theta" in local:
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
        older = _OLDER.get(key, key)
        found[older if reads(source, older) else key] = parameters[key]
    if "rope_theta" in found and not mentions(source, "rope_theta"):
        raise _unread(name, "rope_theta", found["rope_theta"])
    if kind_of_rope(parameters) != "default":
        own = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
        given = section.get("rope_scaling")
        if isinstance(given, dict) and any(given.get(key, value) != value for key, value in own.items()):
            raise ModelError(f"{name}: config.json's rope_scaling and rope_parameters differ; delete the wrong one")
        found["rope_scaling"] = own
    return found


def _scaling(section: Mapping[str, Any], scaling: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One scaling with what transformers takes from elsewhere where mlx-lm has a default of its own."""
    kind, found = kind_of_rope(scaling), dict(scaling)
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


def kind_of_rope(parameters: Mapping[str, Any]) -> str:
    """What a scaling of rope calls itself."""
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def _check_unread(section: Mapping[str, Any], source: str, name: str) -> None:
    key = left_out(section, source)
    if key is not None:
        raise _unread(name, key, section[key])


def _check_activation(section: Mapping[str, Any], source: str, name: str) -> None:
    key = next((key for key in ACTIVATION_KEYS if section.get(key) is not None), None)
    if key is None or reads(source, key):
        return
    computed = set[str]().union(*(names for pattern, names in _ACTIVATIONS.items() if re.search(pattern, source)))
    if section.get("model_type") in BOTH_GELUS:
        computed |= GELUS.keys()
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


def _differ(folder: ModelFolder, head: str) -> bool:
    ends = ("embed_tokens.weight", "wte.weight")
    other = next((name for name in folder.tensors if name.endswith(ends)), None)
    if other is None or folder.tensors[head] != folder.tensors[other]:
        return True
    arrays = {name: array for file in folder.weight_files for name, array in read_arrays(file).items()}
    return not bool(mx.array_equal(arrays[head], arrays[other]).item())


def _unread(name: str, key: str, value: Any) -> ModelError:
    return ModelError(
        f"{name}: config.json has '{key}': {quoted(str(value))}, which the installed mlx-lm doesn't compute for this "
        "kind of model: its numbers would be another model's. Only folders that do without can be used"
    )


@functools.cache
def source_of(kind: str) -> str:
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
    return "\n".join([content, *(source_of(other) for other in others if other not in _SHARED)])
