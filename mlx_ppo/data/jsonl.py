"""JSONL files as records that remember their file and line, with every defect refused by its place."""

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from mlx_ppo.errors import DataError
from mlx_ppo.files import open_regular

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_BOM = b"\xef\xbb\xbf"
_LONGEST_LINE = 1 << 24  # bytes
_BINARY = {  # how other kinds of files that hold data begin
    b"\x1f\x8b": "compressed by gzip; unpack it with gunzip",
    b"BZh": "compressed by bzip2; unpack it with bunzip2",
    b"\xfd7zXZ\x00": "compressed by xz; unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it with unzstd",
    b"PK\x03\x04": "a zip archive (or a spreadsheet); unpack it, or save it as text",
    b"PAR1": "a binary Parquet file; write its rows as JSONL, such as by pandas",
    b"ARROW1": "a binary Arrow file; write its rows as JSONL",
    b"SQLite f": "a binary SQLite database; write its rows as JSONL",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
}


@dataclass(frozen=True)
class Record:
    """One JSON object of a file."""

    path: Path
    line: int  # counted from 1
    fields: dict[str, Any]

    @property
    def where(self) -> str:
        """The place as `path:line`, with which errors start."""
        return f"{self.path}:{self.line}"


def read_records(path: Path) -> list[Record]:
    """Every object of a JSONL file in UTF-8; a BOM, CRLF and blank lines are accepted.

    Raises:
        DataError: the file is missing, a folder, unreadable or without records; a line isn't UTF-8, isn't one JSON
            object, or holds NaN, Infinity, a key twice, or half of a surrogate pair.
    """
    with opened(path) as stream:
        refuse_binary(stream.read(8), path)
        stream.seek(0)
        return parse_lines(stream, path)


def parse_lines(stream: BinaryIO, path: Path, bad: list[DataError] | None = None) -> list[Record]:
    """The objects of a stream of lines; what is wrong with a line goes into `bad` or, without it, is raised.

    Raises:
        DataError: as `read_records`.
    """
    records, start, empty = [], 0, True
    for line, raw in enumerate(_lines(stream, path), start=1):
        bom = len(_BOM) if line == 1 and raw.startswith(_BOM) else 0
        empty = empty and len(raw) == bom
        content = raw[bom:].removesuffix(b"\n")
        if content.strip():
            try:
                records.append(Record(path, line, _parse(content, f"{path}:{line}", start + bom)))
            except DataError as error:
                if bad is None:
                    raise
                bad.append(error)
        start += len(raw)
    if not records and not bad:
        what = "is empty" if empty else "has only blank lines"
        raise DataError(f"{path}: the file {what}; give it one JSON object per line")
    return records


def text_field(record: Record, name: str, *, allow_empty: bool = False) -> str:
    """The field's string; one without a visible character is refused unless `allow_empty`.

    Raises:
        DataError: the field is missing (names those present and the nearest), not a string, or empty.
    """
    value = record.fields[one_field(record, name)]
    if not isinstance(value, str):
        raise DataError(f"{record.where}: '{name}' must be a string, not {kind(value)}; {_string_mend(value)}")
    if not allow_empty and not value.strip():
        raise DataError(f"{record.where}: '{name}' is empty; give it a text or remove the line")
    return value


def _string_mend(value: object) -> str:
    if isinstance(value, list | dict):
        return "write it as one text"
    return "give it a text or remove the line" if value is None else "put it in double quotes"


def number(value: object, name: str, where: str) -> float:
    """A JSON number that float32 can hold; `name` says what it is in the error."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: '{name}' must be a number, not {kind(value)}; write it without quotes, like 3.5")
    if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:
        raise DataError(f"{where}: '{name}' is too large for float32; keep it within {_FLOAT32_MAX:.1e}")
    return float(value)


def one_field(record: Record, *names: str) -> str:
    """The one of the names that the record has.

    Raises:
        DataError: it has none of them or more than one.
    """
    present = [name for name in names if name in record.fields]
    if len(present) == 1:
        return present[0]
    if present:
        raise DataError(f"{record.where}: both {_quoted(present, ' and ')} are given; keep one of them")
    wanted = f"no field {_quoted(names, ' or ')}"
    if not record.fields:
        raise DataError(f"{record.where}: {wanted}; the object is empty")
    fields = list(record.fields)
    has = _quoted(fields[:8], ", ") + (" and more" if len(fields) > 8 else "")
    nearest = [match for name in names for match in difflib.get_close_matches(name, fields, n=1)]
    mend = f"did you mean {_quoted(nearest[:1], '')}?" if nearest else "rename or add it"
    if "conversations" in fields:
        mend = "turn ShareGPT's turns into 'messages', each with 'role' (user, assistant) and 'content'"
    raise DataError(f"{record.where}: {wanted}, only {has}; {mend}")


def kind(value: object) -> str:
    """The JSON type of a value, for error messages."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]


