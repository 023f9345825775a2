"""Starting and resuming jobs: configuration, run folder, signals, and what is shown at the end."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import numpy as np

from mlx_ppo import checkpoint
from mlx_ppo.cli.display import Display
from mlx_ppo.config import Job, TrainConfig
from mlx_ppo.config_file import read_config
from mlx_ppo.config_supervised import RewardConfig, SFTConfig
from mlx_ppo.errors import DamageError
from mlx_ppo.runs import METRICS, Run, create_run, open_config
from mlx_ppo.runtime.allocator import keeping_buffers
from mlx_ppo.runtime.signals import Interrupted, Interrupts, catching_interrupts
from mlx_ppo.verification import require_as_recorded, verify_run


def start(job: type[Job], path: Path, overrides: Sequence[str], *, dry_run: bool) -> None:
    """Read the configuration, make a run folder, and do the job in it; or only look, with `dry_run`."""
    config = read_config(job, path, overrides)
    if dry_run:
        dry(config)
        return
    assert isinstance(config, TrainConfig | SFTConfig | RewardConfig)
    with _new_run(config) as folder, Run(folder) as run:
        _work(config, run)


@contextmanager
def _new_run(config: TrainConfig | SFTConfig | RewardConfig) -> Iterator[Path]:
    """A fresh run folder, removed with the folders made for it where the job fails before there is anything to keep."""
    base = config.run.folder
    made = [place for place in (base, *base.parents) if not place.exists()]
    folder, identity = None, 0
    try:
        folder = create_run(config, base, config.run.name)
        identity = folder.stat().st_ino
        yield folder
    except BaseException:
        if folder is None or not (checkpoint.steps(folder) or (folder / METRICS).exists()):
            if folder is not None and folder.exists() and folder.stat().st_ino == identity:  # still this run's
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # somebody else's run may be in there by now
                for place in made:
                    place.rmdir()
        raise


def resume(folder: Path, *, allow_config_change: bool) -> None:
    """Go on with a run; refused when its data or models have changed since, or, unless allowed, its configuration."""
    config = open_config(folder)
    with Run(folder) as run:
        for line in require_as_recorded(config, run, allow_config_change=allow_config_change):
            click.echo(line, err=True)
        _work(config, run)


def verify(folder: Path) -> None:
    """Compare everything in a run folder, and everything it was made from, with what was recorded."""
    found = verify_run(folder)
    for note in found.notes:
        click.echo(f"note: {note}")
    if found.problems:
        raise DamageError(found.problems)
    click.echo(f"everything is as recorded ({found.files} files)")


def _work(config: Job, run: Run) -> None:
    click.echo(f"run folder: {_short(run.folder)}")
    with catching_interrupts() as interrupts, Display() as display, keeping_buffers():
        try:
            finish = _do(config, run, display, interrupts)
        except Interrupted as stop:
            display.close()
            click.echo(f"stopped by {stop}; saved. Go on with: mlx-ppo resume {_short(run.folder)}", err=True)
            raise SystemExit(stop.exit_code) from None
    for line in finish:
        click.echo(line)


def _do(config: Job, run: Run, display: Display, interrupts: Interrupts) -> list[str]:
    if isinstance(config, SFTConfig):
        from mlx_ppo.sft import finetune

        folder = finetune(config, run, display, interrupts)
        return [f"finished: {_short(folder)}"]
    if isinstance(config, RewardConfig):
        from mlx_ppo.reward_training import train_reward_model

        folder = train_reward_model(config, run, display, interrupts)
        return [f'finished: {_short(folder)}  (give it to train as [[reward]] kind = "model", path)']
    assert isinstance(config, TrainConfig)
    from mlx_ppo.train import train

    result = train(config, run, display, interrupts)
    display.before_and_after(result.before, result.after)
    return [
        f"policy: {_short(result.checkpoint)}",
        f"try it: mlx-ppo sample {_short(run.folder)}",
        f"   or:  mlx_lm.generate --model {_short(config.model.path)} --adapter-path {_short(result.checkpoint)} "
        "--temp 1 --prompt '...'",
    ]


def dry(config: Job) -> None:
    """Check models and data without training, and print what the data looks like in tokens."""
    with Display() as display:
        if isinstance(config, TrainConfig):
            from mlx_ppo.networks.roles import load_roles
            from mlx_ppo.train import load_data

            roles, _, _ = load_roles(config)
            roles.close()
            _remark(roles.trunk.remark)
            data, held_out = load_data(config, roles.trunk.tokenizer, display)
            _statistics("training prompts", [len(prompt.tokens) for prompt in data.prompts])
            _statistics("evaluation prompts", [len(prompt.tokens) for prompt in held_out])
            responses = config.rollout.prompts * config.rollout.samples_per_prompt
            click.echo(
                f"an iteration: {responses} responses of at most {config.rollout.max_tokens} tokens, "
                f"{config.ppo.epochs * config.ppo.minibatches} optimizer steps"
            )
        elif isinstance(config, SFTConfig):
            from mlx_ppo import sft
            from mlx_ppo.supervised import load_trainable

            trunk = load_trainable(config.model, config.run.seed)
            _remark(trunk.remark)
            train, validation = sft.load_data(config, trunk.tokenizer, display)
            _statistics("training examples", [len(example.tokens) for example in train.examples])
            if validation is not None:
                _statistics("validation examples", [len(example.tokens) for example in validation.examples])
        elif isinstance(config, RewardConfig):
            from mlx_ppo import reward_training
            from mlx_ppo.supervised import load_trainable

            trunk = load_trainable(config.model, config.run.seed)
            _remark(trunk.remark)
            sets = reward_training.load_data(config, trunk.tokenizer, display)
            for name, feedback in zip(("training", "validation", "test"), sets, strict=True):
                if feedback is not None:
                    _statistics(f"{name} texts", [len(text) for text in feedback.texts])
    click.echo("dry run: everything is in order; nothing was trained")


def _remark(text: str) -> None:
    if text:
        click.echo(text)


def _statistics(name: str, lengths: Sequence[int]) -> None:
    tokens = np.array(lengths)
    click.echo(
        f"{name}: {len(tokens)}, {tokens.sum()} tokens; each {tokens.min()} to {tokens.max()}, "
        f"median {np.median(tokens):.0f}, 95 % up to {np.percentile(tokens, 95):.0f}"
    )


def _short(path: Path) -> Path:
    """A path as seen from the working folder, where that is shorter."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
