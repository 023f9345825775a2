"""Starting and resuming jobs: configuration, run folder, signals, and what is shown at the end."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from mlx_ppo.cli import PROGRAM
from mlx_ppo.cli.work import Order, stopped, work, worth_keeping
from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import Job, TrainConfig
from mlx_ppo.config.supervised import RewardConfig, SFTConfig
from mlx_ppo.errors import DamageError
from mlx_ppo.runs.folder import Run, create_run, open_config
from mlx_ppo.runs.relocation import relocate
from mlx_ppo.runtime.signals import Interrupted, catching_interrupts


def train(path: Path, overrides: Sequence[str], *, dry_run: bool, hosts: Path | None, rank: int | None) -> None:
    """Train, or follow the machine that does where a file of hosts says so."""
    from mlx_ppo.runtime.hosts import placed

    if hosts is not None:
        overrides = [*overrides, f"parallel.hosts={json.dumps(os.path.abspath(hosts))}"]
    config = read_config(TrainConfig, path, overrides)
    place = placed(config.parallel.hosts, rank)
    if dry_run or place is None or place.rank == 0:
        start(TrainConfig, path, overrides, dry_run=dry_run)
        return
    from mlx_ppo.following import follow_far
    from mlx_ppo.runtime.allocator import keeping_buffers

    click.echo(f"following {place.hosts[0][0]} as {place.hosts[place.rank][0]}, rank {place.rank}")
    with keeping_buffers():
        follow_far(config, place)
    click.echo(f"done: {place.hosts[0][0]} has the run")


def start(job: type[Job], path: Path, overrides: Sequence[str], *, dry_run: bool) -> None:
    """Read the configuration, make a run folder, and do the job in it; or only look, with `dry_run`."""
    config = read_config(job, path, overrides)
    if dry_run:
        dry(config)
        return
    assert isinstance(config, TrainConfig | SFTConfig | RewardConfig)
    with _new_run(config) as folder:
        _work(config, Order(str(folder)))


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
        if folder is None or not worth_keeping(folder):
            if folder is not None and folder.exists() and folder.stat().st_ino == identity:  # still this run's
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # somebody else's run may be in there by now
                for place in made:
                    place.rmdir()
        raise


def resume(folder: Path, overrides: Sequence[str] = (), *, allow_config_change: bool) -> None:
    """Go on with a run; refused when its data or models have changed since, or, unless allowed, its configuration.

    `overrides`: `section.key=path`, where inputs are now.
    """
    if overrides:
        open_config(folder)  # says what is wrong with the folder
        with Run(folder) as run:
            relocate(run, overrides)
    _work(open_config(folder), Order(str(folder), resumed=True, allow_config_change=allow_config_change))


def verify(folder: Path) -> None:
    """Compare everything in a run folder, and everything it was made from, with what was recorded."""
    from mlx_ppo.runs.verification import verify_run

    found = verify_run(folder)
    for note in found.notes:
        click.echo(f"note: {note}")
    if found.problems:
        raise DamageError(found.problems)
    click.echo(f"everything is as recorded ({found.files} files)")


def _work(config: Job, order: Order) -> None:
    """Do a run's work and print what is to be said at its end: in a child process where this one is the command's."""
    if click.get_current_context().obj is PROGRAM:
        from mlx_ppo.cli.supervise import supervise

        finish = supervise(order, retries=config.memory.retries if isinstance(config, TrainConfig) else 0)
    else:
        finish = _here(order)
    for line in finish:
        click.echo(line)


def _here(order: Order) -> list[str]:
    from mlx_ppo.cli.display import Display

    with catching_interrupts() as interrupts, Display() as display:
        try:
            return work(order, display, interrupts)
        except Interrupted as stop:
            display.close()
            raise stopped(str(stop), stop.exit_code, Path(order.folder)) from None


def dry(config: Job) -> None:
    """Check models and data without training, and print what the data looks like in tokens."""
    from mlx_ppo.cli.display import Display

    with Display() as display:
        if isinstance(config, TrainConfig):
            from mlx_ppo.memory.starting import budget_of, new_plan, said
            from mlx_ppo.models.roles import Loading, load_roles
            from mlx_ppo.prompting import load_data, tokenizer_of

            data, held_out = load_data(config, tokenizer_of(config), display)
            prompts = (*data.prompts, *held_out)
            plan, _, processes = new_plan(config, [len(prompt.tokens) for prompt in prompts], budget_of(config))
            click.echo(said(plan, processes))
            choices = plan.choices
            roles, _, _ = load_roles(config, Loading(compact=choices.compact, evict=choices.evict))
            try:
                longest = max(len(prompt.tokens) for prompt in prompts) + config.rollout.max_tokens
                _remark(roles.remarks(longest))
                roles.require_fields([prompt.record for prompt in prompts])
            finally:
                roles.close()
            _statistics("training prompts", [len(prompt.tokens) for prompt in data.prompts])
            _statistics("evaluation prompts", [len(prompt.tokens) for prompt in held_out])
            responses = config.rollout.prompts * config.rollout.samples_per_prompt
            click.echo(
                f"an iteration: {responses} responses of at most {config.rollout.max_tokens} tokens, "
                f"{config.ppo.epochs * config.ppo.minibatches} optimizer steps"
            )
        elif isinstance(config, SFTConfig):
            from mlx_ppo import sft
            from mlx_ppo.supervised import load_trainable, require_room

            trunk = load_trainable(config.model, config.run.seed)
            _remark(trunk.remarks)
            train, validation = sft.load_data(config, trunk.tokenizer, display)
            lengths = [len(example.tokens) for example in train.examples]
            require_room(trunk, config.model, config.lora, lengths, config.sft.batch_size)
            _statistics("training examples", lengths)
            if validation is not None:
                _statistics("validation examples", [len(example.tokens) for example in validation.examples])
        elif isinstance(config, RewardConfig):
            from mlx_ppo import reward_training
            from mlx_ppo.supervised import load_trainable, require_room

            trunk = load_trainable(config.model, config.run.seed)
            _remark(trunk.remarks)
            sets = reward_training.load_data(config, trunk.tokenizer, display)
            lengths = [len(text) for text in sets[0].texts]
            section = config.reward_training
            require_room(trunk, config.model, config.lora, lengths, section.batch_size, members=section.members)
            for name, feedback in zip(("training", "validation", "test"), sets, strict=True):
                if feedback is not None:
                    _statistics(f"{name} texts", [len(text) for text in feedback.texts])
    click.echo("dry run: everything is in order; nothing was trained")


def _remark(lines: list[str]) -> None:
    for line in lines:
        click.echo(line)


def _statistics(name: str, lengths: Sequence[int]) -> None:
    import numpy as np

    tokens = np.array(lengths)
    click.echo(
        f"{name}: {len(tokens)}, {tokens.sum()} tokens; each {tokens.min()} to {tokens.max()}, "
        f"median {np.median(tokens):.0f}, 95 % up to {np.percentile(tokens, 95):.0f}"
    )
