"""`frontier`: how near a run's policy is to the best one that its penalty allows."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from mlx_ppo.cli.options import Number, Place
from mlx_ppo.errors import ConfigError, printable

_FILE = Place()


@click.command()
@click.argument("run", type=_FILE)
@click.option("--samples", type=click.IntRange(2, 65_536), default=128, show_default=True, help="For each prompt.")
@click.option("--prompts", type=click.IntRange(2), default=48, show_default=True, help="Evaluation prompts taken.")
@click.option("--coef", type=Number(0, min_open=True), help="Penalty; default: the run's own, kl.coef.")
@click.option("--policy", type=_FILE, help="Measure this one instead: a run of dpo or sft, another run, a folder.")
@click.option("--picture", type=_FILE, help="Draw the curves into this new SVG file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def frontier(run: Path, picture: Path | None, as_json: bool, **given: Any) -> None:
    """How near the policy of RUN is to the best one that its KL penalty allows.

    Samples the reference and the policy (RUN, or one checkpoint of it) for held-out prompts, and compares the policy
    with best-of-n and with the optimum: the reference tilted by exp(score / kl.coef). Keeps what it found in the
    run's folder, for its page and report; not with --policy, which measures another policy of the same model by
    this run's prompts, scores and penalty.

    \b
    Examples:
      mlx-ppo frontier runs/reviews
      mlx-ppo frontier runs/reviews --samples 512 --picture reviews.svg
    """
    if picture is not None and (picture.exists() or picture.is_symlink()):
        raise ConfigError(f"{picture}: already there; name another file with --picture")
    if picture is not None and not picture.parent.is_dir():
        raise ConfigError(f"--picture: the folder {picture.parent} isn't there; make it, or name another file")
    from mlx_ppo.frontier import Question, measured
    from mlx_ppo.runs.folder import replace_file
    from mlx_ppo.studio.frontier import drawing, table

    found = measured(run, Question(**given), _Told())
    if picture is not None:
        replace_file(picture, drawing(found))
    if as_json:
        click.echo(json.dumps(found, indent=2, allow_nan=False))
        return
    for line in table(found):
        click.echo(printable(line))


class _Told:
    """Says what it hears on standard error; how far it is only to a terminal."""

    def __init__(self) -> None:
        self._share = 0.0

    def message(self, text: str) -> None:
        click.echo(printable(text), err=True)

    def done(self, share: float) -> None:
        self._share += share
        if sys.stderr.isatty():
            click.echo(f"\rsampling {self._share:4.0%}" + "\n" * (self._share > 1 - 1e-9), nl=False, err=True)
