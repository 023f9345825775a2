"""AdamW over a role's flat weights: schedule, clipping by global norm, and a state that can be saved exactly."""

import math
from collections.abc import Mapping

import mlx.core as mx
from mlx.optimizers import AdamW

from mlx_ppo.config import OptimizerSection
from mlx_ppo.errors import RunError
from mlx_ppo.networks.adapters import Weights
from mlx_ppo.records import number

Arrays = dict[str, mx.array]


def finite_norm(gradients: Mapping[str, mx.array], *, what: str) -> float:
    """The global norm of a role's gradients.

    Raises:
        RunError: it is not finite.
    """
    norm = number(mx.sqrt(sum((mx.square(g).sum() for g in gradients.values()), mx.zeros(()))))
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
        self._adam = AdamW(
            learning_rate=learning_rate,
            betas=[section.beta1, section.beta2],
            eps=section.eps,
            weight_decay=section.weight_decay,
            bias_correction=True,
        )

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

    def step(self, weights: Weights, gradients: Mapping[str, mx.array], *, what: str) -> tuple[Weights, float]:
        """Apply one step's gradients.

        Args:
            weights: the weights to change.
            gradients: one float32 array for each of them.
            what: the role's name, for the error.
        Returns:
            The new weights, and the gradients' global norm before clipping.
        Raises:
            RunError: the norm is not finite; nothing is applied.
        """
        norm = finite_norm(gradients, what=what)
        factor = min(1.0, self._section.gradient_clip / (norm + 1e-6))
        clipped = {name: gradient * factor for name, gradient in gradients.items()}
        self._adam.learning_rate = mx.array(self.rate(self.steps))
        arrays: Arrays = self._adam.apply_gradients(clipped, dict(weights.arrays))
        mx.eval(arrays, self._adam.state)
        self.steps += 1
        return weights.holding(arrays), norm

    def state(self) -> Arrays:
        """Moments by `m/<name>` and `v/<name>`; empty before the first step."""
        arrays: Arrays = {}
        for name, moments in self._adam.state.items():
            if isinstance(moments, dict):
                arrays.update({f"{moment}/{name}": array for moment, array in moments.items()})
        return arrays

    def load(self, arrays: Arrays, steps: int) -> None:
        """Put back what `state` gave after `steps` steps."""
        state: dict[str, object] = {"step": mx.array(steps, mx.uint64), "learning_rate": mx.array(self._peak)}
        for key, array in arrays.items():
            moment, _, name = key.partition("/")
            held = state.setdefault(name, {})
            assert isinstance(held, dict)
            held[moment] = array
        if arrays:
            self._adam.state = state
            self._adam._initialized = True
        self.steps = steps
