"""Sampling by numpy, in double precision."""

import numpy as np

from mlx_ppo.algo.truncation import Distribution
from mlx_ppo.compute.cpu.products import Floats
from mlx_ppo.compute.cpu.truncation import packed, support
from mlx_ppo.compute.engine import Numbers, Sampled

_PIECE = 1 << 18  # elements
_BLOCK = 512  # tokens whose masses are summed before single ones are looked at


def sample(logits: Floats, draws: Floats, how: Distribution) -> Sampled:
    """Pick a token for each row by the inverse of its cumulative distribution.

    Args:
        logits: [B, V] float32.
        draws: [B] uniform in [0, 1).
        how: what is drawn from; temperature 0 takes the most probable token.
    Returns:
        tokens [B] and their log-probabilities [B] under what was drawn from (all of softmax(logits) where the
        temperature is 0), NaN where a row has a NaN or positive infinity; the sets that tokens were drawn from, if
        they weren't all.
    """
    tokens, logprobs = np.empty(len(logits), np.int64), np.empty(len(logits), np.float32)
    sets: list[Numbers] = []
    count = max(1, _PIECE // logits.shape[-1])  # rows at once, so that what lies between stays small
    for start in range(0, len(logits), count):
        rows = slice(start, start + count)
        tokens[rows], logprobs[rows], *more = _sample_rows(logits[rows], draws[rows], how)
        sets += more
    return Sampled(tokens, logprobs, np.concatenate(sets) if sets else None)


def _sample_rows(logits: Floats, draws: Floats, how: Distribution) -> tuple[Numbers, Floats, *tuple[Numbers, ...]]:
    scaled = logits / how.temperature if how.temperature > 0 else logits
    top = scaled.max(axis=-1, keepdims=True)
    if not np.isfinite(top).all():
        none = np.zeros(scaled.shape, np.bool_)
        nothing = np.zeros(len(scaled), np.int64), np.full(len(scaled), np.nan, np.float32)
        return (*nothing, packed(none)) if how.truncates else nothing
    scaled = np.subtract(scaled, top, out=None if scaled is logits else scaled)
    masses = np.exp(scaled)
    rows = np.arange(len(scaled))
    sets: tuple[Numbers, ...] = ()
    if how.truncates:
        drawn = support(scaled, masses, how)
        masses[~drawn] = 0
        sets = (packed(drawn),)
    if how.temperature > 0:
        tokens, total = _drawn(masses, draws)
    else:
        tokens = scaled.argmax(axis=-1)
        total = masses.sum(axis=-1, dtype=np.float64)
    return tokens, (scaled[rows, tokens] - np.log(total)).astype(np.float32), *sets


def _drawn(masses: Floats, draws: Floats) -> tuple[Numbers, Numbers]:
    """The first token [B] up to which masses [B, V] exceed a share of their sum [B]: first the block, then within."""
    every, count = np.arange(len(masses))[:, None], masses.shape[-1]
    blocks = np.cumsum(np.add.reduceat(masses, np.arange(0, count, _BLOCK), axis=-1, dtype=np.float64), axis=-1)
    total = blocks[:, -1:]
    wanted = draws.astype(np.float64)[:, None] * total
    block = np.minimum((blocks <= wanted).sum(axis=-1, keepdims=True), (blocks < total).sum(axis=-1, keepdims=True))
    columns = block * _BLOCK + np.arange(min(_BLOCK, count))
    within = np.where(columns < count, masses[every, np.minimum(columns, count - 1)], np.float32(0))
    before = np.where(block > 0, blocks[every, block - 1], 0.0)
    sums = before + np.cumsum(within, axis=-1, dtype=np.float64)
    last = within.shape[-1] - 1 - np.argmax(within[:, ::-1] > 0, axis=-1)  # of any mass: sums are rounded
    place = np.minimum((sums <= wanted).sum(axis=-1), last)
    return columns[every[:, 0], place], total[:, 0]
