"""Values of `--set` as a shell hands them over."""

import re
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from mlx_ppo.config.sections import Job


def as_text(job: type[Job], table: dict[str, Any], key: tuple[str | int, ...], override: str) -> None:
    """What a shell left of a text or a list: `run.name=42`, whose quotes it took away, is the text 42."""
    target: Any = table
    for part in key[:-1]:
        target = target[part]
    value, given = target[key[-1]], override.partition("=")[2].strip()
    field = _field(job, key)
    if field is None:
        return
    if _holds_text(field.annotation) and not isinstance(value, str | list | dict):
        target[key[-1]] = given
    elif "tuple" in str(field.annotation) and isinstance(value, str) and re.fullmatch(r"\[[^\[\]\"']*\]", value):
        target[key[-1]] = [part.strip() for part in value[1:-1].split(",") if part.strip()]


def _field(job: type[Job], key: tuple[str | int, ...]) -> FieldInfo | None:
    """A key's field; None where there is none."""
    model: Any = job
    for part in [part for part in key if isinstance(part, str)][:-1]:
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", ()) else None
        model = get_args(annotation)[0] if get_args(annotation) else annotation
    found: FieldInfo | None = getattr(model, "model_fields", {}).get(key[-1])
    return found


def _holds_text(annotation: Any) -> bool:
    parts = get_args(annotation)
    return annotation in (str, Path) or any(_holds_text(part) for part in parts if "tuple" not in str(annotation))
