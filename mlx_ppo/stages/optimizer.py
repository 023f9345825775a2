"""AdamW over a role's flat weights: schedule, clipping by global norm, and a state that can be saved exactly."""

import math
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_ppo.compute.engine import Arrays, Engine, Step
from mlx_ppo.config.sections import OptimizerSection
from mlx_ppo.errors import RunError
from mlx_ppo.models.adapters import Weights


def finite_norm(engine: Engine, gradients: Arrays, *, what: str) -> float:
    """The global norm of a role's gradients.

    Raises:
        RunError: it is not finite.
    """
    norm = engine.norm(gradients.values())
    if not math.isfinite(norm):
        raise RunError(f"the {what}'s gradient is not finite; the update was not applied")
    return norm


class Optimizer:
    """AdamW with bias correction. The rate of a step is a function of the step's number alone, so resuming is exact."""

    def __init__(self, section: OptimizerSection, *, learning_rate: float, total_steps: int) -> None:
        """Prepare; the schedule spans `total_steps` optimizer steps."""
        self._section = section
        self._peak = learning_rate
        self._total = total_steps
        self.steps = 0
        self._moments: dict[str, Arrays] = {}

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, then the schedule down to 0."""
        warmup = self._section.warmup_steps
        if step < warmup:
            return self._peak * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self._total - warmup))
        if self._section.schedule == "linear":
            return self._peak * (1 - progress)
        if self._section.schedule == "cosine":
            return self._peak * 0.5 * (1 + math.cos(math.pi * progress))
        return self._peak

    def step(self, engine: Engine, weights: Weights, gradients: Arrays, *, what: str) -> tuple[Weights, float]:
        """Apply one step's gradients.

        Args:
            engine: computes it.
            weights: the weights to change.
            gradients: one float32 array for each of them. An engine may take them out, and use their memory.
            what: the role's name, for the error.
        Returns:
            The new weights, and the gradients' global norm before clipping.
        Raises:
            RunError: the norm is not finite; nothing is applied.
        """
        norm = finite_norm(engine, gradients, what=what)
        if not self._moments:
            self._moments = {
                name: {"m": mx.zeros_like(array), "v": mx.zeros_like(array)} for name, array in weights.arrays.items()
            }
            mx.eval(self._moments)
        section = self._section
        step = Step(
            number=self.steps + 1,
            rate=self.rate(self.steps),
            factor=min(1.0, section.gradient_clip / (norm + 1e-6)),
            beta1=section.beta1,
            beta2=section.beta2,
            eps=section.eps,
            weight_decay=section.weight_decay,
        )
        arrays = engine.adamw(weights.arrays, gradients, self._moments, step)
        self.steps += 1
        return weights.holding(arrays), norm

    def state(self) -> Arrays:
        """Moments by `m/<name>` and `v/<name>`; empty before the first step."""
        return {f"{kind}/{name}": array for name, both in self._moments.items() for kind, array in both.items()}

    def load(self, arrays: Arrays, steps: int) -> None:
        """Put back what `state` gave after `steps` steps."""
        self._moments = {}
        for key, array in arrays.items():
            kind, _, name = key.partition("/")
            self._moments.setdefault(name, {})[kind] = array
        self.steps = steps


@dataclass
class Learner:
    """Weights that learn, with their optimizer."""

    weights: Weights
    optimizer: Optimizer


class Learners(Protocol):
    """Who learns: a training state, for one."""

    policy: Learner
    critic: Learner | None  # None with a critic-free estimator
