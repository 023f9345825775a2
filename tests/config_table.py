"""The README's table of configuration keys, made from the schema.

python tests/config_table.py   # writes it into README.md
"""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mlx_ppo.config.supervised import JOBS

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- configuration keys: made by tests/config_table.py -->", "<!-- end of configuration keys -->"


def table() -> str:
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


def written() -> str:
    """What the README has between the markers."""
    return README.read_text("utf-8").split(START)[1].split(END)[0].strip()


def main() -> None:
    """Put the table into the README."""
    before, rest = README.read_text("utf-8").split(START)
    README.write_text(f"{before}{START}\n\n{table()}\n\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
