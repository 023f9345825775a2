"""The commands: parse, call one function, print."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import click

import mlx_ppo
from mlx_ppo.cli import evaluations, exchange, pages
from mlx_ppo.cli.agreement import agreement
from mlx_ppo.cli.data import data
from mlx_ppo.cli.frontier import frontier
from mlx_ppo.cli.group import Commands
from mlx_ppo.cli.options import (
    JUDGE,
    KEY_ENV,
    MAX_TOKENS,
    PROCESSES,
    SET,
    Number,
    Place,
    drawing,
    job_options,
    plan_sharing_options,
)
from mlx_ppo.cli.reward import reward
from mlx_ppo.errors import RunError

_FILE = Place()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(mlx_ppo.__version__, prog_name="mlx-ppo")
def main() -> None:
    """PPO from human feedback for language models, entirely offline, on this machine.

    \b
    mlx-ppo train            train the bundled example
    mlx-ppo init my-project  copy it, to start from
    mlx-ppo studio           label, train and compare by clicks
    """
    os.umask(0o077)
    try:
        os.getcwd()
    except OSError as error:
        raise RunError(f"the current folder can't be used ({error.strerror}); change to one that exists") from None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that can't show a character is no reason to stop
            stream.reconfigure(errors="backslashreplace")


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
@job_options
def train(config: Path | None, overrides: tuple[str, ...], **options: Any) -> None:
    """Train a policy with PPO or a critic-free estimator; without CONFIG, the bundled example.

    \b
    Examples:
      mlx-ppo train
      mlx-ppo train configs/reviews.toml --set run.seed=1 --set rollout.prompts=32
    """
    from mlx_ppo.bundle import example_config
    from mlx_ppo.cli import jobs
    from mlx_ppo.config.sections import TrainConfig

    if config is None:  # it may lie where nothing can be written, so runs go into the working folder
        config, overrides = example_config(), ("run.folder=runs", *overrides)
    jobs.start(TrainConfig, config, overrides, jobs.Options(**options))


@main.command()
@click.argument("config", type=_FILE)
@SET
@click.option("--memory-gb", type=Number(0, 1e6, min_open=True), help="Budget in GiB instead of the config's.")
@click.option("--model-config", type=_FILE, help="Plan for the model of this config.json, which needn't be here.")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), help="Plan for this kind of device; default: this one.")
@click.option("--measure", is_flag=True, help="Load the models and time two iterations: real peaks, tokens a second.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plan_sharing_options
def plan(config: Path, overrides: tuple[str, ...], **options: Any) -> None:
    """What a training run would need in memory, phase by phase, and what would fit.

    \b
    Examples:
      mlx-ppo plan configs/reviews.toml --memory-gb 1
      mlx-ppo plan my-ppo.toml --model-config llama-8b.json --device gpu --memory-gb 24
      mlx-ppo plan my-ppo.toml --hosts hosts.json --bandwidth 10
    """
    from mlx_ppo.cli import plan_sharing

    plan_sharing.plan(config, overrides, options)


@main.command()
@click.argument("target", type=_FILE, required=False)
@SET
@click.option("--prompt-tokens", type=click.IntRange(2), help="Length of the prompts; default: the config's longest.")
@click.option("--iterations", type=click.IntRange(1), default=3, show_default=True, help="Timed, after a first one.")
@click.option("--output", type=_FILE, help="Keep the result in this file.")
@click.option("--compare", "earlier", type=_FILE, help="Show what changed since a result that was kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(target: Path | None, overrides: tuple[str, ...], **options: Any) -> None:
    """How fast training is here, phase by phase; nothing is trained or changed.

    TARGET is a configuration, or a model folder: then with LoRA on the upper 8 layers, 16 prompts of 32 tokens and
    responses of 48. Without TARGET, the bundled example. --set changes any shape.

    \b
    Examples:
      mlx-ppo bench --output before.json
      mlx-ppo bench --compare before.json
      mlx-ppo bench my-model --set rollout.prompts=32 --set lora.layers=16 --prompt-tokens 64
    """
    from mlx_ppo.cli.bench import bench as measure

    measure(target, overrides, **options)


@main.command()
@click.argument("config", type=_FILE)
@job_options
def sft(config: Path, overrides: tuple[str, ...], **options: Any) -> None:
    """Supervised fine-tuning on texts, prompts with completions, or chats.

    \b
    Example: mlx-ppo sft configs/reviews-sft.toml
    """
    from mlx_ppo.cli import jobs
    from mlx_ppo.config.supervised import SFTConfig

    jobs.start(SFTConfig, config, overrides, jobs.Options(**options))


@main.command()
@click.argument("config", type=_FILE)
@job_options
def dpo(config: Path, overrides: tuple[str, ...], **options: Any) -> None:
    """Direct preference optimization: learn from preferences without a reward model.

    With dpo.loss = "kto", from answers that people found good or bad one by one. The reference is the model as it
    begins. docs/evaluation.md has a configuration.

    \b
    Example: mlx-ppo dpo my-dpo.toml
    """
    from mlx_ppo.cli import jobs
    from mlx_ppo.config.supervised import DPOConfig

    jobs.start(DPOConfig, config, overrides, jobs.Options(**options))


@main.command()
@click.argument("run", type=_FILE)
@click.option(
    "--allow-config-change",
    is_flag=True,
    help="Go on although the run's config.toml or a reward function was edited since the start.",
)
@click.option(
    "overrides",
    "--set",
    metavar="SECTION.KEY=PATH",
    multiple=True,
    help="Where an input is now that was moved, e.g. --set model.path=~/models/m. May be given several times.",
)
def resume(run: Path, allow_config_change: bool, overrides: tuple[str, ...]) -> None:
    """Go on with a run from its last checkpoint.

    \b
    Examples:
      mlx-ppo resume runs/reviews
      mlx-ppo resume runs/reviews --set model.path=models/reviews
    """
    from mlx_ppo.cli import jobs

    jobs.resume(run, overrides, allow_config_change=allow_config_change)


@main.command()
@click.argument("run", type=_FILE)
def verify(run: Path) -> None:
    """Check every file of a run, and every file it was made from, against what was recorded.

    Reads checkpoints, finished folders, logs, config.toml, and the models, data and reward code that the run started
    with. Names every file that differs, is missing, or doesn't belong, and ends with exit code 4 if there is one.

    \b
    Example: mlx-ppo verify runs/reviews
    """
    from mlx_ppo.cli import jobs

    jobs.verify(run)


@main.command()
@click.argument("model", type=_FILE)
@click.option("--prompt", "prompts", multiple=True, help="A prompt; may be given several times.")
@click.option("--prompts", "file", type=_FILE, help="A JSONL file of prompts.")
@click.option("--count", type=click.IntRange(1), default=4, show_default=True, help="Prompts taken from a file.")
@click.option("--samples", type=click.IntRange(1, 100_000), default=1, show_default=True, help="Completions a prompt.")
@MAX_TOKENS
@drawing
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@PROCESSES
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
@click.option(
    "--reward",
    metavar="FOLDER|FILE.py:NAME|rule:NAME",
    help="Judge; by default the run's reward model or rule.",
)
@JUDGE
@KEY_ENV
@click.option("--criterion", help="What it is asked; by default which is the better one.")
@click.option("--count", type=click.IntRange(2), default=128, show_default=True, help="Prompts taken.")
@MAX_TOKENS
@drawing
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@PROCESSES
def compare(first: Path, second: Path, **options: Any) -> None:
    """How often SECOND's completions win over FIRST's, with a confidence interval.

    By a reward model, a reward function, or a model that is asked; with both, how often they agree as well.

    \b
    Examples:
      mlx-ppo compare models/reviews runs/reviews
      mlx-ppo compare models/reviews runs/reviews --judge smollm2-135m --criterion "Which is kinder?"
    """
    from mlx_ppo.cli import look

    look.compare(first, second, **options)


@main.command()
@click.option(
    "--offline-proof",
    is_flag=True,
    help="Train the bundled example a little where the system gives no network (unshare, sandbox-exec).",
)
@click.option("--acceptance", is_flag=True, help="Try what the program promises: types, memory, kills, a long run.")
@click.option(
    "--minutes",
    type=click.FloatRange(0, 15, min_open=True),
    help="Length of the long run of --acceptance, which takes four times that, or 20 minutes, at most. [default: 15]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(offline_proof: bool, acceptance: bool, minutes: float | None, as_json: bool) -> None:
    """What this machine is, and whether mlx-ppo works well on it and keeps to itself.

    \b
    Examples:
      mlx-ppo doctor
      mlx-ppo doctor --offline-proof
      mlx-ppo doctor --acceptance --minutes 1
    """
    if acceptance:
        from mlx_ppo.cli.acceptance import accept

        accept(minutes=15.0 if minutes is None else minutes, as_json=as_json)
        return
    if minutes is not None:
        raise click.UsageError("--minutes goes with --acceptance")
    from mlx_ppo.cli.doctor import examine

    examine(offline_proof=offline_proof, as_json=as_json)


for command in (
    *evaluations.COMMANDS,
    agreement,
    reward,
    data,
    exchange.export,
    exchange.import_,
    exchange.merge,
    frontier,
    pages.studio,
    pages.label,
    pages.watch,
    pages.report,
):
    main.add_command(command)
