"""Answers into the files that `reward` and `sft` read."""

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from mlx_ppo.runs.folder import replace_file
from mlx_ppo.studio.lines import Row
from mlx_ppo.studio.questions import AGAIN

HELD_OUT = 0.2  # share of the prompts whose answers only measure
_FEWEST = 10  # answers; below, none are held out

_NEEDED = {  # of an answer that a person wrote into the file
    "pair": {"prompt", "left", "right"},
    "rating": {"prompt", "completion"},
    "rewrite": {"prompt", "completion"},
}


class Feedback(NamedTuple):
    """Rows for training, each by its prompt either to learn from or held out."""

    pairs: list[Row]
    held_out: list[Row]
    ratings: list[Row]
    held_out_ratings: list[Row]
    examples: list[Row]  # for `sft`


def feedback(standing: Mapping[str, Row], sets: Iterable[str]) -> Feedback:
    """What the answers on some sets say.

    A verdict for a side is a pair; ties, both bad, skipped ones and questions that were asked again are none. A
    rewritten answer is an example, and a pair over the one it took the place of.
    """
    known = set(sets)
    first = {name: row for name, row in standing.items() if row.get("set") in known and not name.endswith(AGAIN)}
    rows = [row for row in first.values() if row.get("verdict") != "skip" and _NEEDED[row["kind"]] <= row.keys()]
    pairs = [pair for row in rows if (pair := _pair(row)) is not None]
    ratings = [_with_prompt(row, completion=row["completion"], rating=row["rating"])
               for row in rows if row["kind"] == "rating"]  # fmt: skip
    examples = [_with_prompt(row, completion=row["better"]) for row in rows if row["kind"] == "rewrite"]
    return Feedback(*_split(pairs), *_split(ratings), examples)


def _pair(row: Row) -> Row | None:
    if row["kind"] == "rewrite":
        return _with_prompt(row, chosen=row["better"], rejected=row["completion"])
    if row["kind"] != "pair" or row["verdict"] not in ("left", "right"):
        return None
    other = "right" if row["verdict"] == "left" else "left"
    return _with_prompt(row, chosen=row[row["verdict"]], rejected=row[other])


def _with_prompt(row: Row, **values: Any) -> Row:
    return {"prompt": row["prompt"], **values}


def _split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """To learn from, and held out: all rows of a prompt are on one side, the same one for ever."""
    if len(rows) < _FEWEST:
        return list(rows), []
    held = [_share(row["prompt"]) < HELD_OUT for row in rows]
    learn = [row for row, out in zip(rows, held, strict=True) if not out]
    return (learn, [row for row, out in zip(rows, held, strict=True) if out]) if learn else (list(rows), [])


def _share(prompt: Any) -> float:
    digest = blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def write_rows(path: Path, rows: Sequence[Row]) -> Path | None:
    """A JSONL file in one step; None, and no file, where there are no rows."""
    if not rows:
        path.unlink(missing_ok=True)
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
