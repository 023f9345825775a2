"""The tables of the documents that are made from the code: configuration keys, columns of the log.

python tests/config_table.py   # writes them into docs/
"""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mlx_ppo.config.supervised import JOBS
from mlx_ppo.runs.metrics import METRICS, NORMAL

DOCS = Path(__file__).resolve().parents[1] / "docs"


def columns() -> str:
    """Markdown: a row for each number that a PPO run logs."""
    cells = [
        (f"`{metric.key}`", metric.label, metric.sentence.replace("|", "\\|"), NORMAL.get(metric.key, ""))
        for metric in METRICS
    ]
    rows = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(["| key | shown as | meaning | normal |", "|---|---|---|---|", *rows])


def keys() -> str:
    """Markdown: a heading for each command, a row for each key that no earlier command has in the same words."""
    parts: list[str] = []
    seen: set[str] = set()
    for command, job in JOBS.items():
        rows = []
        for section, field in job.model_fields.items():
            kind, many = _section(field.annotation)
            given = field.default if isinstance(field.default, BaseModel) else None
            for key, entry in kind.model_fields.items():
                default = getattr(given, key) if given is not None else entry.get_default()
                name = f"[[{section}]] {key}" if many else f"{section}.{key}"
                row = f"| `{name}` | {_default(entry, default)} | {_choices(entry)}{entry.description} |"
                if row not in seen:
                    rows.append(row)
                seen.add(row)
        parts.append("\n".join([f"**`mlx-ppo {command}`**", "", "| key | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _section(annotation: Any) -> tuple[type[BaseModel], bool]:
    inner = get_args(annotation)
    return (inner[0], True) if inner else (annotation, False)


def _default(field: FieldInfo, default: Any) -> str:
    if field.is_required() or default is PydanticUndefined:
        return "required"
    if default is None:
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f'`"{default}"`' if isinstance(default, str | Path) else f"`{list(default) if default == () else default}`"


def _choices(field: FieldInfo) -> str:
    if get_origin(field.annotation) is not Literal:
        return ""
    return ", ".join(f"`{choice}`" for choice in get_args(field.annotation)) + ": "


TABLES = {
    "configuration.md": (
        "<!-- configuration keys: made by tests/config_table.py -->",
        keys,
        "<!-- end of configuration keys -->",
    ),
    "how-it-works.md": (
        "<!-- columns of metrics.jsonl: made by tests/config_table.py -->",
        columns,
        "<!-- end of columns -->",
    ),
}


def written(name: str) -> str:
    """What a document has between its markers."""
    start, _, end = TABLES[name]
    return (DOCS / name).read_text("utf-8").split(start)[1].split(end)[0].strip()


def main() -> None:
    """Put the tables into the documents."""
    for name, (start, made, end) in TABLES.items():
        before, rest = (DOCS / name).read_text("utf-8").split(start)
        (DOCS / name).write_text(f"{before}{start}\n\n{made()}\n\n{end}{rest.split(end)[1]}", "utf-8")


if __name__ == "__main__":
    main()
