"""Every `mlx-ppo ...` command line that the documents, the commands' help and the configurations print."""

import re
import shlex
from pathlib import Path

from click import Command, Context, Group

from mlx_ppo.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("models/**/README.md")])
REFUSED = "ppo.advantage="  # to be deleted with its uses once one key switches the estimator (issue 17, point 12)
_FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def commands() -> dict[str, Command]:
    """The commands by name."""
    assert isinstance(main, Group)
    return main.commands


def printed() -> list[tuple[str, str]]:
    """Where and what, without the program's own path; names alone (`mlx-ppo sft`) are mentions, not command lines."""
    found = []
    for file in DOCUMENTS:
        where, text = str(file.relative_to(ROOT)), file.read_text("utf-8")
        blocks = [block for _, block in _FENCED.findall(text)]
        inline = [span for span in _INLINE.findall(_FENCED.sub("", text)) if re.match(r"(\S*/)?mlx-ppo \S+ \S", span)]
        found += [(where, line) for part in (*blocks, *inline) for line in _lines(part)]
    for name, command in commands().items():
        examples = (command.help or "").partition("\b")[2]
        found += [(f"{name} --help", line) for line in _lines(examples)]
    for file in sorted(ROOT.glob("configs/*.toml")):
        comments = [
            line.removeprefix("# ") for line in file.read_text("utf-8").split("\n") if line.startswith("# First")
        ]
        found += [(str(file.relative_to(ROOT)), line) for part in comments for line in _lines(part)]
    return sorted(set(found))


def _lines(text: str) -> list[str]:
    lines = re.sub(r"\\\n\s*", "", text).split("\n")
    return [
        match[1].partition("  #")[0].strip() for line in lines if (match := re.search(r"\bmlx-ppo (\w[^&]*)", line))
    ]


def split(line: str) -> tuple[str, list[str]]:
    """A command's name and its arguments; optional ones lose their brackets."""
    name, *arguments = shlex.split(line)
    return name, [re.sub(r"^\[(.*)\]$", r"\1", argument) for argument in arguments]


def parsed(line: str) -> Context:
    """The arguments as click understands them.

    Raises:
        UsageError: it doesn't.
    """
    name, arguments = split(line)
    return commands()[name].make_context(name, arguments, parent=main.make_context("mlx-ppo", [name]))
