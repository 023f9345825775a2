"""What updates of a world have found, before anything is applied."""

from typing import Any

import numpy as np


def judged(form: str, healthy: list[tuple[float, float]], faulty: list[tuple[float, float]]) -> tuple[float, float]:
    """The largest mean |log ratio| of healthy steps, and the smallest with a fault, as shares of the bound."""
    largest, smallest = max(share for _, share in healthy), min(share for _, share in faulty)
    print(f"{form}: mean |log ratio| {largest:.3f} of the bound at most, {smallest:.2f} of it at least with the fault")
    return largest, smallest


def gradients_of(world: Any, learner: str, saving: str) -> np.ndarray:
    """All of a role's gradients [n] in one update, which is not applied."""
    seen: list[np.ndarray] = []

    class Recorder:
        def step(self, engine: Any, weights: Any, gradients: Any, *, what: str) -> tuple[Any, float]:
            arrays = [np.array(array, np.float64).ravel() for _, array in sorted(gradients.items())]
            seen.append(np.concatenate(arrays))
            return weights, 0.0

    world.policy.optimizer, world.critic.optimizer = Recorder(), Recorder()
    world.update(epochs=1, minibatches=1, gradient_checkpointing=saving, value_clip=0.0)
    return seen[("policy", "critic").index(learner)]
