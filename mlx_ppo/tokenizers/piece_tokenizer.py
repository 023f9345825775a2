"""The tokenizer of a folder that has only SentencePiece's `tokenizer.model`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from mlx_ppo.data.model_files import quoted, wrong
from mlx_ppo.errors import ModelError
from mlx_ppo.tokenizers.chat_template import ChatTemplate, folder_template, optional_object
from mlx_ppo.tokenizers.piece_model import PieceModel, read_piece_model, without_prefix

_MOST_TOKENS = 1 << 24
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_FOUND = (2, 3)  # types of pieces: unknown, control


@dataclass(frozen=True)
class Added:
    """A token that is found in a text before the text is cut into pieces."""

    index: int
    text: str
    special: bool  # left out when tokens become text
    left: bool = False  # it swallows the spaces before it
    right: bool = False  # and those after it


class PieceTokenizer:
    """`mlx_ppo.data.tokenizer.Tokenizer` over a folder's `tokenizer.model`, read by SentencePiece itself.

    transformers 5 reads such a file without its BOS and its leading space. Control tokens, and what
    tokenizer_config.json and added_tokens.json add, are found in a text as transformers finds them; a `legacy`
    tokenizer, which is the rule, puts a space before the text after each of them.
    """

    def __init__(self, path: Path, eos_ids: frozenset[int]) -> None:
        """Read the files.

        Raises:
            ModelError: one isn't what it should be, or there is no end-of-sequence token.
        """
        file = path / "tokenizer.model"
        try:
            self._pieces = SentencePieceProcessor(model_file=str(file))
            content = self._pieces.serialized_model_proto()
            self.model: PieceModel = read_piece_model(content)
            self._bare = SentencePieceProcessor(model_proto=without_prefix(content))
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"{file}: not a SentencePiece model ({error})") from None
        settings = optional_object(path / "tokenizer_config.json")
        texts = _named(path, {**optional_object(path / "special_tokens_map.json"), **settings})
        self.added: dict[int, Added] = _added(path, settings, self.model, frozenset(texts.values()))
        self._by_text = {added.text: added for added in self.added.values()}
        self._pattern = re.compile("|".join(_pattern(added) for added in _longest_first(self._by_text.values())))
        self._each_part = settings.get("legacy") in (None, True)
        self.adds_space = self.model.adds_space and settings.get("add_prefix_space") is not False
        own = {"bos": self._pieces.bos_id(), "eos": self._pieces.eos_id(), "unk": self._pieces.unk_id()}
        ids = {name.removesuffix("_token"): self._id(text) for name, text in texts.items()}
        self._named = {name: index for name, index in {**own, **ids}.items() if index >= 0}
        self._bos = self._named.get("bos", -1) if settings.get("add_bos_token", True) else -1
        eos = self._named.get("eos")
        self.eos_ids = eos_ids | ({eos} if eos is not None else set())
        if not self.eos_ids:
            raise ModelError(f"{path}: no end-of-sequence token; set eos_token_id in config.json")
        self.eos_id: int = eos if eos is not None else min(self.eos_ids)
        self.vocab_size: int = max(self._pieces.vocab_size(), *(index + 1 for index in self.added), 0)
        source = folder_template(path, settings)
        shown = {f"{name}_token": self.piece(index) for name, index in self._named.items()}
        self.template = None if source is None else ChatTemplate(path, source, {**shown, "enable_thinking": False})

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder has one."""
        return self.template is not None

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of "bos", "unk" and "pad", those that there are."""
        return {name: self._named[name] for name in ("bos", "unk", "pad") if name in self._named}

    def piece(self, index: int) -> str:
        """How a token is written in the vocabulary."""
        return self.added[index].text if index in self.added else str(self._pieces.id_to_piece(index))

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Token ids, with BOS first where it is asked for and the model has one."""
        tokens = [self._bos] if bos and self._bos >= 0 else []
        for index, part in enumerate(self._parts(text)):
            if isinstance(part, Added):
                tokens.append(part.index)
            else:
                spaced = self.adds_space and (index == 0 or self._each_part)
                tokens += (self._pieces if spaced else self._bare).encode(part)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, control tokens left out."""
        runs: list[str | list[int]] = [[]]
        for token in map(int, tokens):
            added = self.added.get(token)
            if added is not None and not added.special:
                runs += [added.text, []]
            elif added is None and token < self._pieces.vocab_size():
                run = runs[-1]
                assert isinstance(run, list)
                run.append(token)
        whole = [run if isinstance(run, str) else self._bare.decode(run) for run in runs]
        first = runs[0]
        assert isinstance(first, list)
        return "".join([(self._pieces if self.adds_space else self._bare).decode(first), *whole[1:]])

    def chat_text(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """A conversation in the model's own chat template."""
        if self.template is None:
            raise ModelError("this model has no chat template; use plain text prompts")
        return self.template.render(messages, add_generation_prompt=add_generation_prompt)

    def render_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        """Token ids of the same; the template writes BOS where it wants it."""
        return self.encode(self.chat_text(messages, add_generation_prompt=add_generation_prompt), bos=False)

    def _parts(self, text: str) -> Iterator[str | Added]:
        """The text between added tokens, and these."""
        position = 0
        for match in self._pattern.finditer(text):
            if match.start() > position:
                yield text[position : match.start()]
            found = match.group()
            yield self._by_text[found if found in self._by_text else found.strip()]
            position = match.end()
        if position < len(text):
            yield text[position:]

    def _id(self, text: str) -> int:
        if text in self._by_text:
            return self._by_text[text].index
        index = int(self._pieces.piece_to_id(text))
        known = 0 <= index < self._pieces.vocab_size()  # the unknown piece's, which there may be none of, for others
        return index if known and self._pieces.id_to_piece(index) == text else -1


