"""The tokenizer inside a GGUF file, as tokenizer.json and its companions."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlx_ppo.data.model_files import quoted, wrong
from mlx_ppo.errors import ModelError
from mlx_ppo.importing.gguf_file import GGUFFile, metadata_value

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # kinds of tokens; 1 is a normal one, 5 an unused one
_LONGEST_TOKEN = 1 << 12  # characters
_KEY = "tokenizer.ggml."
_NAMED = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Control tokens that end a turn whatever the metadata say, as llama.cpp holds them.
_END_TEXTS = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|return|>", "<|endoftext|>"}
    | {"<|end_of_text|>", "<EOT>", "_<EOT>"}
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> regular expressions, each of which splits what the ones before it left.
_SPLITS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}


@dataclass(frozen=True)
class Vocabulary:
    """What every kind of tokenizer has."""

    tokens: list[str]
    kinds: list[int]
    named: dict[str, int]  # bos, eos, unk, pad: those that there are
    ends: list[int]  # the tokens that end a turn, the written one first
    add_bos: bool
    add_eos: bool


def write_tokenizer(file: GGUFFile, folder: Path, rows: int) -> Vocabulary:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
        file: the GGUF file.
        folder: where to write.
        rows: tokens that the model has embeddings for.
    Raises:
        ModelError: no tokenizer, one of an unknown kind, or one that contradicts itself.
    """
    model = metadata_value(file, f"{_KEY}model", str)
    if model not in _BUILDERS:
        known = ", ".join(_BUILDERS)
        raise wrong(file.path, f"the tokenizer {quoted(model)} can't be imported; {known} can")
    vocabulary = _vocabulary(file, model, rows)
    try:
        tokenizer = _BUILDERS[model](file, vocabulary)
        tokenizer.add_tokens(list(_added(vocabulary)))
        tokenizer.post_processor = _post_processor(vocabulary, tokenizer.post_processor)
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
    except (ModelError, OSError):
        raise
    except Exception as error:  # of the class Exception itself, as tokenizers raises them
        raise wrong(file.path, f"its tokenizer can't be built ({error})") from None
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(file, vocabulary))
    ends = vocabulary.ends[0] if len(vocabulary.ends) == 1 else vocabulary.ends
    named = {f"{name}_token_id": token for name, token in vocabulary.named.items() if name in ("bos", "pad")}
    _write_json(folder / "generation_config.json", {**named, "eos_token_id": ends})
    return vocabulary


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _vocabulary(file: GGUFFile, model: str, rows: int) -> Vocabulary:
    tokens = _strings(file, "tokens")
    if not 0 < len(tokens) <= rows:
        raise wrong(file.path, f"{len(tokens)} tokens for {rows} embeddings; the file is damaged or forged")
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise wrong(file.path, f"the token {quoted(twice)} appears twice")
    longest = max(tokens, key=len)
    if len(longest) > _LONGEST_TOKEN:
        raise wrong(file.path, f"the token {quoted(longest)} has more than {_LONGEST_TOKEN} characters")
    kinds = _numbers(file, "token_type", len(tokens), "i")
    named = {name: _token_id(file, key, len(tokens)) for name, key in _NAMED.items()}
    ends = [_token_id(file, key, len(tokens)) for key in _ENDS]
    ends += [n for n, token in enumerate(tokens) if kinds[n] in (_CONTROL, _USER_DEFINED) and token in _END_TEXTS]
    spm_or_llama3 = model == "llama" or (model == "gpt2" and file.metadata.get(f"{_KEY}pre") == "llama-bpe")
    found = {name: token for name, token in named.items() if token is not None}
    return Vocabulary(
        tokens,
        [int(kind) for kind in kinds],
        found,
        list(dict.fromkeys(end for end in ends if end is not None)),
        add_bos=metadata_value(file, f"{_KEY}add_bos_token", bool, spm_or_llama3) and "bos" in found,
        add_eos=metadata_value(file, f"{_KEY}add_eos_token", bool, model == "t5") and "eos" in found,
    )


def _strings(file: GGUFFile, key: str) -> list[str]:
    found = file.metadata.get(_KEY + key)
    if not isinstance(found, list):
        raise wrong(file.path, f"the metadata {quoted(_KEY + key)} is missing, or no list of strings")
    return found


def _numbers(file: GGUFFile, key: str, count: int, sort: str) -> Sequence[Any]:
    found = file.metadata.get(_KEY + key)
    if found is None and sort == "i":
        return [1] * count
    if not isinstance(found, np.ndarray) or found.dtype.kind not in (sort, "u") or len(found) != count:
        raise wrong(file.path, f"the metadata {quoted(_KEY + key)} isn't a list of {count} numbers")
    if sort == "f" and not np.isfinite(found).all():
        raise wrong(file.path, f"the metadata {quoted(_KEY + key)} holds NaN or infinity")
    return list(found.tolist())


