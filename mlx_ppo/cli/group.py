"""The group of commands: an error that a user can cause becomes a line and an exit code."""

import os
import sys
from typing import Any

import click

from mlx_ppo.cli import PROGRAM
from mlx_ppo.errors import ConfigError, DamageError, RunError, UserError, printable
from mlx_ppo.runtime.device_errors import device_failure
from mlx_ppo.runtime.offline import NetworkRefused, refuse_connections


class Commands(click.Group):
    """Turns the errors that a user can cause into lines and exit codes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called as a program, which has this process to itself; `main.main` serves a caller that goes on living."""
        refuse_connections()
        return self.main(*args, obj=PROGRAM, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Do what a command line asks for; what goes wrong ends in a line and an exit code."""
        try:
            return super().invoke(ctx)
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
        except KeyboardInterrupt:  # outside the jobs, which save first
            ctx.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except OSError as error:  # what the system refuses where nobody expected it, such as a name that is too long
            place = "" if error.filename is None else f"{error.filename}: "
            click.echo(printable(f"error: {place}{error.strerror or error}"), err=True)
            ctx.exit(UserError.exit_code)
