"""`reward`: a reward model, or an ensemble of them."""

from pathlib import Path

import click

from mlx_ppo.cli.options import DRY_RUN, SET, Place


@click.command()
@click.argument("config", type=Place())
@SET
@DRY_RUN
@click.option(
    "--ensemble",
    metavar="N",
    type=click.IntRange(1, 100),
    help="Train N models that differ by their seeds; the same as --set reward_training.members=N.",
)
def reward(config: Path, overrides: tuple[str, ...], dry_run: bool, ensemble: int | None) -> None:
    """Train a reward model on human preferences, rankings or ratings; or an ensemble, which knows when it is unsure.

    \b
    Examples:
      mlx-ppo reward configs/reviews-reward.toml
      mlx-ppo reward configs/reviews-reward.toml --ensemble 3
    """
    from mlx_ppo.cli import jobs
    from mlx_ppo.config.supervised import RewardConfig

    if ensemble is not None:
        overrides = (*overrides, f"reward_training.members={ensemble}")
    jobs.start(RewardConfig, config, overrides, dry_run=dry_run)
