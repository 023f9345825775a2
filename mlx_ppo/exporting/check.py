"""How far an export is from the policy that it was made from, measured in logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ppo.errors import RunError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.trunk import Trunk

Floats = np.ndarray[Any, np.dtype[np.float32]]

_TEXTS = (
    "The film was",
    "Once upon a time, in a small town by the sea,",
    "What do you think of it? Answer in one line.",
)
_IDS = 24  # one more prompt, of ids spread over the whole vocabulary

EXACT = 1e-3  # largest difference of a logit where the export keeps float32
# Root mean square of the logits' differences, in units of the logits' own deviation, by the type that is stored.
BOUNDS = {"float16": 0.02, "bfloat16": 0.1, "q8_0": 0.2, "8 bits": 0.2, "4 bits": 1.0}  # 1.4: unrelated


@dataclass(frozen=True)
class Difference:
    """Between the logits of two models on the same prompts."""

    largest: float  # absolute
    relative: float  # root mean square, in units of the wanted logits' deviation

    def __str__(self) -> str:
        """For the line that the command prints."""
        return f"logits differ by at most {self.largest:.2g} ({self.relative:.2%} of their deviation)"


def policy_logits(trunk: Trunk, weights: Weights) -> list[Floats]:
    """Logits [S, V] in float32 of a few fixed prompts under a role's weights."""
    tokenizer = trunk.tokenizer
    rows = [tokenizer.encode(text, bos=True) for text in _TEXTS]
    rows.append([(7 + index * 7919) % tokenizer.vocab_size for index in range(_IDS)])
    found: list[Floats] = []
    with trunk.using(weights):
        for row in rows:
            logits = trunk.logits(trunk.hidden(mx.array([row])))[0]
            found.append(np.array(logits.astype(mx.float32)))
    return found


def difference(wanted: Sequence[Floats], found: Sequence[Floats]) -> Difference:
    """The largest difference of a logit, and their root mean square over the wanted logits' deviation."""
    gaps = np.concatenate([np.ravel(a - b) for a, b in zip(wanted, found, strict=True)])
    spread = np.concatenate([np.ravel(row - row.mean(axis=-1, keepdims=True)) for row in wanted])
    scale = float(np.sqrt(np.mean(spread**2, dtype=np.float64))) or 1.0
    return Difference(float(np.abs(gaps).max()), float(np.sqrt(np.mean(gaps**2, dtype=np.float64))) / scale)


def within(wanted: Sequence[Floats], found: Sequence[Floats], stored: str) -> Difference:
    """The difference, where it is no more than what storing in a type explains.

    Args:
        wanted: logits of the run's policy.
        found: logits of what was read back.
        stored: "float32", or a key of `BOUNDS`.
    Raises:
        RunError: it is more; the export is wrong.
    """
    if any(a.shape != b.shape for a, b in zip(wanted, found, strict=True)):
        raise RunError("the export was read back with other shapes than the policy's; nothing was written")
    measured = difference(wanted, found)
    good = measured.largest <= EXACT if stored == "float32" else measured.relative <= BOUNDS[stored]
    if not good:  # also where it is NaN
        allowed = f"at most {EXACT}" if stored == "float32" else f"at most {BOUNDS[stored]:.0%} of their deviation"
        raise RunError(f"read back, the export's {measured}; {stored} allows {allowed}; nothing was written")
    return measured
