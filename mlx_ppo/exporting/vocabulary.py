"""A tokenizer as the metadata from which llama.cpp builds its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ModelError
from mlx_ppo.tokenizers.load import FolderTokenizer
from mlx_ppo.tokenizers.piece_tokenizer import PieceTokenizer

Fields = dict[str, Any]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # how llama.cpp and some folders spell (?i:
_PENALTY = 10.0  # of an unknown character below the lowest score, as in SentencePiece
_UNSCORED = -1e4  # of a piece that no merge makes: below every merge


def vocabulary(path: Path, tokenizer: Tokenizer, rows: int) -> Fields:
    """Metadata of a tokenizer: tokens, types, merges or scores, special ids, chat template.

    Args:
        path: the model's folder, for messages.
        tokenizer: as loaded from it.
        rows: of the model's embedding; ids without a token get one that is never used.
    Raises:
        ModelError: llama.cpp has no tokenizer that would cut texts the same way.
    """
    if isinstance(tokenizer, PieceTokenizer):
        return _pieces(path, tokenizer, rows) | _special(tokenizer)
    if not isinstance(tokenizer, FolderTokenizer) or not hasattr(tokenizer.hf, "backend_tokenizer"):
        raise ModelError(f"{path}: this kind of tokenizer can't be written as GGUF; use --format fused")
    hf = tokenizer.hf
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
    return fields | _special(tokenizer)


def _pieces(path: Path, tokenizer: PieceTokenizer, rows: int) -> Fields:
    """Tokens, types and scores of a SentencePiece model and of what is added to it.

    Raises:
        ModelError: it isn't of the two kinds that llama.cpp has, or changes texts more than it can say.
    """
    model = tokenizer.model
    if model.kind == "other" or model.normalises:
        what = "kind of SentencePiece model" if model.kind == "other" else "normalisation of tokenizer.model"
        raise ModelError(f"{path}: this {what} can't be said in GGUF; use --format fused")
    tokens = [text for text, _, _ in model.pieces] + [f"[PAD{index}]" for index in range(len(model.pieces), rows)]
    types = [kind for _, _, kind in model.pieces] + [UNUSED] * (rows - len(model.pieces))
    scores = [score for _, score, _ in model.pieces] + [_UNSCORED] * (rows - len(model.pieces))
    if not set(tokens) >= _BYTES:
        raise ModelError(f"{path}: a tokenizer.model without bytes isn't written as GGUF; use --format fused")
    for index, added in tokenizer.added.items():
        if types[index] != UNKNOWN:
            tokens[index], types[index] = added.text, CONTROL if added.special else USER_DEFINED
    if model.kind == "unigram":
        _spell_ascii(tokens, types, scores)
    return {
        "tokenizer.ggml.model": "t5" if model.kind == "unigram" else "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": tokenizer.adds_space,
    }


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


def _special(tokenizer: FolderTokenizer | PieceTokenizer) -> Fields:
    """Ids of special tokens, what is put around a text, and the chat template."""
    fields: Fields = {"tokenizer.ggml.eos_token_id": tokenizer.eos_id, "tokenizer.ggml.add_eos_token": False}
    ids = tokenizer.special_ids
    for name, full in (("bos", "bos"), ("unk", "unknown"), ("pad", "padding")):
        if name in ids:
            fields[f"tokenizer.ggml.{full}_token_id"] = ids[name]
    # llama.cpp puts nothing else than its BOS before a text
    fields["tokenizer.ggml.add_bos_token"] = tokenizer.encode("a", bos=True)[:1] == [ids.get("bos")]
    others = sorted(tokenizer.eos_ids - {tokenizer.eos_id})
    if others:
        fields["tokenizer.ggml.eot_token_id"] = others[0]
    if tokenizer.template is not None and tokenizer.template.source:
        fields["tokenizer.chat_template"] = tokenizer.template.source
    return fields
