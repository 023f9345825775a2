"""TOML into a job's configuration: all problems at once, each with file, line, key and the mend."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import tomli
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mlx_ppo.config.checks import contradictions
from mlx_ppo.config.overrides import as_text
from mlx_ppo.config.sections import Job
from mlx_ppo.errors import ConfigError
from mlx_ppo.files import read_regular

J = TypeVar("J", bound=Job)
Key = tuple[str | int, ...]

_LARGEST = 1 << 20  # bytes of a configuration file
# What may hide brackets, '=' and line ends: multi-line strings, strings, comments.
_OPAQUE = re.compile(
    r'("""(?:\\.|[^\\])*?"{3,5}|' r"'''.*?'{3,5})" r'|("(?:\\.|[^"\\\n])*"|' r"'[^'\n]*')|#[^\n]*", re.DOTALL
)
_HEADER = re.compile(r"^\s*(\[{1,2})([^\[\]]+)\]")
_ASSIGNMENT = re.compile(r"^\s*([^=\[\]{}]+)=")


def read_config(job: type[J], path: Path, overrides: Sequence[str] = ()) -> J:
    """Read one job's configuration.

    Args:
        job: the class of the configuration.
        path: the TOML file; relative input paths in it are relative to its folder.
        overrides: `section.key=value`, later ones winning; paths in them are relative to the working folder.
    Returns:
        The checked configuration with absolute paths.
    Raises:
        ConfigError: with every problem found, one line each.
    """
    text = _read_text(path)
    table = _parse(path, text)
    lines = _key_lines(text)
    origins: dict[Key, str] = {}
    problems = [problem for override in overrides if (problem := _apply_override(table, override, origins))]
    folder = Path(os.path.realpath(path)).parent
    for key, override in origins.items():
        as_text(job, table, key, override)
    _resolve_paths(job, table, folder, origins)
    try:
        config = job.model_validate(table)
    except ValidationError as error:
        for item in error.errors():
            problems.append(f"{_place(tuple(item['loc']), path, lines, origins)}: {_explain(job, item)}")
        raise ConfigError(problems) from None
    for dotted, problem in contradictions(config):
        key = _key(dotted.split("."))
        problems.append(f"{_place(key, path, lines, origins)}: {_display(key)}: {problem}")
    if problems:
        raise ConfigError(problems)
    return config


def _place(key: Key, path: Path, lines: Mapping[Key, int], origins: Mapping[Key, str]) -> str:
    """Where a key was given: by `--set`, or on a line of the file; else where its section was."""
    for length in range(len(key), 0, -1):
        if key[:length] in origins:
            return f"--set {_cut(origins[key[:length]])}"
        if key[:length] in lines:
            return f"{path}:{lines[key[:length]]}"
    return next((f"--set {_cut(override)}" for full, override in origins.items() if full[: len(key)] == key), str(path))


def _key(parts: Iterable[str]) -> Key:
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a TOML file in it")
    try:
        data = read_regular(path, _LARGEST)
    except FileNotFoundError:
        near = nearest(path.name, (item.name for item in path.parent.glob("*.toml")) if path.parent.is_dir() else ())
        raise ConfigError(f"{path}: no such configuration file." + _did_you_mean(near)) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    if not text.strip():
        raise ConfigError(f"{path}: the file is empty; `mlx-ppo init DIR` writes one to start from")
    return text


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise ConfigError(_syntax_error(path, text, str(error))) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets hundreds deep
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _syntax_error(path: Path, text: str, message: str) -> str:
    match = re.search(r" \(at line (\d+), column \d+\)", message)
    line = int(match[1]) if match else text.rstrip().count("\n") + 1
    if re.match(r"Cannot (overwrite a value|declare .* twice)", message):
        name = _cut(text.split("\n")[line - 1].partition("=")[0].strip())
        what = name if name.startswith("[") else f"'{name}'"
        return f"{path}:{line}: {what} is there twice; keep one"
    return f"{path}:{line}: not valid TOML: {message.replace(match[0], '') if match else message}"


def _key_lines(text: str) -> dict[Key, int]:
    """Line numbers of tables and keys in a text that the parser has accepted; keys of inline tables have none."""
    lines: dict[Key, int] = {}
    prefix: Key = ()
    counts: dict[Key, int] = {}
    depth = 0
    for number, line in enumerate(_OPAQUE.sub(_without_content, text).split("\n"), start=1):
        if depth == 0 and (header := _HEADER.match(line)):
            prefix = _names(header[2])
            lines.setdefault(prefix, number)
            if header[1] == "[[":
                counts[prefix] = counts.get(prefix, -1) + 1
                prefix = (*prefix, counts[prefix])
                lines[prefix] = number
        elif depth == 0 and (assignment := _ASSIGNMENT.match(line)):
            lines.setdefault((*prefix, *_names(assignment[1])), number)
        depth += sum(line.count(mark) for mark in "[{") - sum(line.count(mark) for mark in "]}")
    return lines


def _without_content(match: re.Match[str]) -> str:
    """Line ends of a multi-line string; a string without what could be mistaken for structure; nothing of a comment."""
    if match[1]:
        return "\n" * match[1].count("\n")
    return re.sub(r"[][{}=.]", "_", match[2]) if match[2] else ""


def _names(dotted: str) -> Key:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _apply_override(table: dict[str, Any], override: str, origins: dict[Key, str]) -> str:
    """Put one `section.key=value` into the table; returns the problem, or ""."""
    path, equals, value = override.partition("=")
    parts = path.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        return f"--set {_cut(override)}: write it as section.key=value, for example --set ppo.epochs=4"
    key = _key(parts)
    *sections, last = key
    target: Any = table
    for part in sections:
        if isinstance(target, list) and isinstance(part, int) and part < len(target):
            target = target[part]
        elif isinstance(target, dict) and isinstance(part, str):
            target = target.get(part, {})
        else:
            return f"--set {_cut(override)}: there is no {_display(key[:-1])} in the configuration"
    if not isinstance(target, dict) or not isinstance(last, str):
        example = "lists take an index, for example reward.0.weight=2"
        return f"--set {_cut(override)}: {_display(key[:-1])} is not a section; {example}"
    target = table
    for part in sections:
        target = target[part] if isinstance(part, int) else target.setdefault(part, {})
    try:
        target[last] = tomli.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        target[last] = value
    origins[key] = override
    return ""


def _resolve_paths(job: type[Job], table: dict[str, Any], base: Path, origins: Mapping[Key, str]) -> None:
    """Make relative paths absolute: from the file's folder, or from the working folder where `--set` gave them.

    A section that is only partly given takes the rest from the job's own default of it.
    """
    for name, field in job.model_fields.items():
        many = "tuple" in str(field.annotation)
        section = get_args(field.annotation)[0] if many else field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            continue
        value = table.get(name, None if many else table.setdefault(name, {}))
        rows: list[tuple[Key, Any]] = [((name,), value)]
        if many and isinstance(value, list):
            rows = [((name, index), row) for index, row in enumerate(value)]
        for prefix, row in rows:
            if isinstance(row, dict):
                if isinstance(field.default, BaseModel):
                    row.update({k: getattr(field.default, k) for k in field.default.model_fields_set if k not in row})
                _resolve_section(section, row, prefix, base, origins)


def _resolve_section(
    section: type[BaseModel], row: dict[str, Any], prefix: Key, base: Path, origins: Mapping[Key, str]
) -> None:
    for key, field in section.model_fields.items():
        kind = _path_kind(field.annotation, field.json_schema_extra, field.metadata)
        value = row.get(key, field.default if kind == "output" else None)
        if isinstance(value, Path):
            value = str(value)
        if not isinstance(value, str) or "\0" in value or not (kind or key == "function"):
            continue
        start = Path.cwd() if (*prefix, key) in origins else base
        row[key] = os.path.normpath(start / _expand(value)) if value else value


def _expand(value: str) -> Path:
    try:
        return Path(value).expanduser()
    except RuntimeError:  # `~name` of no user here
        return Path(value)


def _path_kind(annotation: Any, extra: Any, metadata: Iterable[Any]) -> str:
    for item in (extra, *(getattr(meta, "json_schema_extra", None) for meta in metadata)):
        if isinstance(item, dict) and "path" in item:
            return str(item["path"])
    for part in get_args(annotation):
        kind = _path_kind(part, None, getattr(part, "__metadata__", ()))
        if kind:
            return kind
    return ""


def _explain(job: type[Job], item: ErrorDetails) -> str:
    """One validation error of pydantic in the user's words."""
    loc: Key = tuple(item["loc"])
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(job, loc)
    if kind == "missing":
        what = f"section {_header(job, loc[0])}" if len(loc) == 1 else f"key '{loc[-1]}' in {_header(job, loc[0])}"
        return f"missing {what}" + (": " + _required(job, str(loc[0])) if len(loc) == 1 else "")
    shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
    wanted = {
        "greater_than": f"must be above {context.get('gt')}",
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "less_than": f"must be below {context.get('lt')}",
        "less_than_equal": f"must be at most {context.get('le')}",
        "finite_number": "must be a finite number",
        "float_type": "must be a number",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "bool_type": "must be true or false",
        "string_type": "must be a text in quotes",
        "path_type": "must be a path in quotes",
        "model_type": f"must be a section, written [{loc[0]}]",
        "tuple_type": "must be a list in brackets" if len(loc) > 1 else f"must be sections, written [[{loc[0]}]]",
        "too_short": f"needs at least one [[{loc[0]}]]",
        "value_error": str(context.get("error")),
        "string_pattern_mismatch": "must be letters, digits, '.', '_' or '-'",
    }.get(kind, item["msg"].lower())
    if kind == "literal_error" and isinstance(value, str):
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        hint = _did_you_mean(nearest(value, choices))
        wanted = f"must be one of {', '.join(repr(choice) for choice in choices)}"
        return f"{_display(loc)}: {wanted} (got {shown})" + (f".{hint}" if hint else "")
    if kind in {"float_type", "int_type"} and isinstance(value, str) and re.fullmatch(r"[-+0-9.eE_]+", value):
        wanted += "; remove the quotes"
    return f"{_display(loc)}: {wanted} (got {shown})"


def _unknown(job: type[Job], loc: Key) -> str:
    fields = _fields(job, loc[:-1])
    name = str(loc[-1])
    near = nearest(name, fields)
    if len(loc) == 1:
        hint = f" Did you mean {_header(job, near)}?" if near else _elsewhere(job, name)
        return f"unknown section [{_cut(name)}]." + hint
    return f"unknown key '{_cut(name)}' in {_header(job, loc[0])}." + (_did_you_mean(near) or _elsewhere(job, name))


def _elsewhere(job: type[Job], name: str) -> str:
    homes = [section for section in job.model_fields if name in _fields(job, (section,))]
    return f" It belongs in {_header(job, homes[0])}." if homes else ""


def _fields(job: type[Job], loc: Key) -> list[str]:
    model: Any = job
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        model = get_args(annotation)[0] if get_args(annotation) else annotation
        if not hasattr(model, "model_fields"):
            return []
    return list(model.model_fields)


def _required(job: type[Job], section: str) -> str:
    fields = job.model_fields[section].annotation
    model: Any = get_args(fields)[0] if get_args(fields) else fields
    names = [name for name, field in model.model_fields.items() if field.is_required()]
    return f"it needs {', '.join(repr(name) for name in names)}"


def _header(job: type[Job], section: str | int) -> str:
    field = job.model_fields.get(str(section))
    return f"[[{section}]]" if field is not None and get_args(field.annotation) else f"[{section}]"


def _display(key: Key) -> str:
    return _cut(".".join(str(part) for part in key))


def _cut(text: str) -> str:
    """What somebody wrote, cut: it may be as long as the file."""
    return text if len(text) <= 100 else text[:100] + "…"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of the names that is most like this one, if any is."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def _did_you_mean(name: str | None) -> str:
    return f" Did you mean '{name}'?" if name else ""
