"""What is in a file of data: the rows as a model will read them, and what is wrong among them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_ppo.data.examples import Example, example_tokens
from mlx_ppo.data.jsonl import Record
from mlx_ppo.data.known_layouts import Kind
from mlx_ppo.data.layouts import Found, find, line_of
from mlx_ppo.data.preferences import both_sides, margin_of, ranked_answers, rated_tokens, ratings_of
from mlx_ppo.data.prompts import asked
from mlx_ppo.data.sequences import prompt_tokens
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import DataError

_EOS = 2
_KINDS: tuple[Kind, ...] = ("pairs", "rated", "examples", "prompts")


class Characters:
    """A tokenizer where no model is given: each character is a token, a chat has a line for each message."""

    eos_ids = frozenset({_EOS})
    eos_id = _EOS
    vocab_size = 0x110000 + 3
    has_chat_template = True

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Characters as tokens from 3 on, after 1 as BOS."""
        return [1] * bos + [ord(character) + 3 for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """The characters, without BOS and EOS."""
        return "".join(chr(token - 3) for token in tokens if token > _EOS)

    def render_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        """`role: text` and a line's end for each message, after an answer EOS before it."""
        tokens = [1]
        for message in messages:
            tokens += self.encode(f"{message['role']}: {message['content']}", bos=False)
            tokens += [_EOS] * (message["role"] == "assistant") + self.encode("\n", bos=False)
        return tokens + self.encode("assistant: ", bos=False) * add_generation_prompt


@dataclass(frozen=True)
class Seen:
    """A row as the model reads it."""

    record: Record
    texts: tuple[tuple[int, ...], ...]  # tokens: one text, or chosen and rejected, or all answers
    start: int | None  # the first token on which the loss of `sft` counts; None for other kinds
    ratings: tuple[float, ...] = ()  # of the text, or of each answer


@dataclass(frozen=True)
class Inspected:
    """A file's rows; those that no command would take are in `found.bad`."""

    path: Path
    found: Found
    seen: list[Seen]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, of a pair the longer side's."""
        return [max(len(tokens) for tokens in one.texts) for one in self.seen]

    @property
    def duplicates(self) -> int:
        """Rows that are, token for token, an earlier one once more; different ratings of a text are no duplicates."""
        return len(self.seen) - len({(one.texts, one.ratings) for one in self.seen})

    @property
    def conflicts(self) -> int:
        """Pairs that are there the other way round as well, or texts with ratings that differ from row to row."""
        if self.found.kind == "pairs":
            pairs = {one.texts for one in self.seen}
            return sum(pair[0] < pair[1] and pair[::-1] in pairs for pair in pairs)
        said: dict[tuple[tuple[int, ...], ...], set[tuple[float, ...]]] = {}
        for one in self.seen:
            said.setdefault(one.texts, set()).add(one.ratings)
        return sum(len(ratings) > 1 for ratings in said.values())

    def shares(self, other: "Inspected") -> tuple[int, int]:
        """How many rows of `other` have a text of this file's, and how many ask what a row of this one asks."""
        texts = {text for one in self.seen for text in one.texts}
        asks = {_asks(one.record) for one in self.seen} - {None}
        return (
            sum(any(text in texts for text in one.texts) for one in other.seen),
            sum(_asks(one.record) in asks for one in other.seen),
        )


def inspect(path: Path, tokenizer: Tokenizer, kind: Kind | None = None, columns: Sequence[str] = ()) -> Inspected:
    """Read every row as the command for its kind does, and keep what is wrong with any.

    Raises:
        DataError: the file as a whole can't be read.
    """
    found = find(path, *((kind,) if kind else _KINDS), columns=columns)
    read = _READ[found.kind]
    seen, bad = [], list(found.bad)
    for record in found.records:
        try:
            seen.append(read(record, tokenizer))
        except DataError as error:
            bad.append(error)
    usable = replace(found, records=[one.record for one in seen], bad=sorted(bad, key=line_of))
    return Inspected(path, usable, seen)


def spread(lengths: Sequence[int]) -> tuple[int, int, int, int]:
    """Shortest, median, 95 % quantile and longest."""
    low, middle, high, top = np.quantile(lengths, (0, 0.5, 0.95, 1), method="higher").tolist()
    return int(low), int(middle), int(high), int(top)


def _example(record: Record, tokenizer: Tokenizer) -> Seen:
    tokens, loss_from = example_tokens(record, tokenizer)
    example = Example(tuple(tokens), loss_from, record.where)
    return Seen(record, (example.tokens,), example.start)


def _pair(record: Record, tokenizer: Tokenizer) -> Seen:
    margin_of(record)
    chosen, rejected = both_sides(record, tokenizer)
    return Seen(record, (tuple(chosen), tuple(rejected)), None)


def _rated(record: Record, tokenizer: Tokenizer) -> Seen:
    ratings = tuple(ratings_of(record))
    return Seen(record, (tuple(rated_tokens(record, tokenizer)[0]),), None, ratings)


def _ranking(record: Record, tokenizer: Tokenizer) -> Seen:
    answers = ranked_answers(record, tokenizer)
    return Seen(record, tuple(tuple(tokens) for tokens, _ in answers), None, tuple(value for _, value in answers))


def _prompt(record: Record, tokenizer: Tokenizer) -> Seen:
    return Seen(record, (tuple(prompt_tokens(asked(record), tokenizer, record.where)),), None)


_READ: dict[Kind, Callable[[Record, Tokenizer], Seen]] = {
    "pairs": _pair,
    "rated": _rated,
    "rankings": _ranking,
    "examples": _example,
    "prompts": _prompt,
}


def _asks(record: Record) -> str | None:
    """A row's prompt as a key, None for a text without one."""
    fields = record.fields
    if "prompt" in fields:
        return repr(fields["prompt"])
    messages = fields.get("messages")
    if not isinstance(messages, list):
        return None
    return repr(messages[:-1] if messages[-1].get("role") == "assistant" else messages)
