"""Rows of any known layout and file as the rows that this project's readers take."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_ppo.data.containers import Rows, cell_value, read_rows
from mlx_ppo.data.dialogues import Row, UnusableError, without_answer
from mlx_ppo.data.jsonl import Record
from mlx_ppo.data.known_layouts import LAYOUTS, NATIVE, Kind, Layout
from mlx_ppo.errors import DataError

_NOUNS = {
    "pairs": "pairs of {}",
    "rated": "rated {}",
    "rankings": "rankings of {}",
    "examples": "{} to imitate",
    "prompts": "prompts of {}",
}
SOURCE = "source"  # field of a row that says where it is from, by which figures are taken apart
PLAIN = "plain"


@dataclass(frozen=True)
class Found:
    """A file's rows as the readers take them, and what was seen on the way."""

    records: list[Record]
    kind: Kind
    layout: str
    form: str
    bad: list[DataError]  # rows that can't be used, in the order of the file
    rows: int  # in the file, those included
    without: int  # rows that give nothing, such as ties or what nobody rated
    note: str

    def said(self, path: Path) -> str:
        """A line for a person: `ultrafeedback.jsonl: ultrafeedback: 812 pairs of chats`."""
        chats = any(
            isinstance(record.fields.get("prompt", record.fields.get("messages")), list) for record in self.records
        )
        what = _NOUNS[self.kind].format("chats" if chats else "texts")
        parts = [f"{path.name}: {self.layout}: {len(self.records)} {what}"]
        if self.form != "JSONL":
            parts.append(f"from {self.form}")
        if self.without:
            parts.append(f"{self.without} of {self.rows} rows give none")
        return ", ".join(parts) + (f" ({self.note})" if self.note else "")


def records_as(path: Path, *wanted: Kind, columns: Sequence[str] = ()) -> tuple[list[Record], str | None]:
    """Rows of one of the kinds that a reader takes, and a line to say unless they were such rows already.

    Raises:
        DataError: the file can't be read, has another kind of rows, or a row can't be used.
    """
    found = find(path, *wanted, columns=columns)
    if found.bad:
        more = f" (one of {len(found.bad)} unusable rows of {found.rows})" if len(found.bad) > 1 else ""
        raise DataError(f"{found.bad[0]}{more}")
    if not found.records:
        raise DataError(f"{path}: none of the {found.rows} rows ({found.layout}) gives anything to learn from")
    plain = found.layout == PLAIN and found.form == "JSONL"
    return found.records, None if plain else found.said(path)


def find(path: Path, *wanted: Kind, columns: Sequence[str] = ()) -> Found:
    """The rows of a file as one of the kinds, the first that it has; bad rows are kept apart.

    Args:
        path: JSONL, a JSON list, CSV or Parquet, maybe packed by gzip.
        wanted: kinds of rows; where a layout has several of them rankings, or else the first that it is for.
        columns: "name=column", where a row's `name` is in the file; dots go into objects.

    Raises:
        DataError: the file can't be read or has rows of another kind only.
    """
    read = read_rows(path)
    if columns:
        read = _renamed(read, columns)
    counts = Counter(recognised(record.fields) for record in read.records)
    name = next((name for name, _ in counts.most_common() if name is not None), PLAIN)
    if name == PLAIN:
        kind = next((kind for kind in wanted if _plain_kind(read.records) == kind), wanted[-1])
        return Found(read.records, kind, PLAIN, read.form, read.bad, len(read.records) + len(read.bad), 0, "")
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    kinds = [kind for kind in (*layout.rows, "prompts") if kind in wanted]
    if not kinds:
        has = " or ".join(_NOUNS[kind].format("answers") for kind in layout.rows)
        raise DataError(f"{path}: this is {name}, which gives {has}, not {_NOUNS[wanted[0]].format('answers')}")
    kinds.sort(key=lambda kind: kind != "rankings")
    tried = [_converted(read, layout, kind) for kind in kinds]
    given = [found for found in tried if found.records] or [found for found in tried if found.bad] or tried
    return given[0]


