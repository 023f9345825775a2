"""Errors that a user can cause, each with the exit code that the command line ends with.

Every message is one line that says where, what is wrong, and the mend. The command line prints it without a traceback.
"""

from collections.abc import Sequence
from unicodedata import category

_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """The text on one line, with escapes for whatever a terminal would act on or can't show."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def harmless(text: str) -> str:
    """A text from a model or a file for a terminal or a page: nothing that moves, colours, reorders or hides."""
    return "".join(repr(c)[1:-1] if _acts(c) else c for c in text)


def _acts(character: str) -> bool:
    return character not in "\n\t" and (category(character) in ("Cc", "Cs") or character in _REORDERING)


class UserError(Exception):
    """Base of every error that is shown as one clear line; never raised itself."""

    exit_code = 4


class _OneLine(UserError):
    """An error of one line, whatever the names and the content in it hold."""

    def __init__(self, message: str) -> None:
        """Keep the message, made printable."""
        super().__init__(printable(message))


class ConfigError(UserError):
    """The configuration is wrong. Carries every problem found, one line each."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        """Keep the problems; a single string counts as one."""
        given = (problems,) if isinstance(problems, str) else problems
        self.problems: tuple[str, ...] = tuple(printable(problem) for problem in given)
        super().__init__("\n".join(self.problems))


class DataError(_OneLine):
    """A data file is wrong; the message starts with `file:line:`."""

    exit_code = 3


class ModelError(_OneLine):
    """A model folder, tokenizer, adapter or weight file is wrong."""

    exit_code = 3


class RunError(UserError):
    """The run itself failed: non-finite numbers, a reward function, a locked or damaged run folder."""

    exit_code = 4


class ProcessLost(RunError):
    """A process that shares a run ended, hangs, or can't be reached."""


class JudgeLost(RunError):
    """A judge in another process can't be reached, or hardly any of its answers can be used."""


class UnhealthyError(_OneLine):
    """A health rule that is set to "stop" or "best" has ended the run; it is saved."""

    exit_code = 5


class DamageError(RunError):
    """A run isn't as it was recorded. Carries every problem found, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        """Keep the problems."""
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))
