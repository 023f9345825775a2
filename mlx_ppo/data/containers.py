"""Files of rows, recognised by how they begin: JSONL, a JSON list, CSV or Parquet, as they are or packed by gzip."""

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlx_ppo.data.jsonl import STRICT, Record, kind, opened, parse_lines, refuse_binary, refuse_lone_surrogates, refused
from mlx_ppo.errors import DataError

_LARGEST = 1 << 30  # bytes of a text that is read as a whole
_HEAD = 1 << 16
_WIDEST_CELL = 1 << 24  # characters, as a line of JSONL
_PARQUET_BATCH = 1000  # rows
_NUMBERS = {"rating", "margin", "score", "rank", "score_chosen", "score_rejected", "helpfulness"}
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class Rows:
    """The rows of a file, and how it holds them."""

    records: list[Record]  # with the line on which each begins; the row's number in Parquet
    form: str  # "JSONL", "a JSON list", "CSV separated by ';'", "Parquet", maybe with ", gzip"
    bad: list[DataError]  # lines that aren't rows


def read_rows(path: Path) -> Rows:
    """Every row of a file, as objects with the names of its columns; lines that can't be read are in `bad`.

    Raises:
        DataError: the file is missing, unreadable, without rows, damaged, or of another kind.
    """
    with opened(path) as stream:
        start = stream.read(8)
        stream.seek(0)
        if start.startswith(b"PAR1"):
            return Rows(_parquet(stream, path), "Parquet", [])
        if not start.startswith(b"\x1f\x8b"):
            return _text(stream, path)
        try:
            with gzip.GzipFile(fileobj=stream) as unpacked:
                rows = _text(unpacked, path)  # type: ignore[arg-type]
        except (EOFError, zlib.error) as error:
            raise DataError(f"{path}: the gzip archive is damaged ({error}); fetch it again") from None
        return Rows(rows.records, f"{rows.form}, gzip", rows.bad)


def _text(stream: BinaryIO, path: Path) -> Rows:
    head = stream.read(_HEAD)
    refuse_binary(head[:8], path)
    stream.seek(0)
    begins = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if begins.startswith(b"["):
        return Rows(list(_list(_whole(stream, path), path)), "a JSON list", [])
    separator = _separator(begins)
    if separator:
        bad: list[DataError] = []
        records = list(_csv(_whole(stream, path), separator, path, bad))
        if not records and not bad:
            raise DataError(f"{path}: the file has a line of names and no rows; add some")
        return Rows(records, f"CSV separated by {separator!r}", bad)
    bad = []
    return Rows(parse_lines(stream, path, bad), "JSONL", bad)


def _whole(stream: BinaryIO, path: Path) -> str:
    pieces, size = [], 0
    while piece := stream.read(_HEAD):  # a read of the bound itself would take its memory at once
        pieces.append(piece)
        size += len(piece)
        if size > _LARGEST:
            raise DataError(f"{path}: more than {_LARGEST >> 30} GiB, which is read at once; write its rows as JSONL")
    content = b"".join(pieces)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte {error.start} (0x{content[error.start]:02x}) isn't UTF-8; save the file as UTF-8"
        ) from None


def _list(text: str, path: Path) -> Iterator[Record]:
    at = _past_blanks(text, 0) + 1
    line, counted = 1, 0
    if text.startswith("]", _past_blanks(text, at)):
        raise DataError(f"{path}: the list is empty; give it an object for each row")
    while True:
        at = _past_blanks(text, at)
        line, counted = line + text.count("\n", counted, at), at
        value, after = _item(text, at, f"{path}:{line}", path)
        yield Record(path, line, value)
        after = _past_blanks(text, after)
        at = after + 1
        if text[after:at] == "]":
            break
        if text[after:at] != ",":
            line += text.count("\n", counted, after)
            raise DataError(f"{path}:{line}: the list has no ',' or ']' after an object; write the whole list")
    at = _past_blanks(text, at)
    if at < len(text):
        line += text.count("\n", counted, at)
        raise DataError(f"{path}:{line}: something follows the list; the file must be one list, or JSONL")


def _past_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _item(text: str, at: int, where: str, path: Path) -> tuple[dict[str, Any], int]:
    """The object of a list at a place, and where it ends."""
    try:
        value, after = STRICT.raw_decode(text, at)
        if isinstance(value, dict):
            refuse_lone_surrogates(value)
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}: malformed JSON at column {error.colno}"
        raise DataError(f"{place} ({error.msg}); the file begins as a list, so it must be one whole list") from None
    except (RecursionError, ValueError) as error:
        raise refused(error, where) from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: each item of the list must be an object, not {kind(value)}; write {{...}}")
    return value, after


def _separator(begins: bytes) -> str:
    """What separates the names in the first line, "" where that isn't a line of names."""
    line = begins.split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    if not line or line[0] == "{" or "\0" in line or "\ufffd" in line:
        return ""
    for separator in ("\t", ";", ","):
        names = next(csv.reader([line], delimiter=separator), [])
        plain = all(name.strip() and len(name) <= 80 and not set(name) & set("{}[]:") for name in names)
        if len(names) > 1 and plain and len(set(names)) == len(names):
            return separator
    return "," if line.strip('"') in ("prompt", "text") else ""


def _csv(text: str, separator: str, path: Path, bad: list[DataError]) -> Iterator[Record]:
    before = csv.field_size_limit(_WIDEST_CELL)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        names: list[str] = []
        line = 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if not names:
                    names = [name.strip() for name in cells]
                elif len(cells) == len(names):
                    fields = {name: cell_value(name, cell) for name, cell in zip(names, cells, strict=True)}
                    yield Record(path, line, fields)
                else:
                    count = f"{len(cells)} cells under {len(names)} names"
                    bad.append(DataError(f"{path}:{line}: {count}; quote what has {separator!r}"))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: malformed CSV ({error}); quote cells by '\"' and double those within"
        ) from None
    finally:
        csv.field_size_limit(before)


def cell_value(name: str, cell: str) -> Any:
    """A cell as JSON would have it: numbers under names that mean one, lists and objects; anything else is a text."""
    if name in _NUMBERS or name.startswith("rating_"):
        try:
            value = float(cell)
        except ValueError:
            return cell or None
        return value if math.isfinite(value) else cell
    if name == "label" and cell.lower() in _WORDS:
        return _WORDS[cell.lower()]
    if cell[:2] in ("[{", '{"') or name in ("ratings", "ranks", "ranking", "scores"):
        try:
            value = STRICT.decode(cell)
            refuse_lone_surrogates({name: value})
        except (ValueError, RecursionError):
            return cell
        return value if isinstance(value, list | dict) else cell
    return cell


def _parquet(stream: BinaryIO, path: Path) -> list[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"{path}: this is Parquet, which needs pyarrow; pip install 'mlx-ppo[parquet]', or write its rows as JSONL"
        ) from None
    records: list[Record] = []
    try:
        file = parquet.ParquetFile(stream)
        size = sum(file.metadata.row_group(at).total_byte_size for at in range(file.metadata.num_row_groups))
        if size > _LARGEST:
            raise DataError(f"{path}: more than {_LARGEST >> 30} GiB when unpacked; write its rows as JSONL")
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
            records += [
                Record(path, len(records) + at, _json(row)) for at, row in enumerate(batch.to_pylist(), start=1)
            ]
    except (ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"{path}: the Parquet file can't be read ({reason}); write it again") from None
    if not records:
        raise DataError(f"{path}: the file has no rows; add some")
    return records


def _json(value: Any) -> Any:
    """A value of Arrow's as JSON has it: dates and the like as texts, what isn't a finite number as null."""
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