def recognised(row: Row) -> str | None:
    """The name of the layout that a row has, None for none."""
    layout = next((layout.name for layout in LAYOUTS if layout.fits(row)), None)
    return layout or (PLAIN if any(name in row for name in NATIVE) else None)


def _plain_kind(records: Sequence[Record]) -> Kind:
    fields = records[0].fields if records else {}
    if "chosen" in fields:
        return "pairs"
    if "rating" in fields or "ratings" in fields:
        return "rated"
    match fields.get("messages"):
        case [*_, {"role": "assistant"}]:
            return "examples"
    return "examples" if "text" in fields or "completion" in fields else "prompts"


def _converted(read: Rows, layout: Layout, kind: Kind) -> Found:
    convert = layout.rows[kind] if kind in layout.rows else partial(_prompts, next(iter(layout.rows.values())))
    records, bad, without = [], list(read.bad), 0
    for record in read.records:
        try:
            if not layout.fits(record.fields):
                other = recognised(record.fields)
                is_other = f"is {other}" if other else "has no layout that is known"
                raise UnusableError(f"the row {is_other}, where the file is {layout.name}; repair or remove it")
            rows = convert(record.fields)
            if any(row.get("chosen", 0) == row.get("rejected", 1) for row in rows):
                raise UnusableError("'chosen' and 'rejected' are the same; remove the row")
        except UnusableError as error:
            bad.append(DataError(f"{record.where}: {error}"))
            continue
        without += not rows
        source = {SOURCE: record.fields[SOURCE]} if SOURCE in record.fields else {}
        records += [Record(record.path, record.line, source | row) for row in rows]
    bad.sort(key=line_of)
    if layout.merge and kind == "rated":
        records = _merged(records)
    of_pairs = next(iter(layout.rows)) == "pairs"
    note = "" if kind == "rankings" or (kind == "rated" and of_pairs) else layout.note
    return Found(records, kind, layout.name, read.form, bad, len(read.records) + len(read.bad), without, note)


def line_of(error: DataError) -> int:
    """The line that an error names, 0 for none."""
    place = str(error).split(": ", 1)[0].rpartition(":")[2]
    return int(place) if place.isdecimal() else 0


def _renamed(read: Rows, columns: Sequence[str]) -> Rows:
    """Rows with the columns under the names that the readers know; a row without one of them is bad."""
    records, bad = [], list(read.bad)
    for record in read.records:
        fields = dict(record.fields)
        try:
            for mapping in columns:
                name, _, column = mapping.partition("=")
                value = _inside(record.fields, column)
                fields[name] = (
                    cell_value(name, value) if isinstance(value, str) and read.form.startswith("CSV") else value
                )
                if column in fields and column != name:
                    del fields[column]
            records.append(Record(record.path, record.line, fields))
        except UnusableError as error:
            bad.append(DataError(f"{record.where}: {error}"))
    bad.sort(key=line_of)
    return Rows(records, read.form, bad)


def _inside(row: Row, column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            has = ", ".join(repr(name[:40]) for name in list(row)[:8])
            raise UnusableError(f"no column {column!r}, which data.columns names, only {has or 'none'}")
        value = value[part]
    return value


def _merged(records: Sequence[Record]) -> list[Record]:
    """Ratings of the same text by different people in one row, where the text came first."""
    found: dict[str, Record] = {}
    for record in records:
        key = repr([record.fields.get(name) for name in ("prompt", "completion", "text")])
        if key in found:
            found[key].fields["ratings"].extend(record.fields["ratings"])
        else:
            found[key] = record
    return list(found.values())


def _prompts(convert: Callable[[Row], list[Row]], row: Row) -> list[Row]:
    """What a row asks, with its other fields, which reward functions may read."""
    rows = convert(row)
    if not rows:
        return []
    prompt = rows[0].get("prompt", without_answer(rows[0].get("messages", [])))
    if not prompt:
        raise UnusableError("the row has no prompt")
    return [{name: value for name, value in row.items() if name != "messages"} | {"prompt": prompt}]
