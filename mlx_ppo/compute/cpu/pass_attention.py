"""Causal attention of whole rows, and its gradient, on a CPU by numpy and BLAS.

Keys and values of a prompt that several rows have are read where they are, once. The weights aren't kept for the
gradient, but computed again.

Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Ainslie et al. 2023, arXiv:2305.13245 (grouped heads).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mlx_ppo.compute.cpu.attention import softmax_in_place
from mlx_ppo.compute.cpu.common_blocks import LOWEST
from mlx_ppo.compute.cpu.products import Floats, Place, integers, prepare

_TOGETHER = 1 << 21  # scores that are computed together, if these are more than a row's


class Heads(NamedTuple):
    """How attention divides what it reads."""

    number: int  # H, of the queries
    groups: int  # K, of keys and values; divides H
    size: int  # of each
    scale: float  # of the scores


class Part(NamedTuple):
    """B rows of R positions each, one after the other, among the N of a pass; S = P + R of them are attended to."""

    first: int
    rows: int
    length: int  # R
    width: int = 0  # P, positions of a prompt that is read before, once; 0: none
    owners: Sequence[int] = ()  # which of these prompts, which begin at position 0, each row has
    padding: Floats | None = None  # [B, P], added to the prompts' scores; None: every position counts


class Vectors(NamedTuple):
    """Queries [N, H * D], keys and values [N, K * D]; or their gradients."""

    q: Floats
    k: Floats
    v: Floats


def scores_at_once(parts: Sequence[Part], heads: int) -> int:
    """Bytes of the largest array of scores."""
    return max(
        4 * len(rows) * heads * part.length * (part.width + part.length) for part in parts for rows in _few(part, heads)
    )


def attend(parts: Sequence[Part], given: Vectors, heads: Heads, out: Floats) -> None:
    """Set `out` [N, H * D] to the sums of values by weight."""
    for part in parts:
        for rows in _few(part, heads.number):
            some = _Rows(part, rows, heads)
            weights = some.weights(given)
            for number, side in enumerate(some.sides):
                some.sums(side, weights, given.v, out, 1.0, add=number > 0)


def attend_back(parts: Sequence[Part], given: Vectors, heads: Heads, gradient: Floats, by: Vectors) -> None:
    """Add to `by` the gradients by queries, keys and values, for gradients [N, H * D] by the sums."""
    for part in parts:
        for rows in _few(part, heads.number):
            some = _Rows(part, rows, heads)
            weights = some.weights(given)
            by_scores = np.empty_like(weights)
            for side in some.sides:
                some.scores(side, gradient, given.v, by_scores, 1.0)
            for row, weight in zip(by_scores, weights, strict=True):
                row -= np.einsum("...s,...s->...", row, weight)[..., None]
                row *= weight
            for side in some.sides:
                some.sums(side, by_scores, given.k, by.q, heads.scale, add=True)
                some.sums_back(side, by_scores, given.q, by.k, heads.scale)
                some.sums_back(side, weights, gradient, by.v, 1.0)


def _few(part: Part, heads: int) -> Iterator[range]:
    """Rows, a few at a time."""
    size = max(1, _TOGETHER // (heads * part.length * (part.width + part.length)))
    for start in range(0, part.rows, size):
        yield range(start, min(part.rows, start + size))


class _Side(NamedTuple):
    """What some rows attend to: their prompts' positions, or their own."""

    columns: int  # first of the scores
    length: int  # positions
    firsts: list[int]  # where these begin, for each of the rows


class _Rows:
    """Products of some rows of a part; matrices are given by where they begin in flat memory."""

    def __init__(self, part: Part, rows: range, heads: Heads) -> None:
        self._part, self._rows, self._heads = part, rows, heads
        self._length = part.width + part.length
        self._own = [part.first + row * part.length for row in rows]
        self.sides = [_Side(part.width, part.length, self._own)]
        if part.width:
            self.sides.insert(0, _Side(0, part.width, [part.width * part.owners[row] for row in rows]))

    def weights(self, given: Vectors) -> Floats:
        """The weights [b, H, R, S] of the rows."""
        part, heads = self._part, self._heads
        found = np.empty((len(self._rows), heads.number, part.length, self._length), np.float32)
        for side in self.sides:
            self.scores(side, given.q, given.k, found, heads.scale)
        later = np.triu(np.full((part.length, part.length), LOWEST), 1)
        for number, row in enumerate(found):  # a row of the batch, which fits the cache
            row[..., part.width :] += later
            if part.padding is not None:
                row[..., : part.width] += part.padding[self._rows[number]]
            softmax_in_place(row)
        return found

    def scores(self, side: _Side, left: Floats, right: Floats, out: Floats, factor: float) -> None:
        """Set out[b, h] [R, of S] to factor * left[b, h] @ right[b, g].T."""
        heads, part = self._heads, self._part
        prepare(
            (integers([part.length]), integers([side.length]), integers([heads.size])),
            self._of_heads(left),
            self._of_groups(right, side),
            self._of_scores(out, side),
            transposed=True,
            factor=factor,
        )()

    def sums(self, side: _Side, weights: Floats, right: Floats, out: Floats, factor: float, *, add: bool) -> None:
        """Set out[b, h] [R, D] to factor * weights[b, h] @ right[b, g]."""
        prepare(
            (integers([self._part.length]), integers([self._heads.size]), integers([side.length])),
            self._of_scores(weights, side),
            self._of_groups(right, side),
            self._of_heads(out),
            transposed=False,
            factor=factor,
            add=add,
        )()

    def sums_back(self, side: _Side, weights: Floats, left: Floats, out: Floats, factor: float) -> None:
        """Add factor * weights[b, h].T @ left[b, h] to out[b, g] [of S, D], for every head h of the group g."""
        heads = self._heads
        of_weights, of_left, of_out = (
            self._of_scores(weights, side),
            self._of_heads(left),
            self._of_groups(out, side),
        )
        for several in self._apart(of_out[1]):
            prepare(
                (integers([side.length]), integers([heads.size]), integers([self._part.length])),
                (weights, [of_weights[1][at] for at in several], of_weights[2]),
                (left, [of_left[1][at] for at in several], of_left[2]),
                (out, [of_out[1][at] for at in several], of_out[2]),
                transposed=False,
                left_transposed=True,
                factor=factor,
                add=True,
            )()

    @staticmethod
    def _apart(places: Sequence[int]) -> list[list[int]]:
        """Numbers of places in as few lists as leave no place twice in one."""
        found: list[list[int]] = []
        seen: dict[int, int] = {}
        for number, place in enumerate(places):
            turn = seen[place] = seen.get(place, -1) + 1
            if turn == len(found):
                found.append([])
            found[turn].append(number)
        return found

    def _of_heads(self, array: Floats) -> Place:
        heads, step = self._heads, array.shape[1]
        return array, [first * step + head * heads.size for first in self._own for head in range(heads.number)], step

    def _of_groups(self, array: Floats, side: _Side) -> Place:
        heads, step = self._heads, array.shape[1]
        together = heads.number // heads.groups
        groups = [head // together for head in range(heads.number)]
        return array, [first * step + group * heads.size for first in side.firsts for group in groups], step

    def _of_scores(self, array: Floats, side: _Side) -> Place:
        step = self._part.length * self._length
        return array, [side.columns + step * at for at in range(len(self._rows) * self._heads.number)], self._length
