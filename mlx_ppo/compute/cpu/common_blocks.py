"""The most common kind of block (Llama's, Qwen's): how it is known, and what numpy computes of it on a CPU.

RMS norms, rotary embeddings, grouped heads, a gated feed-forward part, in float32.

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; Ainslie et al. 2023, arXiv:2305.13245 (grouped heads);
Zhang and Sennrich 2019, arXiv:1910.07467 (RMS norm).
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ppo.compute.adapted import is_plain_linear
from mlx_ppo.compute.cpu.activations import GatedMLP, kind_of
from mlx_ppo.compute.cpu.products import Floats, can_prepare
from mlx_ppo.compute.cpu.rotary import factors_of
from mlx_ppo.compute.engine import Body
from mlx_ppo.compute.kv_cache import keeps_all_tokens

LOWEST = np.float32(-1e30)  # added to the score of what doesn't count
Rotation = tuple[Floats, Floats]  # factors of a vector's own elements, and of its exchanged halves
# mlx-lm's blocks that compute this and nothing else, with their attention; a test holds the list to mlx-lm.
_SUPPORTED = {
    "internlm3.TransformerBlock": "internlm3.Attention",
    "llama.TransformerBlock": "llama.Attention",
    "mimo.TransformerBlock": "mimo.Attention",
    "nanbeige.TransformerBlock": "nanbeige.Attention",
    "qwen2.TransformerBlock": "qwen2.Attention",
    "qwen3.TransformerBlock": "qwen3.Attention",
    "seed_oss.TransformerBlock": "seed_oss.Attention",
}


def output_of(body: Body) -> nn.Module:
    """The layer whose matrix makes logits of states: one of its own, or the embedding."""
    layer: nn.Module = body.output_layer or body.inner.embed_tokens
    return layer


def unsupported(body: Body) -> str:
    """Why a model isn't computed by these kernels; empty where it is, as far as its types tell."""
    if not can_prepare():
        return "OpenBLAS isn't there"
    if not all(array.dtype == mx.float32 for array in body.base.values()):
        return "weights that aren't float32"
    embedding, norm, head = body.inner.get("embed_tokens"), body.inner.get("norm"), body.output_layer
    for block in body.model.layers:
        if found := _unsupported_block(block):
            return found
    if not isinstance(embedding, nn.Embedding) or type(norm) is not nn.RMSNorm:
        return "this kind of embedding or final norm"
    if head is not None and type(head) is not nn.Linear:
        return "this kind of output layer"
    return "" if keeps_all_tokens(body.model) else "a window or a recurrent state"


def _unsupported_block(block: Any) -> str:
    kind = kind_of(block)
    if kind not in _SUPPORTED or kind_of(block.self_attn) != _SUPPORTED[kind]:
        return f"blocks of the kind {kind or type(block).__name__}"
    attention, mlp = block.self_attn, block.mlp
    linear = [attention[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    norms = [block.input_layernorm, block.post_attention_layernorm, attention.get("q_norm"), attention.get("k_norm")]
    if type(mlp) is not GatedMLP or not all(norm is None or type(norm) is nn.RMSNorm for norm in norms):
        return f"this form of {kind}"
    if not all(map(is_plain_linear, (*linear, mlp.gate_proj, mlp.up_proj, mlp.down_proj))):
        return "this kind of linear layer"
    return ""


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


def angles_of(rope: Any) -> tuple[Any, ...]:
    """What the angles of a rotary embedding depend on."""
    facts = sorted({**vars(rope), **rope}.items())
    return type(rope), *((name, _fact(value)) for name, value in facts if name not in ("shared", "_training"))


def _fact(value: Any) -> Any:
    return np.asarray(value).tobytes() if isinstance(value, mx.array) else repr(value)


def rotation_at(rope: Any, offsets: mx.array, size: int) -> Rotation:
    """Factors [B, 1, D] of a vector's own elements, and of its exchanged halves, at the rows' offsets [B]."""
    factors, exchanged = factors_of(lambda one: rope(one, offset=offsets), (len(offsets), 1, 1, size))
    return np.asarray(factors)[:, 0], np.asarray(exchanged)[:, 0]


def rotated(vectors: Floats, rotation: Rotation) -> Floats:
    """Rotate [B, H, D]."""
    half = vectors.shape[-1] // 2
    factors, exchanged = rotation
    found: Floats = vectors * factors
    found[..., :half] += vectors[..., half:] * exchanged[..., :half]
    found[..., half:] += vectors[..., :half] * exchanged[..., half:]
    return found


def rotated_back(gradient: Floats, rotation: Rotation) -> Floats:
    """Gradients [B, H, D] by what `rotated` was given, for those by what it gave."""
    half = gradient.shape[-1] // 2
    factors, exchanged = rotation
    found: Floats = gradient * factors
    others = gradient * exchanged
    found[..., :half] += others[..., half:]
    found[..., half:] += others[..., :half]
    return found
