"""`data`: what is in files of feedback, examples or prompts, and their rows as this program's own JSONL."""

import json
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_ppo.cli.options import Place
from mlx_ppo.errors import ConfigError, DataError, harmless, printable

if TYPE_CHECKING:
    from mlx_ppo.data.inspection import Inspected, Seen
    from mlx_ppo.data.tokenizer import Tokenizer

_COLUMN = re.compile(r"[A-Za-z_]+=.+", re.DOTALL)
_KINDS = {
    "pairs": "pairs", "ratings": "rated", "rankings": "rankings", "examples": "examples", "prompts": "prompts",
}  # fmt: skip


@click.command()
@click.argument("files", type=Place(), nargs=-1, required=True, metavar="FILE...")
@click.option("--model", type=Place(), help="Model folder: lengths in its tokens, chats by its template.")
@click.option("--as", "kind", type=click.Choice(sorted(_KINDS)), help="Read the rows as these; default: what they are.")
@click.option("--column", "columns", metavar="NAME=COLUMN", multiple=True, help="Where a name is in the file.")
@click.option("--rows", type=click.IntRange(0, 10_000), default=10, show_default=True, help="Rows shown.")
@click.option("--convert", type=Place(), metavar="OUT.jsonl", help="Write the usable rows of one file as plain JSONL.")
def data(
    files: tuple[Path, ...], columns: tuple[str, ...], kind: str | None, convert: Path | None, **shown: Any
) -> None:
    """Look at data: layout, lengths, duplicates, conflicts, leaks between files, bad lines, rows as a model reads them.

    In the rows, [[ ]] is around what the loss counts on.

    \b
    Examples:
      mlx-ppo data models/reviews/data/train.jsonl
      mlx-ppo data train.csv test.csv --model my-model --column prompt=question
      mlx-ppo data ultrafeedback.parquet --as ratings --convert ratings.jsonl
    """
    wrong = next((column for column in columns if not _COLUMN.fullmatch(column)), None)
    if wrong is not None:
        raise ConfigError(f"--column: {wrong[:60]!r} must be NAME=COLUMN, such as prompt=question")
    if convert is not None and len(files) > 1:
        raise ConfigError("--convert: takes one FILE; convert each by itself")
    if convert is not None and (convert.exists() or convert.is_symlink()):
        raise ConfigError(f"--convert: {convert} exists; name a new file")
    looked = _look(files, _KINDS[kind] if kind else None, columns, **shown)
    if convert is not None:
        _write(convert, [one.record.fields for one in looked[0].seen])
        click.echo(printable(f"{convert}: {len(looked[0].seen)} rows written, {len(looked[0].found.bad)} left out"))


def _look(
    files: Sequence[Path], kind: str | None, columns: Sequence[str], *, model: Path | None, rows: int
) -> list["Inspected"]:
    from mlx_ppo.data.inspection import Characters, inspect
    from mlx_ppo.models.folder import check_model_folder
    from mlx_ppo.tokenizers.load import load_tokenizer

    tokenizer = Characters() if model is None else load_tokenizer(model, check_model_folder(model).config)
    looked = []
    for path in files:
        found = inspect(path, tokenizer, kind, columns)  # type: ignore[arg-type]
        _show(found, tokenizer, "characters" if model is None else "tokens", rows)
        looked.append(found)
    for first, second in combinations(looked, 2):
        texts, prompts = first.shares(second)
        same = f"{texts} of the {len(second.seen)} rows of {second.path.name} have a text that is in {first.path.name}"
        click.echo(printable(f"{same}; {prompts} ask what a row there asks"))
    return looked


def _show(found: "Inspected", tokenizer: "Tokenizer", unit: str, rows: int) -> None:
    from mlx_ppo.data.inspection import spread

    for error in found.found.bad:
        click.echo(printable(str(error)), err=True)
    if not found.seen:
        if found.found.bad:
            raise DataError(f"{found.path}: none of the {found.found.rows} rows can be used")
        raise DataError(f"{found.path}: none of the {found.found.rows} rows gives anything to learn from")
    click.echo(click.style(printable(found.found.said(found.path)), bold=True))
    if found.found.bad:
        click.echo(f"  {len(found.found.bad)} rows can't be used; each is named on standard error")
    low, middle, high, top = spread(found.lengths)
    click.echo(f"  {unit} a row: {low} to {top}, median {middle}, 95 % up to {high}")
    what = "pairs that are there both ways" if found.found.kind == "pairs" else "texts rated differently in other rows"
    click.echo(f"  duplicates: {found.duplicates}")
    if found.found.kind in ("pairs", "rated"):
        click.echo(f"  conflicts: {found.conflicts} {what}")
    for one in found.seen[:rows]:
        click.echo(f"  line {one.record.line}:")
        for line in _lines(one, tokenizer, unit):
            click.echo(harmless(line.replace("\n", "\n      ")))
    click.echo()


def _lines(one: "Seen", tokenizer: "Tokenizer", unit: str) -> list[str]:
    """A row as the model reads it."""
    if one.start is not None:
        tokens = one.texts[0]
        before, rest = _split(tokens, one.start, tokenizer)
        ends = " EOS" if tokens[-1] in tokenizer.eos_ids else ""
        return [f"    {before}[[{rest}{ends}]]  (loss on {len(tokens) - one.start} of {len(tokens)} {unit})"]
    texts = [tokenizer.decode(tokens) for tokens in one.texts]
    if len(texts) > 1 and one.ratings:
        ranked = sorted(zip(one.ratings, texts, strict=True), key=lambda answer: -answer[0])
        return [f"    {value:g}: {text}" for value, text in ranked]
    if len(texts) == 2:
        return [f"    chosen:   {texts[0]}", f"    rejected: {texts[1]}"]
    rated = f"  (rated {', '.join(f'{rating:g}' for rating in one.ratings)})" if one.ratings else ""
    return [f"    {texts[0]}{rated}"]


def _split(tokens: Sequence[int], start: int, tokenizer: "Tokenizer") -> tuple[str, str]:
    """The text before a token and from it on, as they stand in the whole."""
    whole, before = tokenizer.decode(tokens), tokenizer.decode(tokens[:start])
    if whole.startswith(before):
        return before, whole[len(before) :]
    return before, tokenizer.decode(tokens[start:])


def _write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"--convert: {path} can't be written ({error.strerror}); name another file") from None
