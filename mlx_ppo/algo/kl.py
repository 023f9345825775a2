"""Estimates of the KL divergence from samples, and the controllers of its coefficient."""

import math
from typing import Literal

import mlx.core as mx

from mlx_ppo.algo.masked import require_same_shape


def kl_estimate(logprobs: mx.array, ref_logprobs: mx.array, *, kind: Literal["k1", "k2", "k3"]) -> mx.array:
    """Per-token estimate of KL(policy || reference), the tokens having been sampled from the policy.

        k1 = log pi - log pi_ref
        k2 = k1^2 / 2
        k3 = exp(-k1) - 1 + k1

    k1 and k3 are unbiased. Only k1 inside the reward has the gradient of the sequence KL; k3 is for the log. Takes no
    mask: a masked slot's garbage stays in that slot, for a masked reduction to drop.

    Args:
        logprobs: [B, T], nats, of the distribution the tokens were sampled from.
        ref_logprobs: [B, T], nats.
        kind: which estimate.

    Returns:
        [B, T] float32, nats.

    Raises:
        ValueError: the shapes differ, or kind is unknown.
    Source: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    k1 = logprobs.astype(mx.float32) - ref_logprobs.astype(mx.float32)
    if kind == "k1":
        return k1
    if kind == "k2":
        return 0.5 * k1 * k1
    if kind == "k3":
        # exp(-k1) - 1 would lose every digit of the small values that are the normal case.
        return mx.expm1(-k1) + k1
    raise ValueError(f"kind must be k1, k2 or k3, got {kind!r}")


class FixedKL:
    """A coefficient that stays what it is."""

    def __init__(self, coef: float) -> None:
        """Take the coefficient; ValueError if it is negative or not finite."""
        self.coef = _checked_coef(coef)

    def update(self, observed_kl: float, n_samples: int) -> None:
        """Do nothing; there so that both controllers are called alike."""

    def state(self) -> dict[str, float]:
        """What a checkpoint has to hold."""
        return {"coef": self.coef}

    def load(self, state: dict[str, float]) -> None:
        """Take up the state of a checkpoint; ValueError if its coefficient is negative or not finite."""
        self.coef = _checked_coef(state["coef"])


class AdaptiveKL:
    """A coefficient that steers the observed KL towards a target.

        coef *= 1 + clip(observed_kl / target - 1, -0.2, 0.2) * n_samples / horizon

    Source: Ziegler et al. 2019, arXiv:1909.08593.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        """Start at a coefficient.

        Args:
            coef: the first coefficient, >= 0.
            target: nats a sequence, > 0.
            horizon: samples over which the coefficient may move by a factor of about e^0.2, > 0.

        Raises:
            ValueError: a value is out of range.
        """
        if not (target > 0 and horizon > 0):
            raise ValueError(f"target and horizon must be positive, got {target} and {horizon}")
        self.coef = _checked_coef(coef)
        self.target = target
        self.horizon = horizon

    def update(self, observed_kl: float, n_samples: int) -> None:
        """Move the coefficient after one iteration.

        Args:
            observed_kl: k1 summed over each sequence, averaged over the sequences, nats.
            n_samples: sequences in this iteration, under 5 * horizon: beyond it the coefficient could turn negative.

        Raises:
            ValueError: observed_kl is not finite, or n_samples is out of range; the coefficient is then unchanged.
        """
        if not math.isfinite(observed_kl):
            raise ValueError(f"observed_kl must be finite, got {observed_kl}")
        if not 0 <= n_samples < 5 * self.horizon:
            raise ValueError(f"n_samples must be in [0, 5 * horizon = {5 * self.horizon}), got {n_samples}")
        error = min(max(observed_kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * n_samples / self.horizon

    def state(self) -> dict[str, float]:
        """What a checkpoint has to hold; target and horizon belong to the configuration."""
        return {"coef": self.coef}

    def load(self, state: dict[str, float]) -> None:
        """Take up the state of a checkpoint; ValueError if its coefficient is negative or not finite."""
        self.coef = _checked_coef(state["coef"])


def _checked_coef(coef: float) -> float:
    if not (coef >= 0 and math.isfinite(coef)):
        raise ValueError(f"coef must be finite and not negative, got {coef}")
    return float(coef)
