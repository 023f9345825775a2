"""`evaluate`: tasks of lm-evaluation-harness before and after training."""

import json
import logging
import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_ppo.cli.best_of import new_file
from mlx_ppo.errors import ConfigError, printable
from mlx_ppo.runs.targets import Target, load_target, start_of

if TYPE_CHECKING:
    from mlx_ppo.harness import Figure, How, Result


def evaluate(model: Path, given: Mapping[str, Any]) -> None:
    """Print what a model reaches in tasks and, of a run, what it began from reaches.

    Args:
        model: a run, a checkpoint or a model folder.
        given: the options, by name.
    Raises:
        ConfigError: lm_eval isn't installed, there is no such task, or the output can't be written.
        DataError: a task can't be read, or its data aren't on this machine.
    """
    names = tuple(dict.fromkeys(filter(None, re.split(r"[,\s]+", given["tasks"]))))
    if not names:
        raise ConfigError("--tasks: names none")
    include, output, base = given["include"], given["output"], given["base"]
    if include is not None and not include.is_dir():
        raise ConfigError(f"--include: {include} isn't a folder")
    if find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness isn't installed: pip install lm_eval (or 'mlx-ppo[evaluation]')")
    with new_file(output) as file:
        after = load_target(model)
        before = _before(after, base)
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from mlx_ppo.harness import How

        chat = after.trunk.tokenizer.has_chat_template and not given["plain"]
        how = How(names, include, given["limit"], given["shots"], chat)
        document = {
            "model": str(model),
            "base": None if before is None else str(base or before.trunk.name),
            "chat_template": chat,
            "limit": given["limit"],
            "lm_eval": version("lm_eval"),
            "tasks": _measured(before, after, how),
        }
        text = json.dumps(document, indent=2)
        file.write(text + "\n")
    if given["as_json"]:
        click.echo(text)
    else:
        _print(document)


def _before(after: Target, base: Path | None) -> Target | None:
    """What is measured beside: what was named or, of a run, what it began from."""
    if base is not None:
        return load_target(base)
    return start_of(after) if after.config is not None else None


def _measured(before: Target | None, after: Target, how: "How") -> dict[str, Any]:
    """Every task's figures; None: there is nothing beside."""
    from mlx_ppo.harness import measure

    found: dict[str, dict[str, Result]] = {}
    for word, target in (("before", before), ("after", after)):
        if target is not None:
            found[word], cut = measure(target, how)
            if cut:
                said = (
                    f"warning: {word}: {cut} questions are longer than the model's positions and lost their beginning"
                )
                click.echo(said, err=True)
    first = found.get("before")
    return {name: _row(None if first is None else first[name], result) for name, result in found["after"].items()}


def _row(before: "Result | None", after: "Result") -> dict[str, Any]:
    figures = {}
    for name, found in after.figures.items():
        row: dict[str, Any] = {"after": found.value, "after_error": found.error}
        if before is not None:
            own = before.figures[name]
            row |= {"before": own.value, "before_error": own.error, "difference": found.value - own.value}
            row["difference_error"] = _error(own, found)
        figures[name] = {key: _known(value) for key, value in row.items()}
    return {"documents": after.documents, "shots": after.shots, "figures": figures}


def _error(before: "Figure", after: "Figure") -> float | None:
    """Of the difference, from the same documents; None where the figure isn't a mean of theirs."""
    from mlx_ppo.harness import paired_error

    if before.of_each is None or after.of_each is None:
        return None
    return paired_error(before.of_each, after.of_each)


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _print(document: dict[str, Any]) -> None:
    asked = "in the model's chat template" if document["chat_template"] else "as plain text"
    beside = "" if document["base"] is None else f" beside {document['base']}"
    click.echo(printable(f"{document['model']}{beside}: lm_eval {document['lm_eval']}, asked {asked}"))
    columns = ("after",) if document["base"] is None else ("before", "after", "difference")
    rows = [("task", "metric", *(("value",) if len(columns) == 1 else columns))]
    for name, result in document["tasks"].items():
        counted = "" if result["documents"] is None else f" ({result['documents']}, {result['shots']} shots)"
        for metric, figures in result["figures"].items():
            rows.append((name + counted, metric, *(_shown(figures, column) for column in columns)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            text.ljust(width) if at < 2 else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo(printable("  ".join(cells).rstrip()))
    click.echo("after ±: one standard error" + (", of a difference by the same documents" if len(columns) > 1 else ""))


def _shown(figures: dict[str, Any], column: str) -> str:
    value, error = figures[column], figures[f"{column}_error"]
    if value is None:
        return "not finite"
    shown = f"{value:+.4f}" if column == "difference" else f"{value:.4f}"
    return shown if error is None else f"{shown} ± {error:.4f}"
