"""A tokenizer as the metadata from which llama.cpp builds its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ModelError
from mlx_ppo.networks.tokenizer import FolderTokenizer

Fields = dict[str, Any]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # how llama.cpp and some folders spell (?i:
_PENALTY = 10.0  # of an unknown character below the lowest score, as in SentencePiece
_UNSCORED = -1e4  # of a piece that no merge makes: below every merge


def backend(path: Path, tokenizer: Tokenizer) -> Any:
    """The Hugging Face tokenizer behind the project's.

    Raises:
        ModelError: it has no description as a tokenizer.json.
    """
    found = tokenizer._hf if isinstance(tokenizer, FolderTokenizer) else None
    if not hasattr(found, "backend_tokenizer"):
        raise ModelError(f"{path}: this kind of tokenizer can't be written as GGUF; use --format fused")
    return found


def vocabulary(path: Path, tokenizer: Tokenizer, rows: int) -> Fields:
    """Metadata of a tokenizer: tokens, types, merges or scores, special ids, chat template.

    Args:
        path: the model's folder, for messages.
        tokenizer: as loaded from it.
        rows: of the model's embedding; ids without a token get one that is never used.
    Raises:
        ModelError: llama.cpp has no tokenizer that would cut texts the same way.
    """
    hf = backend(path, tokenizer)
    document = json.loads(hf.backend_tokenizer.to_str())
    model = document["model"]
    tokens, types = _tokens(hf, document, rows)
    fields: Fields = {"tokenizer.ggml.tokens": tokens}
    if model["type"] == "BPE" and not model["merges"]:
        raise ModelError(f"{path}: the tokenizer has no merges, which GGUF needs; use --format fused")
    if model["type"] == "BPE" and not model.get("byte_fallback"):
        fields |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre_tokenizer(path, document),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)],
        }
    elif model["type"] in ("BPE", "Unigram") and set(tokens) >= _BYTES:
        types = [BYTE if token in _BYTES else kind for token, kind in zip(tokens, types, strict=True)]
        scores = _scores(model, tokens)
        if model["type"] == "Unigram":
            _spell_ascii(tokens, types, scores)
        fields |= {
            "tokenizer.ggml.model": "t5" if model["type"] == "Unigram" else "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": _prefixed(path, document),
        }
    else:
        raise ModelError(f"{path}: a {model['type']} tokenizer without bytes isn't written as GGUF; use --format fused")
    fields["tokenizer.ggml.token_type"] = types
    return fields | _special(hf, tokenizer)


def _tokens(hf: Any, document: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Every id's token and type."""
    by_id = {int(index): str(token) for token, index in hf.get_vocab().items()}
    types = dict.fromkeys(by_id, NORMAL)
    for added in document["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    model = document["model"]
    unknown = model.get("unk_id") if model["type"] == "Unigram" else hf.get_vocab().get(model.get("unk_token"))
    if unknown is not None:
        types[unknown] = UNKNOWN
    return (
        [by_id.get(index, f"[PAD{index}]") for index in range(rows)],
        [types.get(index, UNUSED) for index in range(rows)],
    )


def _merges(model: Mapping[str, Any]) -> list[list[str]]:
    return [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model["merges"]]


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """Scores by which llama.cpp joins pieces: a Unigram's own, or minus the number of a BPE's first merge."""
    if model["type"] == "Unigram":
        own = {token: float(score) for token, score in model["vocab"]}
    else:
        own = {}
        for number, (left, right) in enumerate(_merges(model)):
            own.setdefault(left + right, -float(number))
    return [own.get(token, _UNSCORED) for token in tokens]


def _spell_ascii(tokens: list[str], types: list[int], scores: list[float]) -> None:
    """Turn bytes that are a character without a piece of its own into that piece.

    llama.cpp's Unigram tokenizer ("t5") finds the most probable pieces, as it should, but has no bytes to fall back
    to: what no piece spells is unknown to it. (Its "llama" tokenizer has, but joins the best pair again and again,
    which gives other pieces.) Characters beyond ASCII are several bytes, and stay unknown.
    """
    lowest = min(score for score, kind in zip(scores, types, strict=True) if kind == NORMAL) - _PENALTY
    for index, token in enumerate(tokens):
        character = chr(int(token[1:-1], 16)) if types[index] == BYTE else ""
        if character.isascii() and character not in {"", "\0", " ", *tokens}:
            tokens[index], types[index], scores[index] = character, NORMAL, lowest


def _prefixed(path: Path, document: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text.

    Raises:
        ModelError: something else is done to it than marking spaces, which llama.cpp would leave out.
    """
    parts = _parts(document.get("normalizer"), "normalizers") + _parts(document.get("pre_tokenizer"), "pretokenizers")
    for part in parts:
        marks = part["type"] == "Replace" and part["content"] == "▁"
        if not marks and part["type"] not in ("Prepend", "Metaspace"):
            raise ModelError(f"{path}: the tokenizer's {part['type']} can't be said in GGUF; use --format fused")
    return any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )


def _parts(section: Any, name: str) -> list[dict[str, Any]]:
    if section is None:
        return []
    return list(section[name]) if section["type"] == "Sequence" else [section]


def _pre_tokenizer(path: Path, document: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way in which a text is cut before byte pairs are merged.

    Raises:
        ModelError: none of those known here.
    """
    unknown = ModelError(f"{path}: the tokenizer cuts texts in a way that isn't known for GGUF; use --format fused")
    parts = _parts(document.get("pre_tokenizer"), "pretokenizers")
    normalizers = {part["type"] for part in _parts(document.get("normalizer"), "normalizers")}
    whole = bool(document["model"].get("ignore_merges"))
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1].get("add_prefix_space") or normalizers - {"NFC"}:
        raise unknown
    own_regex = parts[-1].get("use_regex", True)
    match parts[:-1]:
        case []:
            name = "gpt-2" if own_regex else ""
        case [{"type": "Digits", "individual_digits": True}]:
            name = "smollm" if own_regex else ""
        case [{"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}]:
            spelt = regex.replace(_CONTRACTIONS, "(?i:'s|'t|'re|'ve|'m|'ll|'d)")
            names = {_WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe" if whole else "smaug-bpe"}
            name = "" if own_regex else names.get(spelt, "")
        case _:
            name = ""
    if not name or whole != (name == "llama-bpe"):
        raise unknown
    return name


def _special(hf: Any, tokenizer: Tokenizer) -> Fields:
    """Ids of special tokens, what is put around a text, and the chat template."""
    fields: Fields = {"tokenizer.ggml.eos_token_id": tokenizer.eos_id, "tokenizer.ggml.add_eos_token": False}
    if hf.bos_token_id is not None:
        fields["tokenizer.ggml.bos_token_id"] = int(hf.bos_token_id)
    # llama.cpp puts nothing else than its BOS before a text
    fields["tokenizer.ggml.add_bos_token"] = tokenizer.encode("a", bos=True)[:1] == [hf.bos_token_id]
    for name, index in (("unknown", hf.unk_token_id), ("padding", hf.pad_token_id)):
        if index is not None:
            fields[f"tokenizer.ggml.{name}_token_id"] = int(index)
    others = sorted(tokenizer.eos_ids - {tokenizer.eos_id})
    if others:
        fields["tokenizer.ggml.eot_token_id"] = others[0]
    if isinstance(hf.chat_template, str) and hf.chat_template:
        fields["tokenizer.chat_template"] = hf.chat_template
    return fields
