"""LoRA adapters in the form of Hugging Face's PEFT: read as a role's weights, and written.

PEFT's `lora_A` [rank, in] and `lora_B` [out, rank] are `lora_a` and `lora_b` transposed; its factor is alpha / rank, or
alpha / sqrt(rank) with `use_rslora`. Every key of its `adapter_config.json` is taken, is known to change no number, or
is refused by name.

Sources: PEFT's `LoraConfig` and its documents on checkpoint formats; Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ppo.compute.adapted import dimensions, layer_of
from mlx_ppo.data.model_files import json_object, read_arrays
from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import HEAD, MERGE, Weights, load_adapters

CONFIG, ARRAYS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = re.compile(r"(.+\.\d+\..+)\.lora_([AB])(?:\.default)?\.weight")
_OF_BLOCK = re.compile(r"\.\d+\.")
_TAKEN = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
_WITHOUT_EFFECT = {  # on what trained adapters compute: their names tell where they lie, their shapes the ranks
    *("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "task_type", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_dropout"),
    *("megatron_core", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
    *("runtime_config", "qalora_group_size", "monteclora_config"),
}
_ON_WHAT_IS_THERE = (True, False, None, "gaussian", "orthogonal", "eva")  # beginnings that leave the base weights alone


def given_adapters(folder: Path, adapted: Mapping[str, nn.Module]) -> Weights:
    """The weights of a folder of LoRA adapters, mlx-lm's or PEFT's.

    Raises:
        ModelError: it isn't one, or its adapters don't fit the trunk.
    """
    return (read_peft if _is_peft(folder) else load_adapters)(folder, adapted)


def _is_peft(folder: Path) -> bool:
    try:
        return "peft_type" in json_object(folder / CONFIG)
    except ModelError:
        return False


def read_peft(folder: Path, adapted: Mapping[str, nn.Module]) -> Weights:
    """The weights of a folder that PEFT saved; ranks that differ are filled up with zeros.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        adapted: the trunk's adaptable layers.
    Raises:
        ModelError: it isn't LoRA, has something that this program can't compute, or doesn't fit the trunk.
    """
    described = json_object(folder / CONFIG)
    check(folder, described)
    if not (folder / ARRAYS).exists() and (folder / "adapter_model.bin").exists():
        raise ModelError(f"{folder}: adapter_model.bin is a pickle, which can run code; save it as {ARRAYS}")
    sides: dict[str, dict[str, mx.array]] = {}
    layers = {layer_of(name): name for name in adapted}
    for name, array in read_arrays(folder / ARRAYS).items():
        found = _NAME.fullmatch(name)
        layer = layers.get(layer_of(found[1])) if found else None
        if found is None or layer is None:
            raise ModelError(
                f"{folder}: {name} is no LoRA adapter of a linear layer of this model; was it trained on another one?"
            )
        sides.setdefault(layer, {})[found[2]] = array.astype(mx.float32)
    for layer, pair in sides.items():
        _check_pair(folder, layer, pair, adapted[layer])
    rank = max(len(pair["A"]) for pair in sides.values())
    factors = {layer: factor(folder, described, layer, len(pair["A"])) for layer, pair in sides.items()}
    scale = max(factors.values(), key=abs)
    arrays: dict[str, mx.array] = {}
    for layer, pair in sorted(sides.items()):
        more = rank - len(pair["A"])
        arrays[f"{layer}.lora_a"] = mx.pad(pair["A"].T, [(0, 0), (0, more)])
        own = pair["B"].T if factors[layer] == scale else pair["B"].T * (factors[layer] / scale)
        arrays[f"{layer}.lora_b"] = mx.pad(own, [(0, more), (0, 0)])
    arrays = {name: mx.contiguous(array) for name, array in arrays.items()}
    mx.eval(arrays)  # a planner traces what is given, not how it was made
    return Weights(arrays, scale)


def check(folder: Path, described: Mapping[str, Any], *, merging: bool = False) -> None:
    """Refuse by name what these adapters have beyond LoRA; `merging`: beyond what can be merged exactly.

    Raises:
        ModelError: names it.
    """
    kind = described["peft_type"]
    if kind != "LORA":
        raise ModelError(f"{folder}: PEFT's {kind}; only LoRA can be read: merge it into the model with PEFT")
    mend = "merge it into the model with PEFT"
    if described.get("use_dora") and not merging:
        raise ModelError(f"{folder}: DoRA adapters; only LoRA can be trained on: {MERGE}")
    if described.get("init_lora_weights", True) not in _ON_WHAT_IS_THERE:
        raise ModelError(
            f"{folder}: init_lora_weights = {json.dumps(described['init_lora_weights'])} changes the model's own "
            "weights, too; convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion), or merge it"
        )
    if described.get("bias", "none") != "none":
        raise ModelError(
            f"{folder}: bias = {json.dumps(described['bias'])}: it trained the model's biases, too; {mend}"
        )
    if (whole := described.get("modules_to_save")) and not merging:
        raise ModelError(f"{folder}: modules_to_save: it trained all of {', '.join(map(str, whole))}, too; {MERGE}")
    known = _TAKEN | _WITHOUT_EFFECT | {"use_dora", "init_lora_weights", "bias", "modules_to_save"}
    others = sorted(key for key, value in described.items() if key not in known and value not in (None, False, [], {}))
    if others:
        raise ModelError(f"{folder}: {CONFIG} has {', '.join(others)}, which this program doesn't know; {mend}")


def _check_pair(folder: Path, layer: str, pair: Mapping[str, mx.array], module: nn.Module) -> None:
    if len(pair) < 2:
        raise ModelError(f"{folder}: damaged adapters in PEFT's format: {layer} has only one of lora_A and lora_B")
    inputs, outputs = dimensions(module)
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != inputs or b.shape[0] != outputs or a.shape[0] != b.shape[1]:
        raise ModelError(f"{folder}: lora_A {a.shape} and lora_B {b.shape} of {layer} don't fit [{inputs}, {outputs}]")
    for array in pair.values():
        if not mx.isfinite(array).all().item():
            raise ModelError(f"{folder}: {layer} contains NaN or infinity; the adapters are damaged")


def factor(folder: Path, described: Mapping[str, Any], layer: str, rank: int) -> float:
    """The factor on a layer's product: `alpha_pattern`, matched to the end of a name as PEFT does, goes first.

    Raises:
        ModelError: there is none.
    """
    try:
        own = (alpha for key, alpha in (described.get("alpha_pattern") or {}).items() if _matches(key, layer))
        alpha = float(next(own, described.get("lora_alpha", 8)))
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise ModelError(f"{folder}: {CONFIG}: lora_alpha or alpha_pattern can't be read ({error})") from None
    found = alpha / (math.sqrt(rank) if described.get("use_rslora") else rank) if rank else math.nan
    if not math.isfinite(found) or found == 0:
        raise ModelError(f"{folder}: {layer} has alpha {alpha} and rank {rank}, which make no factor")
    return found


def _matches(key: str, layer: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", layer) is not None


def fill_with_peft(folder: Path, weights: Weights, tensors: Iterable[str], *, base: str) -> None:
    """Write the two files into a folder that is there.

    Args:
        folder: where.
        weights: LoRA adapters; a head is left out.
        tensors: names of the tensors in the model's own folder, which say what transformers calls its layers.
        base: what the files call the model they lie on; names that it hasn't stay out of them.
    Raises:
        ModelError: a layer that the folder has under no such name.
    """
    names = {layer_of(own): own for own in (name.removesuffix(".weight") for name in tensors) if _OF_BLOCK.search(own)}
    arrays: dict[str, mx.array] = {}
    targets: set[str] = set()
    for name, array in sorted(weights.arrays.items()):
        if name.startswith(HEAD):
            continue
        layer, _, side = name.rpartition(".")
        own = names.get(layer_of(layer))
        if own is None or array.ndim != 2:
            raise ModelError(f"PEFT has no form for adapters on {layer}: transformers knows no such layer")
        own = own if not own.startswith("h.") else f"transformer.{own}"  # GPT-2's older files leave it out
        targets.add(own)
        arrays[f"{_PREFIX}{own}.lora_{side[-1].upper()}.weight"] = mx.contiguous(array.T)
    rank = max(array.shape[1] for name, array in weights.arrays.items() if name.endswith(".lora_a"))
    document = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True},
        **{"r": rank, "lora_alpha": weights.scale * rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False},
        "target_modules": sorted(targets),
    }
    mx.save_safetensors(str(folder / ARRAYS), arrays, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
