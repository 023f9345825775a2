"""The most common kind of block (Llama's, Qwen's): how it is known, and what numpy computes of it on a CPU.

RMS norms, rotary embeddings, grouped heads, a gated feed-forward part, in float32.

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; Ainslie et al. 2023, arXiv:2305.13245 (grouped heads);
Zhang and Sennrich 2019, arXiv:1910.07467 (RMS norm).
"""

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ppo.compute.cpu.activations import GatedMLP
from mlx_ppo.compute.cpu.products import Floats, can_prepare
from mlx_ppo.compute.cpu.rotary import factors_of
from mlx_ppo.compute.device import on_cpu
from mlx_ppo.compute.kv_cache import keeps_all_tokens
from mlx_ppo.models.adapters import AdaptedLinear

if TYPE_CHECKING:
    from mlx_ppo.models.trunk import Trunk

LOWEST = np.float32(-1e30)  # added to the score of what doesn't count
Turns = tuple[Floats, Floats]  # factors of a vector's own elements, and of its exchanged halves
_OF_BLOCK = {"self_attn", "input_layernorm", "mlp", "post_attention_layernorm"}
_OF_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "n_heads", "n_kv_heads", "scale", "rope", "offset", "reshape"}
_OF_ATTENTION |= {"scaled_dot_product_attention", "shape", "transpose", "update_and_fetch"}
_HEAD_NORMS = {"q_norm", "k_norm"}


def output_of(trunk: "Trunk") -> nn.Module:
    """The layer whose matrix makes logits of states: one of its own, or the embedding."""
    layer: nn.Module = trunk.output_layer or trunk.inner.embed_tokens
    return layer


def understood(trunk: "Trunk") -> bool:
    """Whether the architecture is of this kind, as far as its types and the names in its code tell."""
    embedding, norm, head = trunk.inner.get("embed_tokens"), trunk.inner.get("norm"), trunk.output_layer
    return (
        on_cpu()
        and can_prepare()
        and all(array.dtype == mx.float32 for array in trunk.base.values())
        and isinstance(embedding, nn.Embedding)
        and type(norm) is nn.RMSNorm
        and (head is None or type(head) is nn.Linear)
        and all(_is_common(block) for block in trunk.model.layers)
        and keeps_all_tokens(trunk.model)
    )


def _is_common(block: Any) -> bool:
    if _names(block) != _OF_BLOCK or _names(block.self_attn) - _HEAD_NORMS != _OF_ATTENTION:
        return False
    attention, mlp = block.self_attn, block.mlp
    linear = [attention[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    norms = [block.input_layernorm, block.post_attention_layernorm, *filter(None, map(attention.get, _HEAD_NORMS))]
    return (
        type(mlp) is GatedMLP
        and all(type(norm) is nn.RMSNorm for norm in norms)
        and all(type(layer) is AdaptedLinear for layer in (*linear, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    )


def _names(module: Any) -> set[str]:
    """Names of all attributes that a module's code reads."""
    code = getattr(type(module).__call__, "__code__", None)
    return set(code.co_names) if code else set()


def view(array: mx.array) -> Floats:
    """The memory of an array, which must be contiguous in one of the two orders."""
    found = np.asarray(array)
    return found if found.flags.c_contiguous or found.flags.f_contiguous else np.ascontiguousarray(found)


def normed(states: Floats, weight: Floats, eps: np.float32) -> Floats:
    """Root-mean-square norm of states [..., D] with a weight [D]."""
    found: Floats = states * inverse_size(states, eps)
    found *= weight
    return found


def inverse_size(states: Floats, eps: np.float32) -> Floats:
    """One over the root of the mean square of states [..., D]: [..., 1]."""
    squares = np.einsum("...d,...d->...", states, states)[..., None]
    squares /= states.shape[-1]
    squares += eps
    found: Floats = np.reciprocal(np.sqrt(squares, out=squares), out=squares)
    return found


def kind_of(rope: Any) -> tuple[Any, ...]:
    """What the angles of a rotary embedding depend on."""
    facts = sorted({**vars(rope), **rope}.items())
    return type(rope), *((name, _fact(value)) for name, value in facts if name not in ("turns", "_training"))


def _fact(value: Any) -> Any:
    return np.asarray(value).tobytes() if isinstance(value, mx.array) else repr(value)


def turns_at(rope: Any, offsets: mx.array, size: int) -> Turns:
    """Factors [B, 1, D] of a vector's own elements, and of its exchanged halves, at the rows' offsets [B]."""
    factors, exchanged = factors_of(lambda one: rope(one, offset=offsets), (len(offsets), 1, 1, size))
    return np.asarray(factors)[:, 0], np.asarray(exchanged)[:, 0]


def turned(vectors: Floats, turns: Turns) -> Floats:
    """Rotate [B, H, D]."""
    half = vectors.shape[-1] // 2
    factors, exchanged = turns
    found: Floats = vectors * factors
    found[..., :half] += vectors[..., half:] * exchanged[..., :half]
    found[..., half:] += vectors[..., :half] * exchanged[..., half:]
    return found


def turned_back(slopes: Floats, turns: Turns) -> Floats:
    """Gradients [B, H, D] by what `turned` was given, for those by what it gave."""
    half = slopes.shape[-1] // 2
    factors, exchanged = turns
    found: Floats = slopes * factors
    others = slopes * exchanged
    found[..., :half] += others[..., half:]
    found[..., half:] += others[..., :half]
    return found
