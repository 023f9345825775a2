"""The loop that `sft` and `reward` share: epochs of batches, validation, best weights, resume."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.adapted import dimensions, layer_of
from mlx_ppo.compute.engine import Engine
from mlx_ppo.config.sections import LoraSection, RunSection
from mlx_ppo.config.supervised import TrainableModelSection
from mlx_ppo.data.random import mx_key, philox
from mlx_ppo.errors import ConfigError, RunError
from mlx_ppo.memory.budget import default_budget
from mlx_ppo.memory.plan import GIB
from mlx_ppo.models.adapters import HEAD, Weights, adapter_config
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.models.write import write_adapters, write_model
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.checkpoint import Checkpoint
from mlx_ppo.runs.folder import METRICS, Run
from mlx_ppo.runtime.signals import Interrupted, Interrupts
from mlx_ppo.stages.optimizer import Optimizer
from mlx_ppo.stages.records import number

Batch = TypeVar("Batch")
_COPIES = 4  # of trained weights: they, their gradient, two moments


class StepReporter(Protocol):
    """What a person sees of a supervised job."""

    def message(self, text: str) -> None:
        """One line of information or warning."""

    def step(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """An optimizer step is done."""


@dataclass(frozen=True)
class Task(Generic[Batch]):
    """What differs between the jobs.

    `batches` must give the same list for the same epoch; `loss` is a mean over the batch; `validate` returns
    named figures, of which the one called "loss" is to be as low as possible.
    """

    engine: Engine
    batches: Callable[[int], Sequence[Batch]]
    loss: Callable[[Weights, Batch, mx.array], mx.array]
    validate: Callable[[Weights], dict[str, float]]


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


def earlier_in(run: Run) -> Earlier:
    """The members that were finished before what a run's last checkpoint is about."""
    saved = checkpoint.newest(run.folder)
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


def fit(
    task: Task[Batch],
    state: Fit,
    run: Run,
    reporter: StepReporter,
    interrupts: Interrupts,
    course: Course,
) -> Weights:
    """Train for some epochs and return the best weights by the criterion; resumes from the run's last checkpoint.

    Raises:
        RunError: a loss or gradient is not finite; the last checkpoint stands.
        Interrupted: a signal came; the state is saved.
    """

    def save() -> None:
        run.secure()
        checkpoint.save(run.folder, state.as_checkpoint(course.blocks), keep_last=section.keep_last, best=None)

    section, epochs, patience = course.section, course.epochs, course.patience
    saved = checkpoint.newest(run.folder)
    if saved is not None and saved.state.get("members", 0) == state.earlier.members:
        state.restore(saved)
        reporter.message(f"resuming after step {state.steps}")
    del saved  # its weights would stay in memory beside the trained ones
    run.cut_logs(state.steps)
    total = course.members * epochs * len(task.batches(0))
    while state.epoch < epochs and not (patience and state.epoch - state.best_epoch > patience):
        batches = task.batches(state.epoch)
        while state.done < len(batches):
            try:
                interrupts.check()
            except Interrupted:
                save()
                raise
            loss = _step(task, state, batches[state.done], section.seed)
            state.done, state.loss = state.done + 1, state.loss + loss
            reporter.step(state.steps, total, {"loss": loss})
            if state.optimizer.steps % section.save_every == 0 and state.done < len(batches):
                save()
        mean = state.loss / len(batches)
        state.epoch, state.done, state.loss = state.epoch + 1, 0, 0.0
        figures = task.validate(state.weights)
        value = figures["loss"]
        if value < state.best_value:
            state.best, state.best_value, state.best_epoch = dict(state.weights.arrays), value, state.epoch
        shown = {"loss": mean, **{f"validation_{name}": figure for name, figure in figures.items()}}
        run.log(METRICS, [{"step": state.steps, "epoch": state.earlier.epochs + state.epoch, **shown}])
        best = "  (best)" if value == state.best_value and course.validated else ""
        reporter.message(_epoch(state, course) + "  ".join(f"{name} {v:.4f}" for name, v in shown.items()) + best)
        save()
    return state.weights.holding(state.best or state.weights.arrays)


def _epoch(state: Fit, course: Course) -> str:
    member = f"member {state.earlier.members + 1} of {course.members}, " if course.members > 1 else ""
    return f"{member}epoch {state.epoch} of {course.epochs}: "


def _step(task: Task[Batch], state: Fit, batch: Batch, seed: int) -> float:
    key = mx_key(seed, "noise", state.optimizer.steps)

    def loss_of(arrays: Mapping[str, mx.array]) -> mx.array:
        return task.loss(state.weights.holding(arrays), batch, key)

    loss, gradients = mx.value_and_grad(loss_of)(dict(state.weights.arrays))
    mx.eval(loss, gradients)
    value = number(loss)
    if not np.isfinite(value):
        raise RunError(f"the loss is not finite at step {state.steps + 1}; the update was not applied")
    state.weights, _ = state.optimizer.step(task.engine, state.weights, gradients, what="model")
    return value


def load_trainable(model: TrainableModelSection, seed: int) -> Trunk:
    """The model that a job trains: the folder's weights, or random ones.

    Raises:
        ModelError: whatever is wrong with the folder.
    """
    random_seed = seed if model.initialise == "random" else None
    return load_trunk(model.path, dtype=model.dtype, random_seed=random_seed, embeddings=model.embeddings)


def require_room(
    trunk: Trunk, model: TrainableModelSection, lora: LoraSection, texts: Sequence[int], rows: int, *, members: int = 1
) -> None:
    """Refuse, before memory is taken, what can't fit by its mere sizes; a plan, as `train` makes one, would say more.

    Args:
        trunk: what is trained.
        model: how.
        lora: with which adapters.
        texts: tokens of each.
        rows: texts of an optimizer step.
        members: of an ensemble, whose adapters are all kept.
    Raises:
        ConfigError: says what takes how much, and which key to lower.
    """
    room, depth = default_budget(), trunk.blocks
    chosen = [name for name in trunk.adapted if not lora.targets or layer_of(name)[1] in lora.targets]
    sizes = [sum(dimensions(trunk.adapted[name])) for name in chosen]
    copies = 4 * (_COPIES + members - 1)
    adapters = copies * lora.rank * sum(sizes) * (lora.layers or depth) // depth if model.train == "lora" else 0
    kept = 4 * trunk.width * depth * sum(sorted(texts)[-rows:])
    for need, what, key in (
        (adapters, f"adapters of rank {lora.rank}, their gradient and optimizer state", "lora.rank"),
        (kept, f"the states of {min(rows, len(texts))} texts, one a block,", "batch_size or data.max_tokens"),
    ):
        if need > room:
            raise ConfigError(
                f"{key}: {what} take {need / GIB:.1f} GiB, more than the {room / GIB:.1f} that may be used; lower {key}"
            )


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


def write_result(folder: Path, trunk: Trunk, weights: Weights, model: TrainableModelSection) -> Path:
    """The finished weights as a folder that stock mlx-lm loads: `model`, or `adapters` for LoRA."""
    if model.train == "full":
        return write_model(folder / "model", Path(trunk.name), trunk, weights, dtype=model.save_dtype)
    return write_adapters(folder / "adapters", weights, trunk.blocks)
