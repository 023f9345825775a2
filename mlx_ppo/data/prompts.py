"""Prompts for PPO and evaluation, and the order in which training takes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_ppo.data.chat import Messages, conversation
from mlx_ppo.data.jsonl import Record, one_field
from mlx_ppo.data.layouts import records_as
from mlx_ppo.data.random import philox
from mlx_ppo.data.sequences import LengthLimit, Overlong, prompt_field, prompt_tokens
from mlx_ppo.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """What the policy is asked to continue."""

    tokens: tuple[int, ...]  # with BOS, or the rendered chat with its generation prompt
    text: str  # as the file has it, a chat with a line for each message; decoded from the tokens where truncated
    record: dict[str, Any]  # the whole line, for reward functions
    where: str


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a file, and how many were too long."""

    prompts: tuple[Prompt, ...]
    dropped: int
    truncated: int
    said: str | None = None  # how the file was read, where that isn't plain


def load_prompts(
    path: Path, tokenizer: Tokenizer, *, max_tokens: int, overlong: Overlong, columns: Sequence[str] = ()
) -> PromptSet:
    """Prompts from lines with "prompt" (a string or messages) or, where that is missing, "messages".

    A truncated prompt keeps its first token (BOS) and its last `max_tokens` - 1.

    Raises:
        DataError: a line is wrong, or every prompt was dropped.
    """
    limit = LengthLimit(max_tokens, overlong, key="data.max_prompt_tokens")
    prompts = []
    records, said = records_as(path, "prompts", columns=columns)
    for record in records:
        prompt = asked(record)
        tokens = prompt_tokens(prompt, tokenizer, record.where)
        if not limit.admits(len(tokens), record.where):
            continue
        kept = limit.keep_end(tokens)
        text = _shown(prompt) if len(kept) == len(tokens) else tokenizer.decode(kept)
        prompts.append(Prompt(kept, text, record.fields, record.where))
    limit.require_some(prompts, path)
    return PromptSet(tuple(prompts), limit.dropped, limit.truncated, said)


def _shown(prompt: str | Messages) -> str:
    """A prompt as a person reads it, up to where the completion follows."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{message['role']}: {message['content']}\n" for message in prompt) + "assistant: "


def asked(record: Record) -> str | Messages:
    """What a line asks: its "prompt" or, where that is missing, its "messages".

    Raises:
        DataError: it has neither, or they are wrong.
    """
    if "prompt" not in record.fields and one_field(record, "prompt", "messages") == "messages":
        return conversation(record, "messages", last="user")
    return prompt_field(record, "prompt")


def shared_prompts(a: Sequence[Prompt], b: Sequence[Prompt]) -> int:
    """How many prompts of `b` have the same tokens as one of `a`."""
    known = {prompt.tokens for prompt in a}
    return sum(prompt.tokens in known for prompt in b)


class PromptStream:
    """An endless shuffled sequence of prompts, epoch after epoch; a position in it is one integer."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Shuffle by `seed`; ValueError when there are no prompts."""
        if not prompts:
            raise ValueError("a stream needs at least one prompt")
        self._prompts = tuple(prompts)
        self._seed = seed

    def take(self, cursor: int, count: int) -> list[tuple[int, Prompt]]:
        """`count` prompts with their indices, from position `cursor` on.

        Args:
            cursor: how many prompts were ever taken before.
            count: how many to take; they may run into the next epochs.
        """
        size = len(self._prompts)
        epochs = range(cursor // size, (cursor + count - 1) // size + 1)
        orders = [philox("prompt order", self._seed, epoch).permutation(size) for epoch in epochs]
        order = np.concatenate(orders)[cursor % size :][:count] if orders else np.empty(0, int)
        return [(index, self._prompts[index]) for index in order.tolist()]
