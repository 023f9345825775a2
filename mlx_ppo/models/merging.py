"""Adapters of every kind that mlx-lm and PEFT save, added to the weights that they lie on.

    LoRA: W' = W + scale * B A                          DoRA: W' = m * (W + scale * B A) / |W + scale * B A|

with |.| the norm of each row, an output. Both compute what the adapters compute, so merging is exact but for rounding.

Sources: Hu et al. 2021, arXiv:2106.09685, section 4.1; Liu et al. 2024 (DoRA), arXiv:2402.09353, eq. 5.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ppo.compute.adapted import layer_of
from mlx_ppo.data.model_files import json_object, read_arrays
from mlx_ppo.errors import ModelError
from mlx_ppo.models.peft import ARRAYS, CONFIG, check, factor
from mlx_ppo.models.trunk import Trunk

_PREFIX = "base_model.model."
_LEAVES = ("lora_a", "lora_b", "m")
_SIDE = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.default)?(?:\.weight)?")
_WHOLE = re.compile(r"\.modules_to_save(?:\.default)?")
_BENEATH = ".base_layer.weight"  # PEFT saves the embedding under an adapter, too
_BLOCK = re.compile(r"\.\d+\.")
_Sides = dict[str, dict[str, mx.array]]


def merged_arrays(folder: Path, trunk: Trunk) -> dict[str, mx.array]:
    """Every parameter of a model with the adapters of a folder merged.

    Args:
        folder: of mlx-lm's adapters (`fine_tune_type` lora, dora or full) or PEFT's (LoRA, DoRA, whole modules).
        trunk: in float32, its quantised layers dequantised.
    Raises:
        ModelError: it isn't such a folder, holds what can't be merged exactly, or doesn't fit the model.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder of adapters")
    described = json_object(folder / CONFIG)
    arrays = _of_peft(folder, described, trunk) if "peft_type" in described else _of_mlx_lm(folder, described, trunk)
    if not arrays:
        raise ModelError(f"{folder}: changes nothing of this model")
    for name, array in arrays.items():
        if not mx.isfinite(array).all().item():
            raise ModelError(f"{folder}: {name} isn't finite once merged; the adapters are damaged")
    return {**trunk.base, **arrays}


