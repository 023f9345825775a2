"""What mlx-lm's classes compute or name otherwise than transformers, put right."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function")  # the first that is given holds
GELUS = {"gelu": "exact", "gelu_python": "exact"}
GELUS |= dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate"), "tanh")
BOTH_GELUS = ("gemma", "starcoder2", "gpt_bigcode", "gpt_neox", "gpt2")  # kinds whose GELU `put_right` chooses
_FORWARD = {  # feed-forward parts: the first layer, the gate's ("": none), and the last
    "gemma.MLP": ("up_proj", "gate_proj", "down_proj"),
    "starcoder2.MLP": ("c_fc", "", "c_proj"),
    "gpt_bigcode.MLP": ("c_fc", "", "c_proj"),
    "gpt_neox.MLP": ("dense_h_to_4h", "", "dense_4h_to_h"),
    "gpt2.MLP": ("c_fc", "", "c_proj"),
}
_PREFIX = "transformer."  # of every tensor of a GPT-2, as transformers saves it


def has_foreign_names(kind: str, tensors: Iterable[str]) -> bool:
    """Whether mlx-lm's class of a kind of model doesn't know a folder's names of tensors, and `naming` does."""
    return kind == "gpt2" and any(name.startswith(f"{_PREFIX}h.") for name in tensors)


def naming(classes: Callable[[dict[str, Any]], tuple[type, type]]) -> Callable[..., tuple[type, type]]:
    """mlx-lm's choice of classes for a config.json, with ones that know the names of transformers, too."""

    def chosen(config: dict[str, Any]) -> tuple[type, type]:
        model, arguments = classes(config)
        return (_named(model) if config.get("model_type") == "gpt2" else model), arguments

    return chosen


@functools.cache
def _named(kind: Any) -> type:
    class Named(kind):  # type: ignore[misc]
        """Takes the names of its tensors with and without their prefix."""

        def sanitize(self, weights: dict[str, mx.array]) -> Any:
            """The names and forms of mlx-lm."""
            return super().sanitize({name.removeprefix(_PREFIX): array for name, array in weights.items()})

    return Named


def put_right(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Give the parts of a model that compute something else than transformers a class that computes the same.

    Feed-forward parts get the GELU that config.json names, where mlx-lm always has one of the two (the exact one, or
    that by tanh: logits off by some 5e-4). Gemma 3's embeddings are multiplied by the root of their size in the type
    that is computed in, where mlx-lm rounds it to bfloat16 in every type (off by up to 0.2 %).
    """
    said = next((config[key] for key in ACTIVATION_KEYS if config.get(key) is not None), None)
    form = GELUS.get(str(said))
    if config.get("model_type") == "gemma" and said in (None, "gelu"):  # a Gemma's "gelu" is by tanh, too
        form = "tanh"
    for module in model.modules():
        kind: Any = type(module)
        name = f"{kind.__module__.removeprefix('mlx_lm.models.')}.{kind.__name__}"
        if name in _FORWARD and form is not None:
            module.__class__ = _with_gelu(kind, *_FORWARD[name], form)
        elif name == "gemma3_text.Gemma3Model":
            module.__class__ = _exactly_scaled(kind)


@functools.cache
def _with_gelu(kind: Any, first: str, gate: str, last: str, form: str) -> type:
    gelu = nn.gelu if form == "exact" else nn.gelu_approx

    class WithGelu(kind):  # type: ignore[misc]
        """last(gelu(first(x))), or last(gelu(gate(x)) * first(x))."""

        def __call__(self, x: mx.array) -> Any:
            """[..., D] to [..., D]."""
            states = gelu(self[gate](x)) * self[first](x) if gate else gelu(self[first](x))
            return self[last](states)

    return WithGelu


@functools.cache
def _exactly_scaled(kind: Any) -> type:
    class Scaled(kind):  # type: ignore[misc]
        """Brings embeddings that come out right, rounded factor included."""

        def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> Any:
            """Token numbers [B, S] to states [B, S, D]."""
            states: mx.array = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
            if states.dtype != mx.bfloat16:
                factor = mx.array(math.sqrt(self.args.hidden_size))
                states = states * (factor / factor.astype(mx.bfloat16)).astype(states.dtype)
            return super().__call__(inputs, cache, states)

    return Scaled