def _quoted(names: Iterable[str], separator: str) -> str:
    return separator.join(repr(name if len(name) <= 40 else name[:39] + "…") for name in names)


def _lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    """Each line with its end, which only \\n is: JSON strings may hold U+2028 and the like."""
    number = 0
    while raw := stream.readline(_LONGEST_LINE + 1):
        number += 1
        if len(raw) > _LONGEST_LINE:
            raise DataError(f"{path}:{number}: a line of more than {_LONGEST_LINE >> 20} MiB; give each object a line")
        yield raw


def refuse_binary(start: bytes, path: Path) -> None:
    """DataError where a file that begins like this is no text."""
    found = next((what for marks, what in _BINARY.items() if start.startswith(marks)), None)
    if found is not None:
        raise DataError(f"{path}: this is {found}; data are JSONL: a JSON object on each line of a text file")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A data file for reading; what the system refuses becomes a DataError that says where to look."""
    try:
        with open_regular(path) as stream:
            yield stream
    except FileNotFoundError:
        nearest = difflib.get_close_matches(path.name, _names(path.parent), n=3)
        mend = f"did you mean {_quoted(nearest, ' or ')}?" if nearest else "check the path"
        what = "no such file" if path.parent.is_dir() else f"no such file, nor the folder {path.parent}"
        raise DataError(f"{path}: {what}; {mend}") from None
    except IsADirectoryError:
        inside = [name for name in _names(path) if name.endswith(".jsonl")]
        mend = f"name a file in it, like {_quoted(inside[:1], '')}" if inside else "name a JSONL file"
        raise DataError(f"{path}: this is a folder; {mend}") from None
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: can't be read ({reason}); check the path and its permissions") from error


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def _parse(raw: bytes, where: str, start: int) -> dict[str, Any]:
    """The object of one line that starts `start` bytes into the file."""
    try:
        value = STRICT.decode(raw.decode())
        if b"\\u" in raw and isinstance(value, dict):
            refuse_lone_surrogates(value)
    except UnicodeDecodeError as error:
        offset, byte = start + error.start, raw[error.start]
        raise DataError(f"{where}: byte {offset} (0x{byte:02x}) isn't UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: malformed JSON at column {error.colno} ({error.msg}); each line must be one whole JSON object"
        ) from None
    except (RecursionError, ValueError) as error:
        raise refused(error, where) from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: each line must be a JSON object, not {kind(value)}; write {{...}}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {_quoted([twice], '')} is given twice in one object; keep one of them")
    return fields


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} isn't a JSON number; write a finite one or remove the field")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), -float("inf")):
        raise ValueError(f"the number {text[:40]} is too large; write one that a float can hold")
    return value


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python's limit of digits
        raise ValueError(f"the number {text[:40]}… is too large; write one that a float can hold") from None


def refused(error: RecursionError | ValueError, where: str) -> DataError:
    """What to say of a value that `STRICT` or `refuse_lone_surrogates` refused."""
    deep = isinstance(error, RecursionError)
    return DataError(f"{where}: {'the JSON is nested too deeply; flatten it' if deep else error}")


def refuse_lone_surrogates(fields: dict[str, Any]) -> None:
    """ValueError where a field has half of a surrogate pair."""
    for name, value in fields.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(
                f"{_quoted([name], '')} has {half}, half of a surrogate pair; write the whole character"
            ) from None


STRICT = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
)  # refuses with ValueError what JSON doesn't have