def _token_id(file: GGUFFile, key: str, count: int) -> int | None:
    if _KEY + key not in file.metadata:
        return None
    return int(metadata_value(file, _KEY + key, int, test=lambda token: 0 <= token < count))


def _added(vocabulary: Vocabulary) -> Iterator[AddedToken]:
    special = {_CONTROL, _UNKNOWN}
    named = {*vocabulary.named.values(), *vocabulary.ends}
    for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        if kind in special or kind == _USER_DEFINED or number in named:
            # A space is written as in the pieces, so it has to be looked for after the normaliser.
            normalised = kind == _USER_DEFINED and "▁" in token
            yield AddedToken(token, special=kind != _USER_DEFINED or number in named, normalized=normalised)


def _post_processor(vocabulary: Vocabulary, plain: Any) -> Any:
    before = vocabulary.tokens[vocabulary.named["bos"]] if vocabulary.add_bos else None
    after = vocabulary.tokens[vocabulary.named["eos"]] if vocabulary.add_eos else None
    used = [token for token in (before, after) if token is not None]
    if not used:
        return plain
    ids = [(token, vocabulary.tokens.index(token)) for token in dict.fromkeys(used)]
    single, pair = ([*([before] if before else []), sequence, *([after] if after else [])] for sequence in ("$A", "$B"))
    return processors.TemplateProcessing(
        single=single, pair=[*single, *(f"{part}:1" for part in pair)], special_tokens=ids
    )


def _tokenizer_config(file: GGUFFile, vocabulary: Vocabulary) -> dict[str, Any]:
    names = {f"{name}_token": vocabulary.tokens[token] for name, token in vocabulary.named.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **names,
    }
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = metadata_value(file, "tokenizer.chat_template", str)
    return config


def _byte_level(file: GGUFFile, vocabulary: Vocabulary) -> Tokenizer:
    """GPT-2's kind: merges of bytes that are written as printable characters."""
    pre = metadata_value(file, f"{_KEY}pre", str, "default")
    if pre not in _SPLITS:
        known = ", ".join(_SPLITS)
        raise wrong(file.path, f"the pre-tokenizer {quoted(pre)} can't be imported; {known} can")
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    merges = []
    for merge in _strings(file, "merges"):
        left, found, right = merge.partition(" ")
        if not found or not {left, right, left + right} <= ids.keys():
            raise wrong(file.path, f"the merge {quoted(merge)} isn't one of two tokens into a third")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS[pre]]
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pieces(file: GGUFFile, vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's BPE: the best score merges first."""
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    scores = _numbers(file, "scores", len(ids), "f")
    plain = {number for number, kind in enumerate(vocabulary.kinds) if kind in (1, _USER_DEFINED, 5)}
    merges = []
    for piece, number in ids.items():
        if number in plain:
            splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
            merges += [
                (-scores[number], number, -len(left), left, right)
                for left, right in splits
                if ids.get(left, -1) in plain and ids.get(right, -1) in plain
            ]
    merges.sort()
    unknown = vocabulary.named.get("unk")
    model = models.BPE(
        vocab=ids,
        merges=[(left, right) for *_, left, right in merges],
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=_BYTE in vocabulary.kinds,
    )
    return _spaced(file, Tokenizer(model))


def _unigram(file: GGUFFile, vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's unigram model: the best sum of scores."""
    charsmap = file.metadata.get(f"{_KEY}precompiled_charsmap")
    if charsmap is not None and len(charsmap):
        raise wrong(file.path, "its tokenizer rewrites characters (precompiled_charsmap), which can't be imported")
    scores = _numbers(file, "scores", len(vocabulary.tokens), "f")
    unknown = vocabulary.named.get("unk")
    pairs = list(zip(vocabulary.tokens, scores, strict=True))
    return _spaced(file, Tokenizer(models.Unigram(pairs, unknown, _BYTE in vocabulary.kinds)))


def _spaced(file: GGUFFile, tokenizer: Tokenizer) -> Tokenizer:
    """Spaces as ▁, one more before a text where the model wants it; bytes back into characters when decoding."""
    prefix = metadata_value(file, f"{_KEY}add_space_prefix", bool, True)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    if metadata_value(file, f"{_KEY}remove_extra_whitespaces", bool, False):
        steps = [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " "), *steps]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


_BUILDERS = {"gpt2": _byte_level, "llama": _pieces, "t5": _unigram}
