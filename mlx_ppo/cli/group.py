"""The group of commands: an error that a user can cause becomes a line and an exit code."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from mlx_ppo.cli import PROGRAM
from mlx_ppo.errors import ConfigError, DamageError, RunError, UserError, printable
from mlx_ppo.runtime.device_errors import device_failure
from mlx_ppo.runtime.offline import NetworkRefused, refuse_connections

_SENTENCE = 200  # letters, longer than any


@contextmanager
def _printable_usage() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        raise click.UsageError(printable(error.format_message()), ctx=error.ctx) from None


def _news() -> list[str]:
    threads = sys.modules.get("mlx_ppo.compute.cpu.threads")
    return list(threads.news()) if threads is not None else []


def _refused(error: OSError) -> click.exceptions.Exit:
    """Say what the system refused; what ends the command."""
    place = "" if error.filename is None else f"{error.filename}: "
    click.echo(printable(f"error: {place}{error.strerror or error}"), err=True)
    return click.exceptions.Exit(UserError.exit_code)


class Commands(click.Group):
    """Turns the errors that a user can cause into lines and exit codes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called as a program, which has this process to itself; `main.main` serves a caller that goes on living."""
        refuse_connections()
        return self.main(*args, obj=PROGRAM, **kwargs)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands with whole sentences, where click cuts them at the line's end."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.get_short_help_str(_SENTENCE)) for name, each in commands.items() if each])

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Click's own; what it says of a command line shows the characters that a terminal would act on."""
        try:
            with _printable_usage():
                return super().make_context(*args, **kwargs)
        except OSError as error:  # where --help is written
            if error.errno == errno.EPIPE:
                raise
            raise _refused(error) from None

    def _invoke_and_tell(self, ctx: click.Context) -> Any:
        """Do it, and say at the end what other programs have changed, where anything was computed in this process."""
        _news()  # of an earlier command in this process
        found = super().invoke(ctx)
        for line in _news():
            click.echo(line, err=True)
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Do what a command line asks for; what goes wrong ends in a line and an exit code."""
        try:
            with _printable_usage():
                return self._invoke_and_tell(ctx)
        except UserError as error:
            # as many problems as lines; elsewhere one, and what belongs to it
            each = isinstance(error, ConfigError | DamageError)
            for number, line in enumerate(str(error).split("\n")):
                click.echo(printable(f"error: {line}" if each or number == 0 else line), err=True)
            ctx.exit(error.exit_code)
        except NetworkRefused as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(RunError.exit_code)
        except RuntimeError as error:
            failure = device_failure(error)
            if failure is None:
                raise
            click.echo(printable(f"error: {failure.cause}; {failure.remedy}"), err=True)
            ctx.exit(RunError.exit_code)
        except MemoryError as error:
            said = f" ({error})" if str(error) else ""
            click.echo(printable(f"error: there isn't enough memory for this{said}; ask for less at once"), err=True)
            ctx.exit(RunError.exit_code)
        except KeyboardInterrupt:  # outside the jobs, which save first
            ctx.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except OSError as error:  # what the system refuses where nobody expected it, such as a name that is too long
            raise _refused(error) from None
