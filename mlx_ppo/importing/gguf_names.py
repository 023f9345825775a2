"""What an architecture's tensors are called on both sides, their shapes, and the configuration of the model folder."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_ppo.data.model_files import quoted, wrong
from mlx_ppo.importing.gguf_file import Array, GGUFFile, Kind, metadata_value

_ATTENTION = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
_OUTPUT = {"attn_output": "self_attn.o_proj"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's converter changes the models of one family."""

    model_class: str
    permuted: bool = False  # rows of q and k stand in the order of the rope that pairs neighbours
    norm_offset: bool = False  # norms are stored as weight + 1
    biased: bool = False  # q, k and v always have a bias
    head_norms: bool = False
    extra: dict[str, Any] = field(default_factory=dict)  # further keys of the config


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", permuted=True, extra={"hidden_act": "silu", "mlp_bias": False}),
    "qwen2": Architecture("Qwen2ForCausalLM", biased=True, extra={"hidden_act": "silu", "use_sliding_window": False}),
    "qwen3": Architecture("Qwen3ForCausalLM", head_norms=True, extra={"hidden_act": "silu", "attention_bias": False}),
    "gemma": Architecture(
        "GemmaForCausalLM",
        norm_offset=True,
        extra={"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    ),
}


@dataclass(frozen=True)
class Wanted:
    """One tensor of the model and where it comes from."""

    name: str  # in the model folder
    source: str  # in the GGUF file
    shape: tuple[int, ...]
    heads: int = 0  # rows are to be put back into this many heads' order; 0: they stay
    offset: bool = False  # 1 is to be taken off


@dataclass(frozen=True)
class Plan:
    """Everything that the header tells of the model."""

    config: dict[str, Any]
    tensors: tuple[Wanted, ...]


@dataclass(frozen=True)
class _Sizes:
    blocks: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int


def plan_model(file: GGUFFile) -> Plan:
    """Tensors by name and shape, and the configuration.

    Raises:
        ModelError: an unknown architecture; sizes that contradict each other; missing, extra or misshapen tensors.
    """
    name = metadata_value(file, "general.architecture", str)
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise wrong(file.path, f"the architecture {quoted(name)} can't be imported; {known} can")
    if file.metadata.get(f"{name}.expert_count"):
        raise wrong(file.path, "a mixture of experts, which can't be imported")
    architecture = ARCHITECTURES[name]
    sizes = _sizes(file, name)
    biased = "blk.0.attn_q.bias" in file.tensors
    tied = "output.weight" not in file.tensors or name == "gemma"  # whose mlx-lm and Hugging Face models always are
    wanted = tuple(_wanted(architecture, sizes, biased=biased or architecture.biased, tied=tied))
    _check_tensors(file, wanted)
    config = _config(file, name, architecture, sizes, tied=tied)
    if name == "llama":
        config["attention_bias"] = biased
    return Plan(config, wanted)


def _sizes(file: GGUFFile, name: str) -> _Sizes:
    def number(key: str, default: int | None = None) -> int:
        return int(metadata_value(file, f"{name}.{key}", int, default, test=lambda value: 0 < value < 1 << 31))

    hidden, heads = number("embedding_length"), number("attention.head_count")
    head = number("attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head) != head:
            raise wrong(file.path, f"{name}.{key} isn't the head's size {head}; such a model can't be imported")
    blocks = number("block_count")
    embedding = file.tensors.get("token_embd.weight")
    if (
        blocks > len(file.tensors)
        or embedding is None
        or len(embedding.shape) != 2
        or head % 2
        or (name == "qwen2" and head * heads != hidden)
    ):
        raise wrong(file.path, "its sizes and its tensors contradict each other; the file is damaged or forged")
    return _Sizes(
        blocks,
        hidden,
        number("feed_forward_length"),
        heads,
        number("attention.head_count_kv", heads),
        head,
        embedding.shape[0],
    )


def _wanted(architecture: Architecture, sizes: _Sizes, *, biased: bool, tied: bool) -> Iterator[Wanted]:
    queries, keys, hidden = sizes.heads * sizes.head, sizes.kv_heads * sizes.head, sizes.hidden
    rows = {"attn_q": queries, "attn_k": keys, "attn_v": keys, "attn_output": hidden}
    shapes = {part: (count, hidden) for part, count in rows.items()}
    shapes |= {"attn_output": (hidden, queries), "ffn_down": (hidden, sizes.inner)}
    shapes |= {"ffn_gate": (sizes.inner, hidden), "ffn_up": (sizes.inner, hidden)}
    offset = architecture.norm_offset
    yield Wanted("model.embed_tokens.weight", "token_embd.weight", (sizes.vocabulary, hidden))
    for block in range(sizes.blocks):
        for part, target in (_ATTENTION | _OUTPUT | _MLP).items():
            heads = {"attn_q": sizes.heads, "attn_k": sizes.kv_heads}.get(part, 0) if architecture.permuted else 0
            source, goal = f"blk.{block}.{part}", f"model.layers.{block}.{target}"
            yield Wanted(f"{goal}.weight", f"{source}.weight", shapes[part], heads)
            if biased and (part in _ATTENTION or (part in _OUTPUT and not architecture.biased)):
                yield Wanted(f"{goal}.bias", f"{source}.bias", (rows[part],), heads)
        norms = {part: (target, hidden) for part, target in _NORMS.items()}
        if architecture.head_norms:
            norms |= {part: (target, sizes.head) for part, target in _HEAD_NORMS.items()}
        for part, (target, length) in norms.items():
            goal = f"model.layers.{block}.{target}.weight"
            yield Wanted(goal, f"blk.{block}.{part}.weight", (length,), offset=offset)
    yield Wanted("model.norm.weight", "output_norm.weight", (hidden,), offset=offset)
    if not tied:
        yield Wanted("lm_head.weight", "output.weight", (sizes.vocabulary, hidden))


def _check_tensors(file: GGUFFile, wanted: tuple[Wanted, ...]) -> None:
    for tensor in wanted:
        stored = file.tensors.get(tensor.source)
        if stored is None:
            raise wrong(file.path, f"tensor {quoted(tensor.source)} is missing")
        if stored.shape != tensor.shape:
            shapes = f"the shape {list(stored.shape)}, not {list(tensor.shape)}"
            raise wrong(file.path, f"tensor {quoted(tensor.source)} has {shapes} as the metadata say")
    extra = sorted(set(file.tensors) - {tensor.source for tensor in wanted} - {_ROPE_FACTORS})
    if extra:
        count = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise wrong(file.path, f"tensor {quoted(extra[0])}{count} has no place in this architecture")


def _config(file: GGUFFile, name: str, architecture: Architecture, sizes: _Sizes, *, tied: bool) -> dict[str, Any]:
    def positive(key: str, default: float | None = None) -> float:
        return float(metadata_value(file, f"{name}.{key}", float, default, test=lambda v: 0 < v < math.inf))

    theta = _short(positive("rope.freq_base", 10000.0))
    config = {
        "architectures": [architecture.model_class],
        "model_type": name,
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.blocks,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head,
        "max_position_embeddings": metadata_value(file, f"{name}.context_length", int, 2048, test=lambda v: v > 0),
        "rms_norm_eps": _short(positive("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        **architecture.extra,
    }
    scaling = _rope_scaling(file, name, sizes.head, theta)
    return config if scaling is None else {**config, "rope_scaling": scaling}


def _short(value: float) -> float:
    """The shortest decimal number that float32 rounds to the same: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GGUFFile, name: str, head: int, theta: float) -> dict[str, Any] | None:
    kind = file.metadata.get(f"{name}.rope.scaling.type", "none")
    factor = file.metadata.get(f"{name}.rope.scaling.factor", file.metadata.get(f"{name}.rope.scale_linear", 1.0))
    if _ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, head, theta)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind != "linear" or type(factor) is not float or not 0 < factor < math.inf or name == "gemma":
        raise wrong(file.path, f"the rope scaling {quoted(kind)} of this architecture can't be imported")
    return {"type": "linear", "rope_type": "linear", "factor": factor}


def _llama3_scaling(file: GGUFFile, head: int, theta: float) -> dict[str, Any]:
    """The parameters of Llama 3.1's rope, which a GGUF file holds only as the factors [head / 2] they lead to.

    wavelength = 2 pi theta^(2i/head);  1 below original / high, the factor above original / low, smooth between
    """
    stored = file.tensors[_ROPE_FACTORS]
    if stored.kind is not Kind.F32 or stored.shape != (head // 2,):
        raise wrong(file.path, f"tensor {quoted(_ROPE_FACTORS)} isn't float32 of shape [{head // 2}]")
    found = file.rows(_ROPE_FACTORS, 0, 1).view("<f4")[0]
    factor = float(found.max())
    if not np.isfinite(found).all() or not np.allclose(found, _llama3_factors(head, theta, factor), rtol=1e-4):
        raise wrong(file.path, "its rope factors are none of Llama 3.1's; such a model can't be imported")
    if np.all(found == 1):
        return {"rope_type": "default"}
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _llama3_factors(head: int, theta: float, factor: float) -> Array:
    original, low, high = _LLAMA3["original_max_position_embeddings"], _LLAMA3["low_freq_factor"], 4.0
    wavelength = 2 * math.pi * theta ** (np.arange(0, head, 2) / head)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)
