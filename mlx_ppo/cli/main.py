"""The commands: parse, call one function, print."""

import os
import sys
from pathlib import Path
from typing import Any

import click

import mlx_ppo
from mlx_ppo.errors import UserError

_SET = click.option(
    "overrides",
    "--set",
    metavar="SECTION.KEY=VALUE",
    multiple=True,
    help="Change a key of the configuration, e.g. --set ppo.epochs=4. May be given several times.",
)
_DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Check the configuration, read the data, print token statistics, train nothing."
)
_FILE = click.Path(path_type=Path)


class _Commands(click.Group):
    """Turns the errors that a user can cause into lines and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            for line in str(error).splitlines():
                click.echo(f"error: {line}" if not line.startswith(" ") else line, err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(mlx_ppo.__version__, prog_name="mlx-ppo")
def main() -> None:
    """PPO from human feedback for language models, entirely offline, on this machine.

    \b
    mlx-ppo train            train the bundled example
    mlx-ppo init my-project  copy it, to start from
    """
    os.umask(0o077)


@main.command()
@click.argument("directory", type=_FILE)
def init(directory: Path) -> None:
    """Make a folder with configurations, data and the bundled model, ready to edit.

    \b
    Example: mlx-ppo init my-project
    """
    from mlx_ppo.bundle import copy_example

    config = copy_example(directory)
    click.echo(f"{directory} is ready. Next: mlx-ppo train {config}")


@main.command()
@click.argument("config", type=_FILE, required=False)
@_SET
@_DRY_RUN
def train(config: Path | None, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Train a policy with PPO or a critic-free estimator; without CONFIG, the bundled example.

    \b
    Examples:
      mlx-ppo train
      mlx-ppo train configs/reviews.toml --set run.seed=1 --set ppo.advantage=rloo \\
          --set rollout.samples_per_prompt=4
    """
    from mlx_ppo.bundle import example_config
    from mlx_ppo.cli import jobs
    from mlx_ppo.config import TrainConfig

    own = config is None
    jobs.start(TrainConfig, config or example_config(), overrides, dry_run=dry_run, runs_here=own)


@main.command()
@click.argument("config", type=_FILE)
@_SET
@_DRY_RUN
def sft(config: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Supervised fine-tuning on texts, prompts with completions, or chats.

    \b
    Example: mlx-ppo sft configs/reviews-sft.toml
    """
    from mlx_ppo.cli import jobs
    from mlx_ppo.config import SFTConfig

    jobs.start(SFTConfig, config, overrides, dry_run=dry_run)


@main.command()
@click.argument("config", type=_FILE)
@_SET
@_DRY_RUN
def reward(config: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Train a reward model on human preferences or ratings.

    \b
    Example: mlx-ppo reward configs/reviews-reward.toml
    """
    from mlx_ppo.cli import jobs
    from mlx_ppo.config import RewardConfig

    jobs.start(RewardConfig, config, overrides, dry_run=dry_run)


@main.command()
@click.argument("run", type=_FILE)
def resume(run: Path) -> None:
    """Go on with a run from its last checkpoint.

    \b
    Example: mlx-ppo resume runs/reviews
    """
    from mlx_ppo.cli import jobs

    jobs.resume(run)


@main.command()
@click.argument("model", type=_FILE)
@click.option("--prompt", "prompts", multiple=True, help="A prompt; may be given several times.")
@click.option("--prompts", "file", type=_FILE, help="A JSONL file of prompts.")
@click.option("--count", type=click.IntRange(1), default=4, show_default=True, help="Prompts taken from a file.")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Completions a prompt.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Longest completion.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=1.0, show_default=True, help="0: the most probable token."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def sample(model: Path, prompts: tuple[str, ...], file: Path | None, count: int, **options: Any) -> None:
    """Write completions with MODEL: a run, a model folder, or a checkpoint of a run.

    \b
    Examples:
      mlx-ppo sample runs/reviews
      mlx-ppo sample models/reviews --prompt "The film is" --samples 3
    """
    from mlx_ppo.cli import look

    look.sample(model, prompts, file, count, **options)


@main.command()
@click.argument("first", type=_FILE)
@click.argument("second", type=_FILE)
@click.option("--prompts", "file", type=_FILE, help="JSONL of prompts; by default those of a run's evaluations.")
@click.option("--reward", type=_FILE, help="Reward model that judges; by default that of a run.")
@click.option("--count", type=click.IntRange(2), default=128, show_default=True, help="Prompts taken.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def compare(first: Path, second: Path, **options: Any) -> None:
    """How often SECOND's completions win over FIRST's under a reward model, with a confidence interval.

    \b
    Example: mlx-ppo compare models/reviews runs/reviews
    """
    from mlx_ppo.cli import look

    look.compare(first, second, **options)
