"""Starting and resuming jobs: configuration, run folder, signals, and what is shown at the end."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from mlx_ppo.cli import PROGRAM
from mlx_ppo.cli.work import Order, stopped, work, worth_keeping
from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import Job, TrainConfig
from mlx_ppo.config.supervised import AnyJob, DPOConfig, RewardConfig, SFTConfig
from mlx_ppo.errors import DamageError
from mlx_ppo.runs.folder import Run, create_run, open_config
from mlx_ppo.runs.relocation import relocate
from mlx_ppo.runtime.signals import Interrupted, catching_interrupts

if TYPE_CHECKING:
    from mlx_ppo.cli.display import Display
    from mlx_ppo.runtime.hosts import Place


class Options(NamedTuple):
    """What may be said of a job beside its configuration."""

    dry_run: bool
    hosts: Path | None  # a file of the machines that share the run
    rank: int | None  # of this one


def start(job: type[Job], path: Path, overrides: Sequence[str], options: Options) -> None:
    """Read the configuration, make a run folder, and do the job in it; or only look, with `dry_run`.

    Where a file of hosts says that another machine leads, follow it.
    """
    from mlx_ppo.runtime.hosts import placed

    if options.hosts is not None:
        overrides = [*overrides, f"parallel.hosts={json.dumps(os.path.abspath(options.hosts))}"]
    config = read_config(job, path, overrides)
    assert isinstance(config, AnyJob)
    place = placed(config.parallel.hosts, options.rank)
    if options.dry_run:
        dry(config)
    elif place is not None and place.rank:
        _follow(config, place)
    else:
        with _new_run(config) as folder:
            _work(config, Order(str(folder)))


def _follow(config: AnyJob, place: "Place") -> None:
    from mlx_ppo.following import follow_far
    from mlx_ppo.runtime.allocator import keeping_buffers

    click.echo(f"following {place.hosts[0][0]} as {place.hosts[place.rank][0]}, rank {place.rank}")
    with keeping_buffers():
        follow_far(config, place)
    click.echo(f"done: {place.hosts[0][0]} has the run")


@contextmanager
def _new_run(config: AnyJob) -> Iterator[Path]:
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

        assert isinstance(config, AnyJob)
        finish = supervise(order, retries=config.memory.retries, planned=isinstance(config, TrainConfig))
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
            _dry_train(config, display)
        else:
            assert isinstance(config, SFTConfig | RewardConfig | DPOConfig)
            _dry_supervised(config, display)
    click.echo("dry run: everything is in order; nothing was trained")


def _dry_train(config: TrainConfig, display: "Display") -> None:
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


def _dry_supervised(config: SFTConfig | RewardConfig | DPOConfig, display: "Display") -> None:
    from mlx_ppo import dpo, reward_feedback, sft
    from mlx_ppo.supervised_models import load_trainable, require_room

    trunk = load_trainable(config.model, config.run.seed)
    _remark(trunk.remarks)
    lengths: list[list[int] | None]
    rows, members = 0, 1
    if isinstance(config, SFTConfig):
        what, rows = "examples", config.sft.batch_size
        examples = sft.load_data(config, trunk.tokenizer, display)
        lengths = [[len(one.tokens) for one in part.examples] if part else None for part in examples]
    elif isinstance(config, DPOConfig):
        what, rows = "texts of pairs", 2 * config.dpo.batch_size
        if config.dpo.loss == "kto":
            what, rows = "answers", config.dpo.batch_size
        lengths = dpo.text_lengths(config, trunk.tokenizer, display)
    else:
        what, rows, members = "texts", config.reward_training.batch_size, config.reward_training.members
        sets = reward_feedback.load_data(config, trunk.tokenizer, display)
        lengths = [[len(text) for text in part.texts] if part else None for part in sets]
    require_room(trunk, config.model, config.lora, lengths[0] or [], rows, members=members)
    for name, found in zip(("training", "validation", "test"), lengths, strict=False):
        if found is not None:
            _statistics(f"{name} {what}", found)


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
