"""Layers whose output an adapter adds to while one is attached, and that cost nothing more otherwise.

Source: Hu et al. 2021, arXiv:2106.09685, eq. 3 (with mlx-lm's `scale` in place of alpha / rank).
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

BRANCH_ENDS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "fc2", "w2", "wo", "dense_4h_to_h")


class Among(NamedTuple):
    """Rows of a batch that are read without the others, and get the noise that they would get among them."""

    rows: mx.array  # [b], their places
    shape: tuple[int, int]  # rows and positions of the whole batch


class Adapted:
    """Mixin: the base layer's output plus scale * (x A) B while an adapter is attached; dropout where asked for."""

    attached: tuple[mx.array, mx.array, float] | None
    noise: tuple[float, mx.array, Among | None] | None

    def __call__(self, x: mx.array) -> mx.array:
        """[..., in] to [..., out]."""
        y: mx.array = super().__call__(x)  # type: ignore[misc]
        if self.attached is not None:
            a, b, scale = self.attached
            rows = (-1, x.shape[-1])  # the factor on the small side, the sum inside the product
            added = mx.addmm(
                y.reshape(-1, y.shape[-1]), x.reshape(rows) @ a.astype(x.dtype), (scale * b).astype(x.dtype)
            )
            y = added.reshape(y.shape)
        if self.noise is not None:
            share, key, among = self.noise
            shape = y.shape if among is None else (*among.shape, *y.shape[2:])
            stays = mx.random.bernoulli(1 - share, shape, key=key)
            if among is not None:
                stays = stays[among.rows, : y.shape[1]]
            y = mx.where(stays, y / (1 - share), 0.0)
        return y


@functools.cache
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    """A kind of layer to which an adapter can be attached."""
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {"__doc__": f"{kind.__name__}, see `Adapted`."})


def is_plain_linear(layer: Any) -> bool:
    """Whether this is `nn.Linear`, adaptable, and nothing more."""
    return type(layer) is _adapted(nn.Linear)


def plain(layer: nn.Module) -> None:
    """Leave nothing attached to a layer."""
    object.__setattr__(layer, "attached", None)
    object.__setattr__(layer, "noise", None)


def make_adaptable(model: nn.Module) -> tuple[dict[str, nn.Module], str]:
    """Replace the linear layers inside the model's blocks by their adaptable form.

    Experts of mixtures are no linear layers; their routers stay as they are, so that they go on choosing for the
    experts that they were trained with.

    Returns:
        The adaptable layers by their dotted names, and what a person should know of those left out.
    """
    modules: list[tuple[str, nn.Module]] = model.named_modules()
    prefix = next(name for name, module in modules if module is model.layers[0]).removesuffix("0")
    mixtures = tuple(f"{name}." for name, module in modules if any(map(_is_experts, module.children().values())))
    adapted: dict[str, nn.Module] = {}
    for name, module in modules:
        kind = type(module)
        linear = kind is nn.Linear or (isinstance(module, nn.QuantizedLinear) and not isinstance(module, Adapted))
        if linear and name.startswith(prefix) and not (name.startswith(mixtures) and not _is_shared(name)):
            module.__class__ = _adapted(kind)
            plain(module)
            adapted[name] = module
    parts = sorted({layer_of(name)[1].rpartition(".")[2] for name in adapted})
    said = f"a mixture of experts: adapters lie on {', '.join(parts)}, not on experts and their router"
    return adapted, said if mixtures else ""


def _is_experts(part: Any) -> bool:
    return isinstance(part, nn.Module) and type(part).__module__ == "mlx_lm.models.switch_layers"


def _is_shared(name: str) -> bool:
    """Whether this is part of an expert that is always asked."""
    return "shared" in name and not name.endswith("gate")


def make_noisy(inner: nn.Module, adapted: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The layers on whose output dropout acts: the embedding, and the last of each attention and feed-forward part."""
    found = [layer for name, layer in adapted.items() if name.endswith(BRANCH_ENDS)]
    for module in inner.values():
        if type(module) is nn.Embedding:
            object.__setattr__(module, "__class__", _adapted(nn.Embedding))
            plain(module)
            found.append(module)
    return found


def count_of(arrays: Iterable[mx.array]) -> int:
    """Numbers in arrays; in those of quantised layers as many as 4 bits each make."""
    return sum(array.size * (8 if array.dtype == mx.uint32 else 1) for array in arrays)


def parameters_of(model: nn.Module) -> dict[str, mx.array]:
    """A model's parameters by their dotted names."""
    return dict(tree_flatten(model.parameters()))


def layer_of(name: str) -> tuple[int, str]:
    """A block's number and the name inside it, from a dotted name such as `model.layers.3.mlp.up_proj`."""
    parts = name.split(".")
    at = next(index for index, part in enumerate(parts) if part.isdigit())
    return int(parts[at]), ".".join(parts[at + 1 :])


def dimensions(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, quantised or not."""
    outputs, inputs = layer.weight.shape
    if isinstance(layer, nn.QuantizedLinear):
        inputs = inputs * 32 // layer.bits
    return inputs, outputs
