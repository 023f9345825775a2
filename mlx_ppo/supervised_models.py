"""What supervised jobs load, what it will need, and what they write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_ppo.compute.adapted import count_of, dimensions, layer_of
from mlx_ppo.config.sections import LoraSection
from mlx_ppo.config.supervised import DPOConfig, SFTConfig, TrainableModelSection
from mlx_ppo.errors import ConfigError
from mlx_ppo.memory.budget import default_budget
from mlx_ppo.memory.plan import GIB, RUNTIME
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.models.write import write_adapters, write_model
from mlx_ppo.parallel import Work
from mlx_ppo.reporting import Silent
from mlx_ppo.runs.folder import Run
from mlx_ppo.runtime.group import Group
from mlx_ppo.runtime.signals import Interrupts
from mlx_ppo.supervised import Course, Fit, StepReporter, Task, fit, shared_run

_PASSES = 6  # multiplications for each parameter and token: forward two, backward four
_COPIES = 4  # of trained weights: they, their gradient, two moments


class PolicyJob(Protocol):
    """A job whose result is a policy, with model and data loaded."""

    trunk: Trunk
    state: Fit
    course: Course
    work: Work

    def task(self, group: Group) -> Task[Any]:
        """What is trained, by the processes of a group."""


def train_policy(
    job: PolicyJob, config: SFTConfig | DPOConfig, run: Run, reporter: StepReporter, interrupts: Interrupts
) -> Path:
    """Train, and write the finished model or adapters; returns their folder.

    Raises:
        UserError: what went wrong.
    """
    with shared_run(config, run, job.work, reporter) as group:
        best = fit(job.task(group), job.state, run, reporter, interrupts, job.course)
    run.secure()
    result = write_result(run.folder, job.trunk, best, config.model)
    run.note_files(result)
    return result


def follow_policy(job: PolicyJob, group: Group) -> None:
    """Do the same steps as the process that leads, on this one's part of each batch.

    Raises:
        UserError: as the leader's.
    """
    fit(job.task(group), job.state, None, Silent(), Interrupts(), job.course)


def work_of(trunk: Trunk, weights: Weights, lengths: Sequence[int], epochs: int, pieces: int, kept: int) -> Work:
    """What a supervised job has to do.

    Args:
        trunk: what is trained.
        weights: those that change.
        lengths: tokens of each text.
        epochs: passes over them.
        pieces: of an optimizer step.
        kept: bytes of its states.
    """
    parameters = count_of(trunk.base.values())
    fixed = sum(array.nbytes for array in trunk.base.values())
    fixed += _COPIES * sum(array.nbytes for array in weights.arrays.values())
    return Work(_PASSES * parameters * sum(lengths) * epochs, pieces, parameters, RUNTIME + fixed, kept)


def load_trainable(model: TrainableModelSection, seed: int) -> Trunk:
    """The model that a job trains: the folder's weights, or random ones.

    Raises:
        ModelError: whatever is wrong with the folder.
    """
    random_seed = seed if model.initialise == "random" else None
    return load_trunk(model.path, dtype=model.dtype, random_seed=random_seed, embeddings=model.embeddings)


def require_room(
    trunk: Trunk, model: TrainableModelSection, lora: LoraSection, texts: Sequence[int], rows: int, *, members: int = 1
) -> int:
    """Refuse, before memory is taken, what can't fit by its mere sizes; a plan, as `train` makes one, would say more.

    Args:
        trunk: what is trained.
        model: how.
        lora: with which adapters.
        texts: tokens of each.
        rows: texts of an optimizer step.
        members: of an ensemble, whose adapters are all kept.
    Returns:
        Bytes of the states of such a step's texts.
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
    return kept


def write_result(folder: Path, trunk: Trunk, weights: Weights, model: TrainableModelSection) -> Path:
    """The finished weights as a folder that stock mlx-lm loads: `model`, or `adapters` for LoRA."""
    if model.train == "full":
        return write_model(folder / "model", Path(trunk.name), trunk, weights, dtype=model.save_dtype)
    return write_adapters(folder / "adapters", weights, trunk.blocks)
