"""Rows of tokens into padded batches of similar length."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlx_ppo.data.random import philox

_JITTER = 0.1  # rows whose lengths differ by up to this share may change places


def pad_right(rows: Sequence[Sequence[int]], *, pad: int = 0) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Tokens [B, S], each row followed by `pad`, and lengths [B], where S is the longest row's length."""
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    tokens = np.full((len(rows), int(lengths.max(initial=0))), pad, dtype=np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return tokens, lengths


def length_batches(
    lengths: Sequence[int], *, max_rows: int, max_tokens: int | None, seed_parts: tuple[int, ...] | None
) -> list[list[int]]:
    """Indices in batches of similar length, every index once.

    Args:
        lengths: of the rows.
        max_rows: most rows of a batch.
        max_tokens: most tokens of a batch, padding included; a row that is longer gets a batch of its own. None for
            no such limit.
        seed_parts: shuffles the batches, and the rows of nearly equal length among them, the same for the same parts.
            None leaves the longest first, so that the most memory is needed at once.
    """
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, not {max_rows}")
    keys = np.asarray(lengths, dtype=np.float64) + 1
    generator = None if seed_parts is None else philox("length batches", *seed_parts)
    if generator is not None:
        keys *= 1 + _JITTER * generator.random(len(keys))
    batches: list[list[int]] = []
    widest = 0
    for index in np.argsort(-keys, kind="stable").tolist():
        wider = max(widest, lengths[index])
        rows = len(batches[-1]) + 1 if batches else max_rows + 1
        if rows > max_rows or (max_tokens is not None and rows * wider > max_tokens):
            batches.append([])
            wider = lengths[index]
        batches[-1].append(index)
        widest = wider
    if generator is None:
        return batches
    return [batches[place] for place in generator.permutation(len(batches))]
