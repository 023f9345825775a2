"""Truncated sampling by numpy; see `mlx_ppo.algo.truncation` for what the sets are."""

import math

import numpy as np

from mlx_ppo.algo.truncation import LOWEST, WORD, Distribution, words_of
from mlx_ppo.compute.cpu.products import Floats
from mlx_ppo.compute.engine import Numbers


def support(scaled: Floats, masses: Floats, how: Distribution) -> Numbers:
    """The tokens that may be drawn.

    Args:
        scaled: [B, V] float32, logits / temperature, the largest 0.
        masses: their exponentials.
        how: the bounds.
    Returns:
        [B, V] bool.
    """
    edge = np.full((len(scaled), 1), math.log(how.min_p) if how.min_p > 0 else LOWEST, np.float32)
    if 0 < how.top_k < scaled.shape[-1] or how.top_p < 1:
        rows = zip(scaled, masses, strict=True)
        among = np.array([[_edge(row, own, how)] for row, own in rows], np.float32)
        edge = np.maximum(edge, np.maximum(among, np.float32(LOWEST)))
    found: Numbers = scaled >= edge
    return found


def _edge(scaled: Floats, masses: Floats, how: Distribution) -> float:
    """The smallest value [V] that top-k and then top-p leave."""
    count, total = len(scaled), masses.sum(dtype=np.float64)
    if 0 < how.top_k < count:
        found = np.partition(scaled, count - how.top_k)[count - how.top_k :]
        total = masses[scaled >= found[0]].sum(dtype=np.float64)
        if how.top_p >= 1:
            return float(found[0])
    else:  # those that have less are together less than what top_p leaves out
        found = scaled[masses * count >= (1 - how.top_p) * total]
    falling = np.sort(found)[::-1]
    up_to = np.cumsum(np.exp(falling), dtype=np.float64)
    before = np.concatenate([[0.0], up_to[:-1]])
    return float(falling[before < how.top_p * total][-1])


def packed(tokens: Numbers) -> Numbers:
    """Sets of tokens [B, V] bool as words [B, ceil(V / 32)] uint32."""
    words = words_of(tokens.shape[-1])
    found = np.zeros((len(tokens), words * WORD // 8), np.uint8)
    bits = np.packbits(tokens, axis=-1, bitorder="little")
    found[:, : bits.shape[-1]] = bits
    return found.view("<u4")


def outside(words: Numbers, vocabulary: int) -> Numbers:
    """Of sets as words [B, W] the tokens [B, V] bool that are not in them."""
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, count=vocabulary, bitorder="little")
    found: Numbers = bits == 0
    return found
