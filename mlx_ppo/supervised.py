"""The loop that `sft`, `reward` and `dpo` share: epochs of batches, validation, best weights, resume."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.adapted import Among
from mlx_ppo.compute.cpu import threads
from mlx_ppo.compute.engine import Engine
from mlx_ppo.config.sections import RunSection
from mlx_ppo.config.supervised import DPOConfig, RewardConfig, SFTConfig
from mlx_ppo.data.random import mx_key, philox
from mlx_ppo.errors import ProcessLost, RunError
from mlx_ppo.models.adapters import HEAD, Weights, adapter_config
from mlx_ppo.parallel import Work, share_of, sharing
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.checkpoint import Checkpoint
from mlx_ppo.runs.folder import METRICS, Run
from mlx_ppo.runtime.group import ALONE, Group
from mlx_ppo.runtime.signals import Interrupted, Interrupts
from mlx_ppo.stages import orders
from mlx_ppo.stages.optimizer import Optimizer
from mlx_ppo.stages.records import number

Batch = TypeVar("Batch")
_LOSS = "loss"  # beside the names of weights, which have a dot


class StepReporter(Protocol):
    """What a person sees of a supervised job."""

    def message(self, text: str) -> None:
        """One line of information or warning."""

    def step(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """An optimizer step is done."""


@dataclass(frozen=True)
class Task(Generic[Batch]):
    """What differs between the jobs.

    `batches` must give the same list for the same epoch, and `sizes` the tokens of each piece of a batch that can be
    computed by itself; `loss` is what some of the pieces add to the mean over the whole batch; `validate` returns
    named figures, of which the one called "loss" is to be as low as possible. The processes of `group` each compute
    some of the pieces, and take the same steps. `prepare` is asked by all of them before each step, with the weights
    as they are then, for the batch that the loss will see.
    """

    engine: Engine
    batches: Callable[[int], Sequence[Batch]]
    sizes: Callable[[Batch], Sequence[int]]
    loss: Callable[[Weights, Batch, Sequence[int], mx.array], mx.array]
    validate: Callable[[Weights], dict[str, float]]
    group: Group = ALONE
    prepare: Callable[[Weights, Batch], Batch] | None = None


@dataclass(frozen=True)
class Earlier:
    """What came before in a run that trains several models one after the other, the members of an ensemble."""

    members: int = 0
    steps: int = 0
    epochs: int = 0
    finished: Mapping[str, mx.array] = field(default_factory=dict)  # their weights: `<number from 0>/<name>`

    def weights(self, member: int) -> dict[str, mx.array]:
        """Those of a member that is finished."""
        start = f"{member}/"
        return {name.removeprefix(start): array for name, array in self.finished.items() if name.startswith(start)}

    def then(self, steps: int, epochs: int, weights: Weights) -> "Earlier":
        """With one more member, trained for so many steps and epochs."""
        own = {f"{self.members}/{name}": array for name, array in weights.arrays.items()}
        return Earlier(self.members + 1, self.steps + steps, self.epochs + epochs, {**self.finished, **own})


@dataclass
class Fit:
    """Everything that training changes."""

    weights: Weights
    optimizer: Optimizer
    epoch: int = 0
    done: int = 0  # batches of this epoch
    loss: float = 0.0  # summed over them
    best: dict[str, mx.array] = field(default_factory=dict)
    best_value: float = float("inf")
    best_epoch: int = 0
    earlier: Earlier = Earlier()

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.earlier.steps + self.optimizer.steps

    def as_checkpoint(self, blocks: int) -> Checkpoint:
        """The state as files."""
        own = {name: array for name, array in self.weights.arrays.items() if not name.startswith(HEAD)}
        head = {name: array for name, array in self.weights.arrays.items() if name.startswith(HEAD)}
        arrays = {"adapters": own, "head": head, "optimizer": self.optimizer.state(), "best": self.best}
        arrays["finished"] = dict(self.earlier.finished)
        value = self.best_value if np.isfinite(self.best_value) else None
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "done": self.done,
            "loss": self.loss,
            "best_value": value,
            "best_epoch": self.best_epoch,
        }
        if self.earlier.members:
            state |= {"members": self.earlier.members, "earlier": [self.earlier.steps, self.earlier.epochs]}
        document = {"adapter_config.json": adapter_config(self.weights, blocks)}
        return Checkpoint(self.steps, {n: a for n, a in arrays.items() if a}, state, document)

    def restore(self, saved: Checkpoint) -> None:
        """Go back to a checkpoint of the same configuration."""
        arrays = {**saved.arrays["adapters"], **saved.arrays.get("head", {})}
        if not checkpoint.alike(arrays, self.weights.arrays):
            raise RunError("the checkpoint has other weights than this configuration; nothing was loaded")
        self.weights = self.weights.holding({name: arrays[name] for name in self.weights.arrays})
        self.optimizer.load(dict(saved.arrays.get("optimizer", {})), saved.step - self.earlier.steps)
        self.best = dict(saved.arrays.get("best", {}))
        value = saved.state["best_value"]
        self.best_value = float("inf") if value is None else value
        self.epoch, self.done, self.loss = (saved.state[name] for name in ("epoch", "done", "loss"))
        self.best_epoch = saved.state["best_epoch"]


def earlier_in(saved: Checkpoint | None) -> Earlier:
    """The members that were finished before what a checkpoint is about."""
    if saved is None or not saved.state.get("members"):
        return Earlier()
    steps, epochs = saved.state["earlier"]
    return Earlier(saved.state["members"], steps, epochs, dict(saved.arrays["finished"]))


class Course(NamedTuple):
    """How long to train, and what is kept of it."""

    section: RunSection
    epochs: int
    patience: int  # epochs without a better criterion after which training ends; 0: never
    blocks: int  # of the trunk, for the checkpoints' description
    validated: bool  # the criterion is taken on held-out data
    members: int = 1  # that are trained so, one after the other


class Noise(NamedTuple):
    """Dropout of a pass whose gradient is taken, see `Trunk.noise`."""

    share: float
    key: mx.array
    among: Among | None = None


def noise_of(share: float, key: mx.array, lengths: Sequence[int], own: Sequence[int]) -> Noise:
    """Dropout for some rows of a batch, all of which have these lengths in tokens."""
    whole = len(own) == len(lengths)
    return Noise(share, key, None if whole else Among(mx.array(list(own)), (len(lengths), max(lengths))))


def fit(
    task: Task[Batch],
    state: Fit,
    run: Run | None,
    reporter: StepReporter,
    interrupts: Interrupts,
    course: Course,
) -> Weights:
    """Train for some epochs and return the best weights by the criterion; resumes from the run's last checkpoint.

    Args:
        task: what is trained.
        state: of the training; it is changed.
        run: where it is kept; None in a process that follows another one's run.
        reporter: told what happens.
        interrupts: asked before every step.
        course: how long.
    Raises:
        RunError: a loss or gradient is not finite; the last checkpoint stands.
        Interrupted: a signal came; the state is saved.
        ProcessLost: another process is gone; the state is saved.
    """
    return _Fitting(task, state, run, reporter, interrupts, course).run_through()


@dataclass(frozen=True)
class _Fitting(Generic[Batch]):
    """A training whose model and data are loaded."""

    task: Task[Batch]
    state: Fit
    run: Run | None
    reporter: StepReporter
    interrupts: Interrupts
    course: Course

    def run_through(self) -> Weights:
        """All epochs that are left; the best weights."""
        state, epochs, patience = self.state, self.course.epochs, self.course.patience
        self._start()
        total = self.course.members * epochs * len(self.task.batches(0))
        while state.epoch < epochs and not (patience and state.epoch - state.best_epoch > patience):
            batches = self.task.batches(state.epoch)
            try:
                self._steps(batches, total)
                figures = self.task.validate(state.weights)
            except (Interrupted, ProcessLost):  # where all steps of the epoch are done, its end is still to come
                self._save()
                raise
            self._close_epoch(len(batches), figures)
            self._save()
        return state.weights.holding(state.best or state.weights.arrays)

    def _start(self) -> None:
        """Resume from the last checkpoint if there is one."""
        if not self.course.validated and not self.state.earlier.members:
            self.reporter.message("without data.validation, what is called validation is measured on training data")
        saved = orders.shared(self.task.group, checkpoint.newest(self.run.folder) if self.run is not None else None)
        if saved is not None and saved.state.get("members", 0) == self.state.earlier.members:
            self.state.restore(saved)
            self.reporter.message(f"resuming after step {self.state.steps}")
        if self.run is not None:
            self.run.cut_logs(self.state.steps)

    def _steps(self, batches: Sequence[Batch], total: int) -> None:
        """Those that are left of an epoch."""
        state, section = self.state, self.course.section
        while state.done < len(batches):
            self.interrupts.check()
            loss = _step(self.task, state, batches[state.done], section.seed)
            state.done, state.loss = state.done + 1, state.loss + loss
            self.reporter.step(state.steps, total, {"loss": loss})
            if state.optimizer.steps % section.save_every == 0 and state.done < len(batches):
                self._save()

    def _close_epoch(self, batches: int, figures: Mapping[str, float]) -> None:
        state, value = self.state, figures["loss"]
        epoch = state.earlier.epochs + state.epoch + 1
        row = {"step": state.steps, "epoch": epoch, "loss": state.loss / batches}
        state.epoch, state.done, state.loss = state.epoch + 1, 0, 0.0
        if value < state.best_value:
            state.best, state.best_value, state.best_epoch = dict(state.weights.arrays), value, state.epoch
        row = {**row, **{f"validation_{name}": figure for name, figure in figures.items()}}
        if self.run is not None:
            self.run.log(METRICS, [row])
        shown = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if name not in ("step", "epoch"))
        best = "  (best)" if value == state.best_value and self.course.validated else ""
        self.reporter.message(f"{_epoch(state, self.course)}{shown}{best}")

    def _save(self) -> None:
        if self.run is not None:
            state, keep_last = self.state.as_checkpoint(self.course.blocks), self.course.section.keep_last
            self.run.secure()
            checkpoint.save(self.run.folder, state, keep_last=keep_last, best=None)


def _epoch(state: Fit, course: Course) -> str:
    member = f"member {state.earlier.members + 1} of {course.members}, " if course.members > 1 else ""
    return f"{member}epoch {state.epoch} of {course.epochs}: "


def _step(task: Task[Batch], state: Fit, batch: Batch, seed: int) -> float:
    key, arrays = mx_key(seed, "noise", state.optimizer.steps), dict(state.weights.arrays)
    own = task.group.deal(task.sizes(batch))[task.group.rank]
    given = task.prepare(state.weights, batch) if task.prepare is not None else batch

    def loss_of(arrays: Mapping[str, mx.array]) -> mx.array:
        return task.loss(state.weights.holding(arrays), given, own, key)

    if own:
        loss, gradients = mx.value_and_grad(loss_of)(arrays)
    else:  # there are more processes than pieces
        loss, gradients = mx.zeros(()), {name: mx.zeros_like(array) for name, array in arrays.items()}
    mx.eval(loss, gradients)
    if task.group.size > 1:
        gradients = {_LOSS: loss, **gradients}
        gradients = task.group.total(gradients)
        loss = gradients.pop(_LOSS)
    value = number(loss)
    if not np.isfinite(value):
        raise RunError(f"the loss is not finite at step {state.steps + 1}; the update was not applied")
    state.weights, _ = state.optimizer.step(task.engine, state.weights, gradients, what="model")
    return value


@contextmanager
def shared_run(
    config: SFTConfig | RewardConfig | DPOConfig, run: Run, work: Work, reporter: StepReporter
) -> Iterator[Group]:
    """The processes that share a run, led by this one, for the length of a `with` block.

    Raises:
        ProcessLost: one doesn't come.
        ConfigError: there is no memory for them, or another machine has other inputs.
    """
    share = share_of(config, run, work)
    if share.processes > 1:
        reporter.message(f"{share.processes} processes share every step, each with a copy of the model")
    with threads.choosing(share.threads), sharing(config, share.processes, run.folder) as group:
        if group.size > 1:
            group.told(share._asdict())
        yield group


def drop_tokens(rows: Sequence[Sequence[int]], share: float, vocabulary: int, *parts: int | str) -> list[list[int]]:
    """Input rows in which a share of the tokens (never the first) is replaced by random ones."""
    if not share:
        return [list(row) for row in rows]
    generator = philox("token dropout", *parts)
    noisy: list[list[int]] = []
    for row in rows:
        replaced = generator.random(len(row)) < share
        replaced[0] = False
        other = generator.integers(0, vocabulary, len(row))
        noisy.append(np.where(replaced, other, np.array(row)).tolist())
    return noisy
