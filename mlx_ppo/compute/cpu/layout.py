"""Where the positions of a pass stand: those of `Sequences`, or without most of the padding.

Rows of a minibatch are of any lengths, so that half of the positions of a rectangle may be padding. What a block does
outside of attention it does to each position by itself; only attention needs rows of one length, and it can have them
in several parts.
"""

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.cpu.block_passes import Places
from mlx_ppo.compute.cpu.common_blocks import LOWEST
from mlx_ppo.compute.cpu.pass_attention import Part
from mlx_ppo.compute.cpu.products import Floats
from mlx_ppo.compute.sequences import Sequences

_DEAR = 1 << 19  # over the square of a state's size: positions that cost as much as one more part of attention
_STEPS = 4  # memory is asked for in 8 to 16 sizes between a number and its double, so that freed memory fits again


class Layout:
    """The N positions of a pass, in the order that `Sequences` tells, or packed."""

    def __init__(self, sequences: Sequences, read: mx.array | None) -> None:
        """Look at shapes only: all positions, padding included.

        Args:
            sequences: the rows.
            read: positions of `Sequences`, of which the states are read; None: all.
        """
        shared = self._shared = sequences.shared
        self._sequences, self._read = sequences, read
        self._index: Places | None = None  # [N], the positions of `Sequences` that there are; None: all
        if shared is None:
            rows, count = sequences.tokens.shape
            self.tokens = sequences.tokens.reshape(-1)
            self.parts: tuple[Part, ...] = (Part(0, rows, count),)
        else:
            (many, width), (rows, count) = shared.prompts.shape, shared.responses.shape
            self.tokens = mx.concatenate([shared.prompts.reshape(-1), shared.responses.reshape(-1)])
            self.parts = Part(0, many, width), Part(many * width, rows, count, width)
        self.whole: int = self.tokens.size
        self.size = self.room = self.whole  # room: memory is made for so many, see `leave_out_padding`
        self._rows: list[Places] = [np.arange(rows)]  # of the parts, prompts aside

    def leave_out_padding(self, states: int) -> None:
        """Put rows of similar length into a part each, and leave out what lies behind the longest of these.

        Args:
            states: the size of one.
        """
        if self._read is None:  # padding, too
            return
        *prompts, rows = self.parts
        lengths = np.asarray(self._sequences.lengths).astype(np.int64)
        if self._shared is not None:
            lengths = lengths - np.asarray(self._shared.lengths)[np.asarray(self._shared.owners)]
        at, index, parts = rows.first, [np.arange(rows.first)], prompts
        groups = [group for group in by_length(lengths, _DEAR // states**2) if lengths[group[0]]]
        for group in groups:
            length = int(lengths[group[0]])
            parts.append(rows._replace(first=at, rows=len(group), length=length))
            index.append((rows.first + group[:, None] * rows.length + np.arange(length)).reshape(-1))
            at += len(group) * length
        if at < self.whole:
            self._index, self._rows = np.concatenate(index), groups
            self.parts, self.size = tuple(parts), at
            step = 1 << max(0, at.bit_length() - _STEPS)
            self.room = min(self.whole, -(-at // step) * step)

    def of(self, array: mx.array) -> mx.array:
        """The values [N, ...] at the positions that there are, of those at all [whole, ...]."""
        return array if self._index is None else array[mx.array(self._index)]

    def taken(self, values: Floats) -> Floats:
        """The same of numpy's arrays."""
        return values if self._index is None else values[self._index]

    def spread(self, states: mx.array) -> mx.array:
        """The way back, of evaluated states: 0 where there is no position."""
        if self._index is None:
            return states
        found = mx.zeros((self.whole, *states.shape[1:]), states.dtype)
        mx.eval(found)
        np.asarray(found)[self._index] = np.asarray(states)
        return found

    def positions(self) -> tuple[tuple[Part, ...], Places]:
        """The parts with all that is known of them, and each position's place in its row [N]."""
        if self._shared is None:
            return self.parts, np.concatenate([np.tile(np.arange(part.length), part.rows) for part in self.parts])
        first, *others = self.parts
        places = [np.tile(np.arange(first.length), first.rows)]
        owners, lengths = np.asarray(self._shared.owners), np.asarray(self._shared.lengths)
        found = [first]
        for part, rows in zip(others, self._rows, strict=True):
            prompts = lengths[owners[rows], None]
            there = np.arange(part.width)[None, :] < prompts
            padding = None if self._shared.level else np.where(there, np.float32(0), LOWEST)
            found.append(part._replace(owners=owners[rows].tolist(), padding=padding))
            places.append((prompts + np.arange(part.length)[None, :]).reshape(-1))
        return tuple(found), np.concatenate(places)

    def read_last(self) -> Places | None:
        """Positions [M], in order, of which the last block's feed-forward part is read; None: all."""
        if self._read is None:
            return None
        found = np.unique(np.asarray(self._read))
        if self._index is not None:
            back = np.empty(self.whole, np.int64)
            back[self._index] = np.arange(self.size)
            found = np.sort(back[found])
        return found if len(found) < self.size else None


def by_length(lengths: Places, dear: int) -> list[Places]:
    """Numbers of rows in groups, each from its longest on, that need the fewest positions if a group has a rectangle.

    Args:
        lengths: of the rows [B].
        dear: how many positions are as bad as one more group.
    """
    order: Places = np.argsort(-lengths, kind="stable")
    falling = lengths[order]
    bounds = [*np.flatnonzero(np.diff(falling, prepend=-1)).tolist(), len(order)]  # where a length begins; the end
    widths = falling[bounds[:-1]].tolist()
    best, cut = [0], [0]
    for to in range(1, len(bounds)):
        costs = [best[at] + (bounds[to] - bounds[at]) * widths[at] + dear for at in range(to)]
        cut.append(int(np.argmin(costs)))
        best.append(costs[cut[to]])
    groups: list[Places] = []
    to = len(bounds) - 1
    while to > 0:
        groups.insert(0, order[bounds[cut[to]] : bounds[to]])
        to = cut[to]
    return groups