def _named(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts of special tokens by their names in the settings."""
    found = {}
    for name in _NAMES:
        given = settings.get(name)
        text = given.get("content") if isinstance(given, dict) else given
        if text is not None and not (isinstance(text, str) and text):
            raise wrong(path, f"'{name}' must be a text, not {quoted(given)}")
        if text is not None:
            found[name] = text
    return found


def _added(path: Path, settings: Mapping[str, Any], model: PieceModel, named: frozenset[str]) -> dict[int, Added]:
    """The unknown and control pieces, then what added_tokens.json, then what tokenizer_config.json says."""
    pieces = enumerate(model.pieces)
    found = {index: Added(index, text, True) for index, (text, _, kind) in pieces if kind in _FOUND and text}
    others = settings.get("additional_special_tokens")
    listed = {text for text in others if isinstance(text, str)} if isinstance(others, list) else set()
    for text, index in optional_object(path / "added_tokens.json").items():
        _check(path, "added_tokens.json", index, text)
        found[index] = Added(index, text, text in named or text in listed)
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise wrong(path, "'added_tokens_decoder' in tokenizer_config.json must be an object")
    for key, row in decoder.items():
        index, given = int(key) if key.isdecimal() and len(key) < 10 else -1, row if isinstance(row, dict) else {}
        content = given.get("content")
        _check(path, "tokenizer_config.json", index, content)
        flags = (given.get(flag) is True for flag in ("special", "lstrip", "rstrip"))
        found[index] = Added(index, str(content), *flags)
    return found


def _check(path: Path, file: str, index: Any, text: Any) -> None:
    if type(index) is not int or not 0 <= index < _MOST_TOKENS or not isinstance(text, str) or not text:
        raise wrong(path / file, f"the added token {quoted(text)} with the id {quoted(index)} is malformed")


def _longest_first(added: Any) -> list[Added]:
    return sorted(added, key=lambda one: -len(one.text))


def _pattern(added: Added) -> str:
    return (r"\s*" if added.left else "") + re.escape(added.text) + (r"\s*" if added.right else "")
