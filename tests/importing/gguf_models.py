"""Tiny random models: their Hugging Face weights, and the GGUF file that llama.cpp's converter would make of them."""

import json
from pathlib import Path

import gguf
import numpy as np

H, FF, HEADS, KV, HEAD, BLOCKS = 64, 96, 4, 2, 16, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HIDDEN = {"llama": False, "qwen2": False, "qwen3": False, "gemma": True}
PARTS = {
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD, H)),
    "attn_k": ("self_attn.k_proj", (KV * HEAD, H)),
    "attn_v": ("self_attn.v_proj", (KV * HEAD, H)),
    "attn_output": ("self_attn.o_proj", (H, HEADS * HEAD)),
    "ffn_gate": ("mlp.gate_proj", (FF, H)),
    "ffn_up": ("mlp.up_proj", (FF, H)),
    "ffn_down": ("mlp.down_proj", (H, FF)),
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


def bytes_as_text():
    """GPT-2's printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def byte_level(writer, pre="gpt-2", add_bos=None):
    letters = bytes_as_text()
    merges = ["t h", "th e", "Ġ the", "Ġ a", "i n"]
    tokens = [*SPECIALS, *(letters[byte] for byte in range(256)), *(merge.replace(" ", "") for merge in merges)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    return len(tokens)


def pieces(writer, model="llama", **flags):
    words = ["▁", *map(chr, range(97, 123)), "th", "the", "▁the", "▁t", "in", "▁a"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(words))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    return len(tokens)


def interleaved(weight, heads):
    """As llama.cpp's converter permutes q and k: the halves of each head, row by row in turn."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def random_weights(architecture, vocabulary, *, tied=True, seed=0):
    """Hugging Face names -> float32, and GGUF names -> the same as the converter stores them."""
    rng = np.random.default_rng(seed)
    ours, theirs = {}, {}

    def put(name, source, shape, mean=0.0, stored=lambda weight: weight):
        weight = (mean + rng.normal(size=shape) * 0.2).astype(np.float16).astype(np.float32)
        ours[name], theirs[source] = weight, stored(weight)

    offset = (lambda weight: weight + 1) if architecture == "gemma" else (lambda weight: weight)
    mean = 0.0 if architecture == "gemma" else 1.0
    put("model.embed_tokens.weight", "token_embd.weight", (vocabulary, H))
    for block in range(BLOCKS):
        for part, (target, shape) in PARTS.items():
            heads = {"attn_q": HEADS, "attn_k": KV}.get(part) if architecture == "llama" else None
            stored = (lambda weight, heads=heads: interleaved(weight, heads)) if heads else (lambda weight: weight)
            put(f"model.layers.{block}.{target}.weight", f"blk.{block}.{part}.weight", shape, stored=stored)
            if architecture == "qwen2" and part in ("attn_q", "attn_k", "attn_v"):
                put(f"model.layers.{block}.{target}.bias", f"blk.{block}.{part}.bias", shape[:1])
        for part, target in {**NORMS, **(HEAD_NORMS if architecture == "qwen3" else {})}.items():
            shape = (HEAD if part in HEAD_NORMS else H,)
            put(f"model.layers.{block}.{target}.weight", f"blk.{block}.{part}.weight", shape, mean, offset)
    put("model.norm.weight", "output_norm.weight", (H,), mean, offset)
    if not tied:
        put("lm_head.weight", "output.weight", (vocabulary, H))
    return ours, theirs


def write_model(path: Path, architecture="llama", *, kind="F32", tied=True, tokenizer=byte_level, change=None, **flags):
    """Write a whole GGUF file; returns its weights under Hugging Face's names, before quantisation."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(BLOCKS)
    writer.add_context_length(256)
    writer.add_embedding_length(H)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    if architecture in ("qwen3", "gemma"):
        writer.add_key_length(HEAD)
        writer.add_value_length(HEAD)
    vocabulary = tokenizer(writer, **flags)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    ours, theirs = random_weights(architecture, vocabulary, tied=tied)
    if change:
        change(writer, theirs)
    quantisation = gguf.GGMLQuantizationType[kind]
    for name, weight in theirs.items():
        if weight.ndim == 2 and kind != "F32":
            writer.add_tensor(name, gguf.quants.quantize(weight, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ours


def json_of(path):
    return json.loads(path.read_text("utf-8"))
