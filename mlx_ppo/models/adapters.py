"""A role's weights: LoRA adapters or all parameters, a scalar head; and mlx-lm's format for them on disk.

Source: Hu et al. 2021, arXiv:2106.09685, eq. 3 (with mlx-lm's `scale` in place of alpha / rank).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ppo.compute.adapted import dimensions, layer_of
from mlx_ppo.config.sections import LoraSection
from mlx_ppo.data.model_files import json_object, read_arrays
from mlx_ppo.data.random import mx_key
from mlx_ppo.errors import ModelError

HEAD = "head."
MERGE = "fuse it into the model first (`mlx-ppo merge`)"


@dataclass(frozen=True)
class Weights:
    """What a role adds to, or puts in place of, the trunk's own weights.

    `arrays` maps names to float32 arrays: `<layer>.lora_a` [in, rank] and `<layer>.lora_b` [rank, out]; or plain
    parameter names (full fine-tuning); and `head.weight` [D], `head.bias` [] for a scalar head.
    """

    arrays: Mapping[str, mx.array]
    scale: float = 1.0

    def holding(self, arrays: Mapping[str, mx.array]) -> "Weights":
        """The same kind of weights with other arrays."""
        return replace(self, arrays=arrays)


def lowest_block(weights: Weights) -> int | None:
    """The lowest block that some weights change; 0 where they change what lies outside the blocks; None for none."""
    names = [name for name in weights.arrays if not name.startswith(HEAD)]
    return min(map(_block_of, names), default=None)


def _block_of(name: str) -> int:
    try:
        return layer_of(name)[0]
    except StopIteration:  # the embedding, the final norm, the output layer
        return 0


def new_adapters(adapted: Mapping[str, nn.Module], lora: LoraSection, *, key: str, seed: int) -> Weights:
    """Fresh adapters: A uniform within 1/sqrt(in), B zero, so that the trunk's output is unchanged.

    Args:
        adapted: the trunk's adaptable layers.
        lora: where they go, of which rank, and the factor on their output.
        key: the role's name, so that roles with one seed differ.
        seed: the run's seed.
    Raises:
        ModelError: a target that no block has.
    """
    names = {name: layer_of(name) for name in adapted}
    known = sorted({inner for _, inner in names.values()})
    for target in lora.targets:
        if target not in known:
            raise ModelError(f"lora.targets: no layer is named {target!r}; this model has {', '.join(known)}")
    depth = max(number for number, _ in names.values()) + 1
    lowest = depth - lora.layers if lora.layers else 0
    arrays: dict[str, mx.array] = {}
    for name, (number, inner) in names.items():
        if number < lowest or (lora.targets and inner not in lora.targets):
            continue
        inputs, outputs = dimensions(adapted[name])
        bound = 1 / math.sqrt(inputs)
        arrays[f"{name}.lora_a"] = mx.random.uniform(-bound, bound, (inputs, lora.rank), key=mx_key(seed, key, name))
        arrays[f"{name}.lora_b"] = mx.zeros((lora.rank, outputs))
    return Weights(arrays, lora.scale)


def adapter_config(weights: Weights, blocks: int) -> dict[str, Any]:
    """The `adapter_config.json` with which stock mlx-lm loads these weights."""
    sides = [name for name in weights.arrays if name.endswith(".lora_a")]
    if not sides:
        return {"fine_tune_type": "full", "num_layers": blocks}
    places = [layer_of(name.removesuffix(".lora_a")) for name in sides]
    return {
        "fine_tune_type": "lora",
        "num_layers": blocks - min(number for number, _ in places),
        "lora_parameters": {
            "rank": weights.arrays[sides[0]].shape[1],
            "scale": weights.scale,
            "dropout": 0.0,
            "keys": sorted({inner for _, inner in places}),
        },
    }


def _check_kind(folder: Path, described: Mapping[str, Any]) -> None:
    """ModelError where a folder says that it holds something else, by its name."""
    kind = described.get("fine_tune_type", "lora")
    if "peft_type" in described:
        raise _OtherKind(f"{folder}: adapters in PEFT's format; convert them to mlx-lm's, or fuse them into the model")
    if kind == "dora":
        raise _OtherKind(f"{folder}: DoRA adapters; only LoRA can be trained on: {MERGE}")
    if kind == "full":
        raise _OtherKind(f"{folder}: weights of a full fine-tuning, not adapters: {MERGE}")


class _OtherKind(Exception):
    """A folder of adapters that aren't LoRA's, in mlx-lm's format."""


def load_adapters(folder: Path, adapted: Mapping[str, nn.Module]) -> Weights:
    """Read a folder of LoRA adapters in mlx-lm's format.

    Raises:
        ModelError: the folder isn't one, or its adapters don't fit the trunk.
    """
    scale = adapters_scale(folder)
    return fitting_adapters(folder, read_arrays(folder / "adapters.safetensors"), scale, adapted)


def adapters_scale(folder: Path) -> float:
    """The factor on the output of a folder's LoRA adapters, of which its `adapter_config.json` tells.

    Raises:
        ModelError: it tells of none.
    """
    try:
        described = json_object(folder / "adapter_config.json")
        _check_kind(folder, described)
        scale = float(described["lora_parameters"]["scale"])
    except _OtherKind as error:
        raise ModelError(str(error)) from None
    except (ModelError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: not a folder of LoRA adapters in mlx-lm's format ({error})") from None
    if not math.isfinite(scale):
        raise ModelError(f"{folder}: its lora_parameters have the scale {scale}, which can't be")
    return scale


def fitting_adapters(
    where: Path, arrays: Mapping[str, mx.array], scale: float, adapted: Mapping[str, nn.Module]
) -> Weights:
    """Adapters that were read from `where`, in float32.

    Raises:
        ModelError: they don't fit the trunk, or are damaged.
    """
    for name, array in arrays.items():
        layer, _, side = name.rpartition(".")
        module = adapted.get(layer)
        if module is None or side not in ("lora_a", "lora_b"):
            raise ModelError(
                f"{where}: {name} belongs to no linear layer of this model; was it trained on another one?"
            )
        expected = dimensions(module)[0 if side == "lora_a" else 1]
        if array.ndim != 2 or array.shape[0 if side == "lora_a" else 1] != expected:
            raise ModelError(f"{where}: {name} has shape {array.shape}, which doesn't fit this model")
        if f"{layer}.lora_b" not in arrays or f"{layer}.lora_a" not in arrays:
            raise ModelError(f"{where}: {layer} has only one of lora_a and lora_b")
        if arrays[f"{layer}.lora_a"].shape[-1] != arrays[f"{layer}.lora_b"].shape[0]:
            raise ModelError(f"{where}: lora_a and lora_b of {layer} have different ranks")
        if not mx.isfinite(array).all().item():
            raise ModelError(f"{where}: {name} contains NaN or infinity; the adapters are damaged")
    return Weights({name: array.astype(mx.float32) for name, array in sorted(arrays.items())}, scale)
