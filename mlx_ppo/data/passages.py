"""A text to measure a model on: paragraphs of plain text one after the other, or rows by themselves."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_ppo.data.examples import example_tokens
from mlx_ppo.data.jsonl import opened, refuse_binary
from mlx_ppo.data.layouts import records_as
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import DataError

ENGLISH = Path(__file__).with_name("english.txt")  # written for this program
_ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")
_LARGEST = 1 << 26  # bytes of a plain text
_BREAK = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")


@dataclass(frozen=True)
class Passage:
    """Tokens that follow each other, and the part of the text to which each counted one belongs."""

    tokens: tuple[int, ...]
    parts: tuple[int, ...]  # as many; below 0 where a token doesn't count


@dataclass(frozen=True)
class Passages:
    """A text in passages."""

    passages: tuple[Passage, ...]
    parts: int  # paragraphs or rows
    noun: str  # "paragraphs" or "rows"
    said: str | None = None  # how a file of rows was read, where that isn't plain


def load_passages(path: Path, tokenizer: Tokenizer) -> Passages:
    """The passages of a file.

    Files whose names end as those of rows do (JSONL, JSON, CSV, Parquet, maybe packed) give a passage a row: "text"
    whole, of a "prompt" with "completion" or a chat what `sft` would learn. Every other file is one passage of plain
    text in UTF-8, whose paragraphs are parted by empty lines.

    Raises:
        DataError: the file can't be read, or has nothing to count.
    """
    if path.suffix.lower() in _ROWS:
        records, said = records_as(path, "examples")
        rows = []
        for number, record in enumerate(records):
            tokens, start = example_tokens(record, tokenizer)
            first = max(1, start)
            rows.append(Passage(tuple(tokens), (-1,) * first + (number,) * (len(tokens) - first)))
        found = Passages(tuple(rows), len(rows), "rows", said)
    else:
        paragraphs = _paragraphs(path)
        found = Passages((_joined(paragraphs, tokenizer),), len(paragraphs), "paragraphs")
    if not any(part >= 0 for passage in found.passages for part in passage.parts):
        raise DataError(f"{path}: has no token that follows another; give more text")
    return found


def _paragraphs(path: Path) -> list[str]:
    with opened(path) as stream:
        content = stream.read(_LARGEST + 1)
    refuse_binary(content[:8], path)
    if len(content) > _LARGEST:
        raise DataError(f"{path}: more than {_LARGEST >> 20} MiB of plain text; cut it, it is read only in part anyway")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: byte {error.start} isn't UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        raise DataError(f"{path}: this is no plain text; it has null characters")
    text = text.replace("\r\n", "\n")
    found = [part.strip("\n") for part in _BREAK.split(text) if part.strip()]
    if not found:
        raise DataError(f"{path}: the file has no text")
    return found


def _joined(paragraphs: Sequence[str], tokenizer: Tokenizer) -> Passage:
    tokens, parts = list[int](), list[int]()
    for number, paragraph in enumerate(paragraphs):
        shown = paragraph if number == len(paragraphs) - 1 else paragraph + "\n\n"
        found = tokenizer.encode(shown, bos=not tokens)
        tokens += found
        parts += [number] * len(found)
    return Passage(tuple(tokens), (-1, *parts[1:]) if parts else ())
