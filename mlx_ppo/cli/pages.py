"""The commands that show things in a browser."""

from pathlib import Path

import click

from mlx_ppo.cli.options import NO_BROWSER, PORT, Place
from mlx_ppo.errors import printable

_FILE = Place()


@click.command()
@click.argument("folder", type=_FILE, default=Path())
@PORT
@NO_BROWSER
def studio(folder: Path, port: int, no_browser: bool) -> None:
    """Open the local page of a project's FOLDER: label, train, watch and compare by clicks.

    Serves on the loopback address only, under a secret that is part of the address it prints. Ctrl-C ends the page;
    jobs that it started go on.

    \b
    Examples:
      mlx-ppo studio
      mlx-ppo studio my-project --port 8080 --no-browser
    """
    _open(folder, "/", port, show=not no_browser)


@click.command()
@click.argument("folder", type=_FILE, default=Path())
@PORT
@NO_BROWSER
def label(folder: Path, port: int, no_browser: bool) -> None:
    """Open the page that asks which of two completions is better, one key each, for a project's FOLDER.

    \b
    Example: mlx-ppo label my-project
    """
    _open(folder, "/label", port, show=not no_browser)


def _open(folder: Path, path: str, port: int, *, show: bool) -> None:
    from mlx_ppo.studio.open import open_page

    new = not folder.exists()

    def say(address: str) -> None:
        click.echo(address)
        if new:
            click.echo(f"note: {printable(str(folder))} is a new, empty project", err=True)

    open_page(folder, path, port=port, show=show, say=say)


@click.command()
@click.argument("runs", metavar="RUN...", type=_FILE, nargs=-1, required=True)
@PORT
@NO_BROWSER
def watch(runs: tuple[Path, ...], port: int, no_browser: bool) -> None:
    """Open the live page of a run, or of several over each other: figures, health, completions.

    Serves on the loopback address only, under a secret that is part of the address it prints. Ctrl-C ends the page, not
    the runs.

    \b
    Examples:
      mlx-ppo watch runs/reviews
      mlx-ppo watch runs/reviews runs/reviews-2 --no-browser
    """
    from mlx_ppo.studio.watch import open_runs

    open_runs(runs, port=port, show=not no_browser, say=click.echo)


@click.command()
@click.argument("runs", metavar="RUN...", type=_FILE, nargs=-1, required=True)
@click.option("--output", type=_FILE, help="A new file; default: NAME-report.html in this folder.")
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """Write what the page of a run shows, or of several over each other, into one HTML file.

    It is below 1 MB, needs nothing beside it, asks for nothing on any network, and can be made while the run goes on.

    \b
    Examples:
      mlx-ppo report runs/reviews
      mlx-ppo report runs/reviews runs/reviews-2 --output both.html
    """
    from mlx_ppo.studio.report import write_report

    click.echo(write_report(runs, output))
