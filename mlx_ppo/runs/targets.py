"""What a person may name where a model is wanted: a model folder, a run, or one checkpoint of a run."""

import os
from dataclasses import dataclass
from pathlib import Path

from mlx_ppo.config.sections import Job, TrainConfig
from mlx_ppo.config.supervised import RewardConfig, SFTConfig
from mlx_ppo.errors import ModelError, RunError
from mlx_ppo.models.adapters import Weights, load_adapters
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.checkpoint import folder_of
from mlx_ppo.runs.folder import RECORD, open_config


@dataclass(frozen=True)
class Target:
    """A model to write with, and the configuration of the run that it comes from, if any."""

    trunk: Trunk
    weights: Weights
    config: Job | None


def load_target(path: Path) -> Target:
    """Load a model folder, the newest checkpoint of a `train` run (or the one named), or the result of an `sft` run.

    Raises:
        ModelError: there is nothing to write with.
    """
    path = Path(os.path.realpath(path))
    if (path / RECORD).is_file():
        return _of_run(path, None)
    if path.parent.name == "checkpoints" and (path.parent.parent / RECORD).is_file():
        return _of_run(path.parent.parent, path)
    return Target(load_trunk(path), Weights({}), None)


def _of_run(run: Path, chosen: Path | None) -> Target:
    config = open_config(run)
    if isinstance(config, RewardConfig):
        raise ModelError(f"{run}: a reward model gives scores, it doesn't write; name a policy")
    if isinstance(config, SFTConfig) and chosen is None:
        if (run / "model").is_dir():
            return Target(load_trunk(run / "model"), Weights({}), config)
        chosen = run / "adapters"
        if not chosen.is_dir():
            raise ModelError(f"{run}: not finished; go on with `mlx-ppo resume {run}`")
    assert isinstance(config, TrainConfig | SFTConfig)
    if chosen is None:
        chosen = folder_of(run, newest_step(run))
    trunk = load_trunk(config.model.path, dtype=config.model.dtype)
    return Target(trunk, trained_weights(chosen, trunk, full=config.model.train == "full"), config)


def newest_step(run: Path) -> int:
    """The step of the checkpoint that stands for a run: its newest, or the one that it has gone back to.

    Raises:
        ModelError: it has none.
    """
    steps = checkpoint.steps(run)
    if not steps:
        raise ModelError(f"{run}: has no checkpoint yet")
    back = checkpoint.chosen(run)
    return steps[-1] if back is None else back


def trained_weights(folder: Path, trunk: Trunk, *, full: bool) -> Weights:
    """The policy's weights in a checkpoint, or in a folder of adapters.

    Raises:
        ModelError, RunError: there is no such checkpoint, or it is damaged.
    """
    if folder.parent.name == "checkpoints":
        if not folder.is_dir():
            near = ", ".join(
                folder_of(folder.parent.parent, step).name for step in checkpoint.steps(folder.parent.parent)
            )
            raise ModelError(f"{folder}: no such checkpoint; there are: {near or 'none'}")
        damage = checkpoint.verify(folder)
        if damage:
            raise RunError(damage)
    if not full:
        return load_adapters(folder, trunk.adapted)
    if not folder.name.isdecimal():
        raise ModelError(f"{folder}: not a checkpoint")
    return Weights(checkpoint.load(folder.parent.parent, int(folder.name)).arrays["adapters"])
