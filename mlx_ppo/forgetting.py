"""What training has cost elsewhere: how well a text is predicted before and after it, paragraph by paragraph."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.data.batches import length_batches
from mlx_ppo.data.passages import Passage, Passages
from mlx_ppo.errors import RunError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.roles import token_statistics
from mlx_ppo.models.trunk import Trunk

Doubles = np.ndarray[Any, np.dtype[np.float64]]
_TOKENS = 4096  # of a forward pass, if no window has more
_Z95 = 1.96


class Window(NamedTuple):
    """Tokens that are read together, and those of them that are counted."""

    tokens: tuple[int, ...]
    start: int  # the first that is predicted
    parts: tuple[int, ...]  # of the tokens from `start` on; below 0 where one doesn't count


def windows(passages: Sequence[Passage], size: int, most: int, bos: int | None) -> list[Window]:
    """Passages in windows of at most `size` tokens.

    Every token but a passage's first is predicted once. From the second window on, half of a window is text that was
    read before: no token is predicted from less than that.

    Args:
        passages: what is read.
        size: 2 or more.
        most: tokens after which the rest is left out; the window in which that happens is cut.
        bos: where a passage begins with this token, its later windows do, too: some models read nothing well without.
    """
    found = list[Window]()
    for passage in passages:
        tokens, parts = passage.tokens[:most], passage.parts[:most]
        most -= len(tokens)
        at, context = 1, 0
        while at < len(tokens):
            end = min(len(tokens), context + size)
            if any(part >= 0 for part in parts[at:end]):
                first = bos if context and tokens[0] == bos else tokens[context]
                found.append(Window((first, *tokens[context + 1 : end]), at - context, parts[at:end]))
            at, context = end, end - size // 2
        if most <= 0:
            break
    return found


class Losses(NamedTuple):
    """Of each part of a text; those that weren't read have no tokens."""

    nats: Doubles  # [P], summed negative log-probability
    tokens: Doubles  # [P]

    @property
    def mean(self) -> float:
        """Nats a token over the whole text."""
        return float(self.nats.sum() / self.tokens.sum())


def losses(trunk: Trunk, weights: Weights, read: Sequence[Window], text: Passages) -> Losses:
    """Summed negative log-probability of the counted tokens of each part, at temperature 1.

    Raises:
        RunError: one isn't finite.
    """
    nats, counts = np.zeros(text.parts), np.zeros(text.parts)
    groups = length_batches([len(w.tokens) for w in read], max_rows=64, max_tokens=_TOKENS, seed_parts=None)
    for group in groups:
        chosen = [read[row] for row in group]
        sequences = make_sequences(
            [window.tokens[: window.start] for window in chosen], [window.tokens[window.start :] for window in chosen]
        )
        with trunk.using(weights):
            states = trunk.response_states(sequences)
            logprobs, _ = token_statistics(trunk, states, sequences, temperature=1.0)
            mx.eval(logprobs)
        rows = np.array(logprobs, np.float64)
        for window, row in zip(chosen, rows, strict=True):
            parts = np.array(window.parts)
            counted = parts >= 0
            np.add.at(nats, parts[counted], -row[: len(parts)][counted])
            np.add.at(counts, parts[counted], 1)
    if not np.isfinite(nats).all():
        raise RunError(f"{trunk.name}: a log-probability of the text is not finite")
    return Losses(nats, counts)


class Difference(NamedTuple):
    """What was lost, in nats a token, with its 95 % interval; NaN from a single part."""

    mean: float
    low: float
    high: float
    parts: int


def difference(before: Losses, after: Losses) -> Difference:
    """Mean loss after less that before, over the same tokens, with an interval by the parts of the text.

        D = sum_p d_p / sum_p n_p        d_p: difference of part p's summed losses, n_p: its tokens
        variance of D = P / (P - 1) * sum_p (d_p - D n_p)^2 / (sum_p n_p)^2

    A part is a draw; tokens within one are not independent.

    Source: the ratio estimator, Cochran 1977, Sampling Techniques, section 6.4.
    """
    there = before.tokens > 0
    paired, counts = (after.nats - before.nats)[there], before.tokens[there]
    mean, count = float(paired.sum() / counts.sum()), len(counts)
    half = math.nan
    if count > 1:
        spread = float(((paired - mean * counts) ** 2).sum())
        half = _Z95 * math.sqrt(count / (count - 1) * spread) / float(counts.sum())
    return Difference(mean, mean - half, mean + half, count)
