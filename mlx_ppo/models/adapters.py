"""LoRA adapters that can be exchanged on a trunk, and mlx-lm's format for them on disk.

A trunk's linear layers are replaced by ones that add an adapter's output while one is attached and cost nothing
otherwise. Parameter names stay those of the plain model.

Source: Hu et al. 2021, arXiv:2106.09685, eq. 3 (with mlx-lm's `scale` in place of alpha / rank).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ppo.compute.cpu.compact import CompactLinear
from mlx_ppo.config.sections import LoraSection
from mlx_ppo.data.model_files import json_object, read_arrays
from mlx_ppo.data.random import mx_key
from mlx_ppo.errors import ModelError

HEAD = "head."
BRANCH_ENDS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "fc2", "w2", "wo", "dense_4h_to_h")


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


class _Adapted:
    """Mixin: the base layer's output plus scale * (x A) B while an adapter is attached; dropout where asked for."""

    attached: tuple[mx.array, mx.array, float] | None
    noise: tuple[float, mx.array] | None

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = super().__call__(x)  # type: ignore[misc]
        if self.attached is not None:
            a, b, scale = self.attached
            rows = (-1, x.shape[-1])  # the factor on the small side, the sum inside the product
            added = mx.addmm(
                y.reshape(-1, y.shape[-1]), x.reshape(rows) @ a.astype(x.dtype), (scale * b).astype(x.dtype)
            )
            y = added.reshape(y.shape)
        if self.noise is not None:
            share, key = self.noise
            y = mx.where(mx.random.bernoulli(1 - share, y.shape, key=key), y / (1 - share), 0.0)
        return y


class AdaptedLinear(_Adapted, nn.Linear):
    """`nn.Linear` to which an adapter can be attached."""


class AdaptedEmbedding(_Adapted, nn.Embedding):
    """`nn.Embedding` on whose output dropout can act."""


class AdaptedQuantizedLinear(_Adapted, nn.QuantizedLinear):
    """`nn.QuantizedLinear` to which an adapter can be attached."""


class AdaptedCompactLinear(_Adapted, CompactLinear):
    """`CompactLinear` to which an adapter can be attached."""


_ADAPTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: AdaptedLinear,
    nn.QuantizedLinear: AdaptedQuantizedLinear,
    CompactLinear: AdaptedCompactLinear,
}


def plain(layer: nn.Module) -> None:
    """Leave nothing attached to a layer."""
    object.__setattr__(layer, "attached", None)
    object.__setattr__(layer, "noise", None)


def make_adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Replace every linear layer inside the model's blocks by its adaptable form.

    Returns:
        The adaptable layers by their dotted names.
    """
    modules: list[tuple[str, nn.Module]] = model.named_modules()
    prefix = next(name for name, module in modules if module is model.layers[0]).removesuffix("0")
    adapted: dict[str, nn.Module] = {}
    for name, module in modules:
        kind = _ADAPTED.get(type(module))
        if kind is not None and name.startswith(prefix):
            module.__class__ = kind
            plain(module)
            adapted[name] = module
    return adapted


def make_noisy(inner: nn.Module, adapted: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The layers on whose output dropout acts: the embedding, and the last of each attention and feed-forward part."""
    found = [layer for name, layer in adapted.items() if name.endswith(BRANCH_ENDS)]
    for module in inner.values():
        if type(module) is nn.Embedding:
            module.__class__ = AdaptedEmbedding
            plain(module)
            found.append(module)
    return found


def parameters_of(model: nn.Module) -> dict[str, mx.array]:
    """A model's parameters by their dotted names."""
    return dict(tree_flatten(model.parameters()))


def layer_of(name: str) -> tuple[int, str]:
    """A block's number and the name inside it, from a dotted name such as `model.layers.3.mlp.up_proj`."""
    parts = name.split(".")
    at = next(index for index, part in enumerate(parts) if part.isdigit())
    return int(parts[at]), ".".join(parts[at + 1 :])


def lowest_block(weights: Weights) -> int | None:
    """The lowest block that some weights change; 0 where they change what lies outside the blocks; None for none."""
    names = [name for name in weights.arrays if not name.startswith(HEAD)]
    return min(map(_block_of, names), default=None)


def _block_of(name: str) -> int:
    try:
        return layer_of(name)[0]
    except StopIteration:  # the embedding, the final norm, the output layer
        return 0


def dimensions(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, quantised or not."""
    outputs, inputs = layer.weight.shape
    if isinstance(layer, nn.QuantizedLinear):
        inputs = inputs * 32 // layer.bits
    return inputs, outputs


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


def load_adapters(folder: Path, adapted: Mapping[str, nn.Module]) -> Weights:
    """Read a folder of LoRA adapters in mlx-lm's format.

    Raises:
        ModelError: the folder isn't one, or its adapters don't fit the trunk.
    """
    try:
        scale = float(json_object(folder / "adapter_config.json")["lora_parameters"]["scale"])
    except (ModelError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: not a folder of LoRA adapters in mlx-lm's format ({error})") from None
    if not math.isfinite(scale):
        raise ModelError(f"{folder}: its lora_parameters have the scale {scale}, which can't be")
    arrays = read_arrays(folder / "adapters.safetensors")
    for name, array in arrays.items():
        layer, _, side = name.rpartition(".")
        module = adapted.get(layer)
        if module is None or side not in ("lora_a", "lora_b"):
            raise ModelError(
                f"{folder}: {name} belongs to no linear layer of this model; was it trained on another one?"
            )
        expected = dimensions(module)[0 if side == "lora_a" else 1]
        if array.ndim != 2 or array.shape[0 if side == "lora_a" else 1] != expected:
            raise ModelError(f"{folder}: {name} has shape {array.shape}, which doesn't fit this model")
        if f"{layer}.lora_b" not in arrays or f"{layer}.lora_a" not in arrays:
            raise ModelError(f"{folder}: {layer} has only one of lora_a and lora_b")
        if arrays[f"{layer}.lora_a"].shape[-1] != arrays[f"{layer}.lora_b"].shape[0]:
            raise ModelError(f"{folder}: lora_a and lora_b of {layer} have different ranks")
        if not mx.isfinite(array).all().item():
            raise ModelError(f"{folder}: {name} contains NaN or infinity; the adapters are damaged")
    return Weights({name: array.astype(mx.float32) for name, array in sorted(arrays.items())}, scale)
