"""Errors that a user can cause, each with the exit code that the command line ends with.

Every message is one line that says where, what is wrong, and the mend. The command line prints it without a traceback.
"""

from collections.abc import Sequence


class UserError(Exception):
    """Base of every error that is shown as one clear line; never raised itself."""

    exit_code = 4


class ConfigError(UserError):
    """The configuration is wrong. Carries every problem found, one line each."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        """Keep the problems; a single string counts as one."""
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """A data file is wrong; the message starts with `file:line:`."""

    exit_code = 3


class ModelError(UserError):
    """A model folder, tokenizer, adapter or weight file is wrong."""

    exit_code = 3


class RunError(UserError):
    """The run itself failed: non-finite numbers, a reward function, a locked or damaged run folder."""

    exit_code = 4


class DamageError(RunError):
    """A run isn't as it was recorded. Carries every problem found, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        """Keep the problems."""
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))
