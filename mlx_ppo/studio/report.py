"""A run as one HTML file that needs nothing else: the panels of the page, their data, scripts and styles inside it."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mlx_ppo.errors import ConfigError, RunError
from mlx_ppo.runs.folder import replace_file
from mlx_ppo.studio.runs import BUCKETS, TEXTS, RunReader, page_document
from mlx_ppo.studio.texts import LONGEST

LARGEST = 1_000_000  # bytes of a report
_STATIC = Path(__file__).with_name("static")
_CHART = "uplot/uPlot.iife.min.js"
_SCRIPTS = ("dom.js", "charts.js", "panels.js", "report.js")  # each imports those before it only
_STYLES = ("style.css", "uplot/uPlot.min.css", "panels.css")
_IMPORT = re.compile(r"^import .*;\n", re.MULTILINE)
_EXPORT = re.compile(r"^export ", re.MULTILINE)
_LICENCE = "uplot/LICENSE"


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one or several runs; returns its path.

    Args:
        runs: folders, drawn over each other where they are several; a run may still be going.
        output: a new file; by default `NAME-report.html` in the working folder.
    Raises:
        ConfigError: a folder isn't a run, or the file is there already.
        RunError: the file can't be written, or the runs can't be shown together.
    """
    output = output if output is not None else Path(f"{Path(os.path.realpath(runs[0])).name}-report.html")
    if output.exists() or output.is_symlink():
        raise ConfigError(f"{output}: already there; name another file with --output")
    readers = [RunReader(run) for run in runs]
    for reader in readers:
        reader.update()
    replace_file(output, report(readers))
    return output


def report(readers: Sequence[RunReader]) -> str:
    """The HTML of a report below `LARGEST` bytes: with fewer points and texts where there would be too many.

    Raises:
        RunError: the runs are too many, or can't be shown together.
    """
    share = 1.0
    while share > 0.001:
        each = share / len(readers)
        page = page_document(
            readers, buckets=max(4, int(BUCKETS * each)), texts=int(TEXTS * each), longest=int(LONGEST * share**0.5)
        )
        text = _html(page)
        if len(text.encode()) < LARGEST:
            return text
        share *= 0.7
    raise RunError(f"{len(readers)} runs are more than one report can hold; name fewer")


def _html(page: dict[str, Any]) -> str:
    chart, script, style = _read(_CHART), _module(), "\n".join(map(_read, _STYLES))
    policy = (
        f"default-src 'none'; script-src {_hash(chart)} {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    title = escape(", ".join(run["name"] for run in page["runs"]))
    # "<" is the only character that could end the element; JSON has an escape for it
    data = json.dumps(page, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
<!-- uPlot, which draws the figures:
{_read(_LICENCE)}-->
<style>{style}</style>
</head>
<body>
<main id="main"><noscript>This page needs JavaScript.</noscript></main>
<script type="application/json" id="data">{data}</script>
<script>{chart}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def _module() -> str:
    """The scripts as one that imports nothing, which a file may not."""
    return "\n".join(_EXPORT.sub("", _IMPORT.sub("", _read(name))) for name in _SCRIPTS)


def _read(name: str) -> str:
    return (_STATIC / name).read_text("utf-8")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