def _of_mlx_lm(folder: Path, described: Mapping[str, Any], trunk: Trunk) -> dict[str, mx.array]:
    kind = described.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise ModelError(f"{folder}: fine_tune_type is {str(kind)[:40]!r}; lora, dora and full can be merged")
    given = {name: array.astype(mx.float32) for name, array in read_arrays(folder / "adapters.safetensors").items()}
    if kind == "full":
        return {name: _whole(folder, name, array, trunk) for name, array in given.items()}
    try:
        scale = float(described["lora_parameters"]["scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}: {CONFIG} has no scale in lora_parameters ({error})") from None
    if not math.isfinite(scale):
        raise ModelError(f"{folder}: its lora_parameters have the scale {scale}, which can't be")
    sides: _Sides = {}
    for name, array in given.items():
        layer, _, leaf = name.rpartition(".")
        if leaf not in _LEAVES or (leaf == "m" and kind == "lora") or f"{layer}.weight" not in trunk.base:
            raise ModelError(f"{folder}: {name} is no adapter of a layer of this model; was it trained on another one?")
        sides.setdefault(layer, {})[leaf] = array
    modules = dict(trunk.model.named_modules())
    found = {}
    for layer, side in sides.items():
        a, b, weight = *_pair(folder, layer, side, "lora_a", "lora_b"), trunk.base[f"{layer}.weight"]
        embeds = isinstance(modules[layer], nn.Embedding)
        if weight.ndim == 3 and kind == "dora":
            raise ModelError(f"{folder}: DoRA on the experts of {layer}, which mlx-lm doesn't compute")
        # experts have [E, r, in] and [E, out, r], embeddings [V, r] and [r, D], linear layers [in, r] and [r, out]
        first, second = (b, a) if weight.ndim == 3 else (a, b)
        _require(folder, layer, a.ndim == b.ndim == weight.ndim and first.shape[-1] == second.shape[-2])
        change = first @ second if weight.ndim == 3 or embeds else (first @ second).T
        found[f"{layer}.weight"] = _changed(folder, layer, weight, scale * change, side.get("m"), scaled=kind == "dora")
    return found


def _of_peft(folder: Path, described: Mapping[str, Any], trunk: Trunk) -> dict[str, mx.array]:
    check(folder, described, merging=True)
    if not (folder / ARRAYS).exists() and (folder / "adapter_model.bin").exists():
        raise ModelError(f"{folder}: adapter_model.bin is a pickle, which can run code; save it as {ARRAYS}")
    layers = _layers(trunk)
    sides, found = _Sides(), dict[str, mx.array]()
    for name, array in read_arrays(folder / ARRAYS).items():
        matched = _SIDE.fullmatch(name.removeprefix(_PREFIX))
        if name.endswith(_BENEATH):
            place = _place(name.removeprefix(_PREFIX).removesuffix(_BENEATH))
            key = f"{layers.get(place, place[1])}.weight"
            found[key] = _whole(folder, key, array.astype(mx.float32), trunk)
            continue
        if matched is None:
            own = _WHOLE.sub("", name.removeprefix(_PREFIX))
            layer, _, leaf = own.rpartition(".")
            key = f"{layers.get(_place(layer), layer)}.{leaf}"
            if not described.get("modules_to_save") or (_BLOCK.search(key) and array.ndim > 1):
                raise ModelError(f"{folder}: {name} is no adapter of a layer of this model; merge it with PEFT")
            found[key] = _whole(folder, key, array.astype(mx.float32), trunk)
            continue
        layer = layers.get(_place(matched[1]), "")
        if not layer or trunk.base[f"{layer}.weight"].ndim != 2:
            raise ModelError(f"{folder}: {name} is no adapter of a layer of this model; was it trained on another one?")
        sides.setdefault(layer, {})[matched[2]] = array.astype(mx.float32)
    for layer, side in sides.items():
        embeds, scaled = "embedding_A" in side or "embedding_B" in side, bool(described.get("use_dora"))
        if embeds and scaled:
            raise ModelError(f"{folder}: DoRA on the embedding {layer}; merge it with PEFT")
        if embeds and trunk.output_layer is None:
            raise ModelError(
                f"{folder}: {layer} is the output layer, too, to which PEFT adds nothing; it can't be merged"
            )
        names = ("embedding_A", "embedding_B") if embeds else ("A", "B")
        a, b = _pair(folder, layer, side, *names)
        _require(folder, layer, a.ndim == b.ndim == 2 and b.shape[1] == a.shape[0])
        change = factor(folder, described, layer, len(a)) * (b @ a)
        weight = found.get(f"{layer}.weight", trunk.base[f"{layer}.weight"])
        found[f"{layer}.weight"] = _changed(
            folder, layer, weight, change.T if embeds else change, side.get("magnitude_vector"), scaled=scaled
        )
    return found


def _layers(trunk: Trunk) -> dict[tuple[int, str], str]:
    """The model's layers by what transformers and mlx-lm call alike: number and name in a block, or the last word."""
    names = [name.removesuffix(".weight") for name in trunk.base if name.endswith(".weight")]
    return {_place(name): name for name in names}


def _place(layer: str) -> tuple[int, str]:
    return layer_of(layer) if _BLOCK.search(layer) else (-1, layer.rpartition(".")[2])


def _pair(folder: Path, layer: str, side: Mapping[str, mx.array], *names: str) -> tuple[mx.array, mx.array]:
    missing = [name for name in names if name not in side]
    if missing:
        raise ModelError(f"{folder}: {layer} has no {' and '.join(missing)}")
    return side[names[0]], side[names[1]]


def _require(folder: Path, layer: str, fits: bool) -> None:
    if not fits:
        raise ModelError(f"{folder}: the adapter of {layer} has shapes that don't fit each other or this model")


def _changed(
    folder: Path, layer: str, weight: mx.array, change: mx.array, magnitude: mx.array | None, *, scaled: bool
) -> mx.array:
    """A weight [out, in] with what an adapter adds, and with DoRA each row at its magnitude."""
    _require(folder, layer, change.shape == weight.shape)
    after = weight + change
    if not scaled:
        return after
    if magnitude is None:
        raise ModelError(f"{folder}: {layer} has no magnitude, which DoRA adapters have")
    magnitude = magnitude.reshape(-1)
    _require(folder, layer, magnitude.shape == after.shape[:1])
    return (magnitude / mx.linalg.norm(after, axis=1))[:, None] * after


def _whole(folder: Path, name: str, array: mx.array, trunk: Trunk) -> mx.array:
    own = trunk.base.get(name)
    if own is None or own.shape != array.shape:
        raise ModelError(
            f"{folder}: {name} {array.shape} is no parameter of this model; was it trained on another one?"
        )
    return array
