"""What a person may name where a model is wanted: a model folder, a run, or one checkpoint of a run."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_ppo.config.rewards import RewardSource, ScoreSection
from mlx_ppo.config.sections import Job, TrainConfig
from mlx_ppo.config.supervised import WRITERS, RewardConfig, TrainableModelSection
from mlx_ppo.errors import ConfigError, ModelError, RunError
from mlx_ppo.models.adapters import Weights, load_adapters
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.peft import given_adapters
from mlx_ppo.models.roles import Loading, Roles, load_roles
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
    """Load a model folder, the newest checkpoint of a `train` run (or the one named), or the result of `sft` or `dpo`.

    Raises:
        ModelError: there is nothing to write with.
    """
    path = Path(os.path.realpath(path))
    run, chosen = parted(path)
    if run is None:
        return Target(load_trunk(path), Weights({}), None)
    return _of_run(run, chosen)


@dataclass(frozen=True)
class Scorable:
    """A policy and what scores it; `roles.reference` is what it began from."""

    roles: Roles  # without a critic; to be closed
    policy: Weights
    config: Job | None

    def close(self) -> None:
        """End the processes of reward functions and rules."""
        self.roles.close()

    @property
    def trained(self) -> bool:
        """Whether this is a run of `train`, whose policy left a reference."""
        return isinstance(self.config, TrainConfig)

    @property
    def target(self) -> Target:
        """What writes, alone."""
        return Target(self.roles.trunk, self.policy, self.config)


def load_scorable(path: Path, sources: Sequence[RewardSource] = ()) -> Scorable:
    """As `load_target`, with sources of scores: those given or, without, the run's own.

    Raises:
        ConfigError: there are none.
        ModelError: there is nothing to write with, or a source can't be loaded.
    """
    path = Path(os.path.realpath(path))
    run, chosen = parted(path)
    config = open_config(run) if run is not None else None
    if run is not None and isinstance(config, TrainConfig):
        if sources:
            config = config.model_copy(update={"reward": tuple(sources), "score": ScoreSection()})
        chosen = chosen or folder_of(run, newest_step(run))
        roles, _, _ = load_roles(config, Loading(critic=False))
        try:
            policy = trained_weights(chosen, roles.trunk, full=config.model.train == "full")
        except BaseException:
            roles.close()
            raise
        return Scorable(roles, policy, config)
    if not sources:
        raise ConfigError("--reward: say what scores; only a run of `train` has rewards of its own")
    target = load_target(path)
    roles = Roles(target.trunk, Weights({}), None)
    try:
        for source in sources:
            roles.add(source, target.config.model.dtype if isinstance(target.config, WRITERS) else "auto", Loading())
    except BaseException:
        roles.close()
        raise
    return Scorable(roles, target.weights, target.config)


def other_policy(path: Path, trunk: Trunk) -> Weights:
    """The weights on a trunk of a policy that was trained elsewhere, by `dpo`, `sft` or another run.

    Raises:
        ConfigError: it is of a model of another kind or size, or its adapters lie on other weights.
        ModelError: there is nothing to write with.
    """
    target = load_target(path)
    own, base = target.trunk.base, trunk.base
    if own.keys() != base.keys() or any(own[name].shape != array.shape for name, array in base.items()):
        raise ConfigError(f"{path}: a policy of another model than {trunk.name}; name one of the same")
    if all(mx.array_equal(own[name], array.astype(own[name].dtype)) for name, array in base.items()):
        return target.weights
    if any(name.endswith(".lora_a") for name in target.weights.arrays):
        raise ConfigError(f"{path}: its adapters lie on other weights than those of {trunk.name}; merge them first")
    return Weights({**own, **target.weights.arrays})


def start_of(target: Target) -> Target:
    """What the run of a target began from: its model folder, with the adapters from which it went on.

    Raises:
        ConfigError: the target is no run, or began from random weights.
        ModelError: the folder can't be loaded any more.
    """
    config = target.config
    if not isinstance(config, (TrainConfig, *WRITERS)):
        raise ConfigError("--base: name the model folder to compare with; only a run says what it began from")
    model, trunk = config.model, target.trunk
    if isinstance(model, TrainableModelSection) and model.initialise == "random":
        raise ConfigError("the run began from random weights, so that there is nothing to forget; name a --base")
    if trunk.name != str(model.path):
        trunk = load_trunk(model.path, dtype=model.dtype)
    weights = given_adapters(model.adapter, trunk.adapted) if model.adapter is not None else Weights({})
    return Target(trunk, weights, None)


def parted(path: Path) -> tuple[Path | None, Path | None]:
    """The run that is meant, and the checkpoint where one is named."""
    if (path / RECORD).is_file():
        return path, None
    if path.parent.name == "checkpoints" and (path.parent.parent / RECORD).is_file():
        return path.parent.parent, path
    return None, None


def _of_run(run: Path, chosen: Path | None) -> Target:
    config = open_config(run)
    if isinstance(config, RewardConfig):
        raise ModelError(f"{run}: a reward model gives scores, it doesn't write; name a policy")
    if isinstance(config, WRITERS) and chosen is None:
        if (run / "model").is_dir():
            return Target(load_trunk(run / "model"), Weights({}), config)
        chosen = run / "adapters"
        if not chosen.is_dir():
            raise ModelError(f"{run}: not finished; go on with `mlx-ppo resume {run}`")
    assert isinstance(config, (TrainConfig, *WRITERS))
    chosen = chosen or folder_of(run, newest_step(run))
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
