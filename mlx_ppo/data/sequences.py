"""Token sequences of plain texts, prompts and answered prompts, and what happens to those that are too long."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from mlx_ppo.data.chat import Messages, conversation
from mlx_ppo.data.jsonl import Record, kind, one_field, text_field
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import DataError, ModelError

Overlong = Literal["drop", "truncate", "error"]
_JOINED = 8  # tokens at a prompt's end that an answer may change


@dataclass
class LengthLimit:
    """Decides about samples longer than `max_tokens`, and counts them."""

    max_tokens: int
    overlong: Overlong
    dropped: int = 0
    truncated: int = 0
    key: str = "data.max_tokens"  # of the configuration, for messages

    def __post_init__(self) -> None:
        """Refuse a limit under which nothing but BOS would be left."""
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, not {self.max_tokens}")

    def admits(self, length: int, where: str, *, useless_when_cut: bool = False) -> bool:
        """False when the sample is to be left out; a longer one that is admitted must be cut by the caller.

        Raises:
            DataError: it is too long and `overlong` is "error".
        """
        if length <= self.max_tokens:
            return True
        if self.overlong == "error":
            raise DataError(
                f"{where}: {length} tokens, more than {self.key} = {self.max_tokens}; "
                f"shorten the text, raise {self.key}, or set data.overlong to 'drop' or 'truncate'"
            )
        if self.overlong == "drop" or useless_when_cut:
            self.dropped += 1
            return False
        self.truncated += 1
        return True

    def keep_end(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The first token (BOS) and the last `max_tokens` - 1."""
        if len(tokens) <= self.max_tokens:
            return tuple(tokens)
        return (tokens[0], *tokens[1 - self.max_tokens :])

    def require_some(self, kept: Sequence[object], path: Path) -> None:
        """DataError when every record of the file was dropped."""
        if not kept:
            raise DataError(
                f"{path}: every record ({self.dropped}) is longer than {self.key} = {self.max_tokens} and was dropped; "
                f"shorten them, raise {self.key} of the configuration, or set data.overlong to 'truncate'"
            )


def cut_said(path: Path, dropped: int, truncated: int, what: str = "overlong") -> str | None:
    """A line about texts that were too long, None where none was."""
    return f"{path.name}: {dropped} {what} dropped, {truncated} truncated" if dropped or truncated else None


def text_tokens(text: str, tokenizer: Tokenizer, where: str) -> list[int]:
    """BOS and the tokens of a plain text."""
    tokens = tokenizer.encode(text, bos=True)
    if not tokens:
        raise DataError(f"{where}: the tokenizer finds no tokens in this text; change or remove the line")
    return tokens


def prompt_field(record: Record, name: str) -> str | Messages:
    """A prompt: plain text, or messages of which the last is the user's."""
    if isinstance(record.fields[one_field(record, name)], list):
        return conversation(record, name, last="user")
    return text_field(record, name)


def answer_field(record: Record, name: str, prompt: str | Messages, *, allow_empty: bool) -> str:
    """The answer's text: a string or, after a prompt of messages, a list with one assistant message."""
    value = record.fields[one_field(record, name)]
    if isinstance(value, list):
        if isinstance(prompt, str):
            raise DataError(f"{record.where}: '{name}' is a list, so 'prompt' must be a list of messages as well")
        match value:
            case [{"role": "assistant", "content": content}]:
                # as a record of its own, so that the string is checked like any other
                return text_field(Record(record.path, record.line, {name: content}), name, allow_empty=allow_empty)
        raise DataError(f"{record.where}: '{name}' must be a string or a list of one assistant message, {_seen(value)}")
    return text_field(record, name, allow_empty=allow_empty)


def prompt_tokens(prompt: str | Messages, tokenizer: Tokenizer, where: str) -> list[int]:
    """What the model reads before it answers: BOS and text, or the chat template up to where the answer begins."""
    if isinstance(prompt, str):
        return text_tokens(prompt, tokenizer, where)
    return _rendered(prompt, tokenizer, where, add_generation_prompt=True)


def answered_tokens(
    prompt: str | Messages, prefix: Sequence[int], answer: str, tokenizer: Tokenizer, where: str
) -> tuple[list[int], int]:
    """Prompt, answer and EOS, and the index at which the answer starts.

    Prompt and answer are tokenised as one text, because SentencePiece puts a space before each text of its own and
    because the prompt's last characters may join the answer's first in one token; the answer then starts where the
    tokens first differ from the prompt's. A conversation ends with the answer's EOS: what the template writes after it
    is cut off, since generation stops there too.

    Args:
        prompt: text or messages.
        prefix: `prompt_tokens` of the prompt.
        answer: the text that follows, maybe empty.
        tokenizer: the model's.
        where: place for errors.

    Raises:
        DataError: the chat template writes the prompt differently once an answer follows.
    """
    if isinstance(prompt, str):
        tokens = text_tokens(prompt + answer, tokenizer, where)
        return [*tokens, tokenizer.eos_id], _common_prefix(prefix, tokens)
    messages = [*prompt, {"role": "assistant", "content": answer}]
    tokens = _rendered(messages, tokenizer, where, add_generation_prompt=False)
    start = _common_prefix(prefix, tokens)
    if start < len(prefix) and not _begins_with(tokens, prefix, start, tokenizer):
        raise DataError(
            f"{where}: the chat template writes the prompt differently once an answer follows, so the answer's tokens "
            "can't be told apart; use plain text fields, or a template that only appends"
        )
    ends = [index for index in range(start, len(tokens)) if tokens[index] in tokenizer.eos_ids]
    return (tokens[: ends[-1] + 1] if ends else [*tokens, tokenizer.eos_id]), start


def _rendered(messages: Messages, tokenizer: Tokenizer, where: str, *, add_generation_prompt: bool) -> list[int]:
    if not tokenizer.has_chat_template:
        raise DataError(f"{where}: messages need a chat template, which this model lacks; use plain text fields")
    try:
        return tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
    except ModelError as error:
        raise DataError(f"{where}: {error}") from error


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _begins_with(tokens: Sequence[int], prefix: Sequence[int], start: int, tokenizer: Tokenizer) -> bool:
    """Whether the tokens' text begins with the prefix's, whose last tokens, from `start` on, joined what follows.

    Special tokens have no text: one that is no longer there didn't join anything.
    """
    texts = [tokenizer.decode(prefix[:end]) for end in range(start, len(prefix) + 1)]
    plain = all(before != after for before, after in pairwise(texts))
    return plain and len(prefix) - start <= _JOINED and tokenizer.decode(tokens).startswith(texts[-1])


def _seen(value: list[object]) -> str:
    if len(value) != 1:
        return f"not {len(value)} messages; put the earlier ones into 'prompt'"
    role = value[0].get("role") if isinstance(value[0], dict) else None
    seen = f"role {role[:40]!r}" if isinstance(role, str) else kind(value[0])
    return f"not one with {seen}; write [{{'role': 'assistant', 'content': …}}]"
