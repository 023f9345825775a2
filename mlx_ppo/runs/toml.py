"""Configurations as TOML."""

import json
from collections.abc import Mapping
from typing import Any

from mlx_ppo.config.sections import Job


def to_toml(config: Job) -> str:
    """A configuration as TOML, every default written out."""
    return sections_toml(config.model_dump())


def sections_toml(sections: Mapping[str, Any]) -> str:
    """Sections, or lists of them, by name, as TOML; keys without a value are left out."""
    blocks: list[str] = []
    for name, value in sections.items():
        rows = value if isinstance(value, list | tuple) else [value]
        header = f"[[{name}]]" if isinstance(value, list | tuple) else f"[{name}]"
        for row in rows:
            lines = [f"{key} = {_toml_value(item)}" for key, item in row.items() if item is not None]
            blocks.append("\n".join([header, *lines]))
    return "\n\n".join(blocks) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, int | float):
        return repr(value)
    # JSON's escapes are TOML's, but for DEL and for the surrogate pairs that ensure_ascii would write
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
