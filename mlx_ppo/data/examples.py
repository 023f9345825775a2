"""Examples for supervised fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_ppo.data.chat import Messages, conversation
from mlx_ppo.data.jsonl import Record, one_field, text_field
from mlx_ppo.data.layouts import records_as
from mlx_ppo.data.sequences import (
    LengthLimit,
    Overlong,
    answer_field,
    answered_tokens,
    prompt_field,
    prompt_tokens,
    text_tokens,
)
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import DataError


@dataclass(frozen=True)
class Example:
    """A text to learn from; the loss counts on tokens[start:]."""

    tokens: tuple[int, ...]
    loss_from: int
    where: str

    @property
    def start(self) -> int:
        """The first token on which the loss counts: nothing foretells the very first of a text."""
        return max(1, self.loss_from)


@dataclass(frozen=True)
class ExampleSet:
    """The examples of a file, and how many were too long."""

    examples: tuple[Example, ...]
    dropped: int
    truncated: int
    said: str | None = None  # how the file was read, where that isn't plain


def load_examples(
    path: Path, tokenizer: Tokenizer, *, max_tokens: int, overlong: Overlong, columns: Sequence[str] = ()
) -> ExampleSet:
    """Examples from lines with one of "text", "completion" (after a "prompt") and "messages".

    The loss counts everywhere on a text, on the completion with its EOS, or on the last assistant message with its
    EOS. A truncated example loses its end and so its EOS: the model never learns to stop in mid-sentence. One whose
    prompt alone fills `max_tokens` is dropped instead.

    Raises:
        DataError: a line is wrong, or every example was dropped.
    """
    limit = LengthLimit(max_tokens, overlong)
    examples = []
    records, said = records_as(path, "examples", columns=columns)
    for record in records:
        tokens, start = example_tokens(record, tokenizer)
        if limit.admits(len(tokens), record.where, useless_when_cut=start >= max_tokens):
            examples.append(Example(tuple(tokens[:max_tokens]), start, record.where))
    limit.require_some(examples, path)
    return ExampleSet(tuple(examples), limit.dropped, limit.truncated, said)


def example_tokens(record: Record, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Tokens of a row, and from where the loss counts.

    Raises:
        DataError: the row is wrong.
    """
    name = one_field(record, "text", "completion", "messages")
    if name == "text":
        return [*text_tokens(text_field(record, name), tokenizer, record.where), tokenizer.eos_id], 0
    prompt: str | Messages
    if name == "completion":
        prompt = prompt_field(record, "prompt")
        answer = answer_field(record, name, prompt, allow_empty=False)
    else:
        *prompt, last = conversation(record, name, last="assistant")
        answer = last["content"]
        if not answer.strip():
            raise DataError(f"{record.where}: the last message in '{name}' is empty; give it a text or remove the line")
    prefix = prompt_tokens(prompt, tokenizer, record.where)
    return answered_tokens(prompt, prefix, answer, tokenizer, record.where)
