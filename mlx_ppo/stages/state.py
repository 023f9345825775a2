"""Everything that PPO training changes, and its form as a checkpoint."""

import math
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.kl import AdaptiveKL, FixedKL
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.errors import RunError
from mlx_ppo.models.adapters import Weights, adapter_config
from mlx_ppo.runs.checkpoint import Checkpoint, alike
from mlx_ppo.stages.optimizer import Learner, Optimizer


@dataclass
class State:
    """Everything that training changes; a checkpoint holds exactly this."""

    policy: Learner
    critic: Learner | None
    kl: AdaptiveKL | FixedKL
    iteration: int = 0
    cursor: int = 0  # prompts taken from the stream
    best: tuple[int, float] | None = None  # iteration and score of the best evaluation

    @property
    def moments(self) -> int:
        """Bytes of optimizer states."""
        learners = [self.policy, *([self.critic] if self.critic is not None else [])]
        return sum(array.nbytes for learner in learners for array in learner.optimizer.state().values())

    def as_checkpoint(self, blocks: int) -> Checkpoint:
        """The state as files; the policy's adapters in mlx-lm's own format."""
        arrays: dict[str, Any] = {
            "adapters": self.policy.weights.arrays,
            "optimizer_policy": self.policy.optimizer.state(),
        }
        steps = {"policy": self.policy.optimizer.steps}
        if self.critic is not None:
            arrays["critic"] = self.critic.weights.arrays
            arrays["optimizer_critic"] = self.critic.optimizer.state()
            steps["critic"] = self.critic.optimizer.steps
        return Checkpoint(
            self.iteration,
            {name: content for name, content in arrays.items() if content},
            {"cursor": self.cursor, "kl": self.kl.state(), "optimizer_steps": steps, "best": self.best},
            {"adapter_config.json": adapter_config(self.policy.weights, blocks)},
        )

    def kept(self, blocks: int) -> Checkpoint:
        """As `as_checkpoint`, of what the next update does not change."""
        saved = self.as_checkpoint(blocks)
        arrays = {
            file: {name: mx.array(np.array(array)) for name, array in each.items()} if "optimizer" in file else each
            for file, each in saved.arrays.items()
        }
        return replace(saved, arrays=arrays)

    def restore(self, saved: Checkpoint) -> None:
        """Go back to a checkpoint of the same configuration."""
        learners = {"policy": (self.policy, "adapters"), "critic": (self.critic, "critic")}
        for role, (learner, file) in learners.items():
            if learner is None:
                continue
            arrays = saved.arrays.get(file, {})
            if not alike(arrays, learner.weights.arrays):
                raise RunError(f"the checkpoint's {role} has other weights than this configuration; nothing was loaded")
            learner.weights = learner.weights.holding({name: arrays[name] for name in learner.weights.arrays})
            moments = saved.arrays.get(f"optimizer_{role}", {})
            learner.optimizer.load(dict(moments), saved.state["optimizer_steps"][role])
        if isinstance(self.kl, AdaptiveKL):  # a fixed coefficient is the configuration's
            self.kl.load(saved.state["kl"])
        self.iteration, self.cursor = saved.step, saved.state["cursor"]
        best = saved.state["best"]
        self.best = (best[0], best[1]) if best else None


def horizon_of(config: TrainConfig) -> float:
    """Samples over which the KL controller acts: given, or a tenth of the run's, but an iteration's at least."""
    responses = config.rollout.prompts * config.rollout.samples_per_prompt
    return config.kl.horizon or max(config.run.iterations / 10, 1.0) * responses


def initial_state(config: TrainConfig, policy: Weights, critic: Weights | None) -> State:
    """Learners, KL controller and counters before the first iteration."""
    steps = config.ppo.epochs * config.ppo.minibatches
    iterations = {"policy": config.run.iterations - config.critic_warmup, "critic": config.run.iterations}
    rates = {"policy": config.optimizer.learning_rate, "critic": config.critic.learning_rate}
    make = {
        role: Optimizer(config.optimizer, learning_rate=rate, total_steps=iterations[role] * steps)
        for role, rate in rates.items()
    }
    kl: AdaptiveKL | FixedKL = FixedKL(config.kl.coef)
    if config.kl.controller == "adaptive":
        kl = AdaptiveKL(config.kl.coef, config.kl.target, horizon_of(config))
    return State(Learner(policy, make["policy"]), Learner(critic, make["critic"]) if critic is not None else None, kl)


def slow_controller(config: TrainConfig) -> str | None:
    """A warning where the adaptive KL controller can't even double its coefficient in the whole run."""
    samples = config.run.iterations * config.rollout.prompts * config.rollout.samples_per_prompt
    factor = math.exp(min(0.2 * samples / horizon_of(config), 10.0))
    if config.kl.controller == "fixed" or not config.kl.horizon or factor >= 2:
        return None
    return (
        f"warning: kl.horizon = {config.kl.horizon:g} lets the run's {samples} samples change kl.coef by a factor of "
        f"at most {factor:.2f}, so kl.target may never be reached; leave the key out, or lower it"
    )
