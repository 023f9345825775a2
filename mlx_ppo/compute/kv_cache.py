"""Forms in which a rollout keeps keys and values: as they are, or in 8 bits an element."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ppo.runtime.open_files import open_files_limit_kept

with open_files_limit_kept():
    from mlx_lm.models.cache import BatchKVCache, KVCache, dynamic_roll, make_prompt_cache

Numbers = np.ndarray[Any, np.dtype[np.integer[Any]]]

FULL, EIGHT_BITS = "full", "8-bit"
_GROUPS = (64, 32)  # elements that share a scale and an offset; the first that divides the heads
_BITS = 8


def new_caches(model: nn.Module, form: str, rows: int) -> list[Any]:
    """Empty caches of a model's layers for some rows decoded together.

    Args:
        model: of mlx-lm.
        form: "full", or "8-bit": plain caches hold what `mx.quantize` makes of keys and values, a little more than a
            quarter of float32's memory. Those of a window or of a recurrent layer stay as they are, and so does a layer
            whose heads 32 doesn't divide.
        rows: how many.
    """
    empty = [make_prompt_cache(model) for _ in range(rows)]
    found: list[Any] = []
    for layers in zip(*empty, strict=True):
        plain = type(layers[0]) is KVCache and form == EIGHT_BITS
        found.append(EightBitCache([0] * rows) if plain else layers[0].merge(list(layers)))
    return found


def keeps_all_tokens(model: nn.Module) -> bool:
    """Whether every layer keeps plain keys and values of all tokens: no window, no recurrent state."""
    return all(type(cache) is KVCache for cache in make_prompt_cache(model))


def is_plain(cache: Any) -> bool:
    """Whether a layer's cache of several rows has plain keys and values, or ones in 8 bits, of all tokens."""
    return isinstance(cache, BatchKVCache)


def share_offsets(caches: Sequence[Any]) -> None:
    """Let the plain caches of a model's layers, which are equally far, hold one array that says how far."""
    plain = [cache for cache in caches if isinstance(cache, BatchKVCache)]
    for cache in plain[1:]:
        cache.offset = plain[0].offset


def size_caches(caches: Sequence[Any], length: int) -> None:
    """Let plain caches take the room of `length` tokens at once, instead of 256 at a time."""
    for cache in caches:
        if isinstance(cache, BatchKVCache):
            cache.step = length


def keep_rows(caches: Sequence[Any], rows: Sequence[int], room: int, *, in_place: bool = False) -> None:
    """Keep some rows of a model's caches, in this order; one layer at a time, so that only one is there twice.

    Args:
        caches: of the model's layers, which are changed.
        rows: at least one; a row may be there several times.
        room: tokens that plain caches shall have room for; padding that all rows have is dropped.
        in_place: where rows only come into the places of others that leave (see `filled`), they alone may be copied,
            by numpy; the arrays are parts of larger ones then, and whoever adds to them has to do it in place, too.
    """
    chosen = mx.array(list(rows), mx.int32)
    spare = min((int(np.asarray(cache.left_padding)[list(rows)].min()) for cache in _plain(caches)[:1]), default=0)
    few = in_place and spare == 0 and all(row == place or row >= len(rows) for place, row in enumerate(rows))
    for cache in caches:
        if few and _plain([cache]) and room <= _parts(cache)[0].shape[2]:
            _move(cache, rows, chosen)
        elif _plain([cache]):
            _stack(cache, [(cache, run) for run in _runs(rows)], cache._idx - spare, room)
        else:
            cache.filter(chosen)
        mx.eval(cache.state)


def filled(rows: Numbers) -> Numbers:
    """Rows that stay, in order: the same in one in which few move, as the last take the places of those that leave."""
    places = np.arange(len(rows))
    order, late = places.copy(), rows[rows >= len(rows)]
    order[~np.isin(places, rows)] = late
    return order


def join(caches: Sequence[Any], others: list[Any], room: int) -> None:
    """Add the rows of other caches, after those that are there; one layer at a time, so that only one is there twice.

    Args:
        caches: of the model's layers, which are changed.
        others: those of the rows that are added; the list is emptied.
        room: tokens that plain caches shall have room for; shorter rows are padded on the left.
    """
    for cache in caches:
        other = others.pop(0)
        if _plain([cache]):
            _stack(cache, [(cache, slice(None)), (other, slice(None))], max(cache._idx, other._idx), room)
        else:
            cache.extend(other)
        mx.eval(cache.state)


def _plain(caches: Sequence[Any]) -> list[Any]:
    """Those of all tokens, where they hold something."""
    return [cache for cache in caches if isinstance(cache, BatchKVCache) and cache.keys is not None]


def _runs(rows: Sequence[int]) -> list[slice]:
    """Rows that follow each other, together."""
    ends = np.flatnonzero(np.diff(rows) != 1) + 1
    return [slice(int(run[0]), int(run[-1]) + 1) for run in np.split(np.asarray(rows), ends)]


def _move(cache: BatchKVCache, rows: Sequence[int], chosen: mx.array) -> None:
    """Copy rows to the places of those that left; the arrays are seen up to the last one."""
    parts = _parts(cache)
    for values in map(np.asarray, parts):
        for place, row in enumerate(rows):
            if place != row:
                values[place] = values[row]
    cache.offset, cache.left_padding = cache.offset[chosen], cache.left_padding[chosen]
    _hold(cache, [part[: len(rows)] for part in parts])


def _stack(cache: BatchKVCache, pieces: Sequence[tuple[BatchKVCache, slice]], end: int, room: int) -> None:
    """Let a plain cache hold rows of plain ones, the last token of each right before the place `end`.

    mlx-lm's own `filter` and `extend` have a layer there three times, and leave no room for the tokens to come.
    """
    found: list[mx.array] = []
    for parts in zip(*(_parts(piece) for piece, _ in pieces), strict=True):
        taken = [
            part[rows, :, max(0, piece._idx - end) : piece._idx]
            for part, (piece, rows) in zip(parts, pieces, strict=True)
        ]
        _, heads, _, size = taken[0].shape
        whole, at = mx.zeros((sum(map(len, taken)), heads, max(room, end), size), taken[0].dtype), 0
        for part in taken:
            whole[at : at + len(part), :, end - part.shape[2] : end] = part
            at += len(part)
        found.append(whole)
    cache.offset = mx.concatenate([piece.offset[rows] for piece, rows in pieces])
    cache.left_padding = mx.concatenate([piece.left_padding[rows] + (end - piece._idx) for piece, rows in pieces])
    cache._idx = end
    _hold(cache, found)


def _parts(cache: Any) -> list[mx.array]:
    """The arrays of a plain cache's keys, and then those of its values."""
    if isinstance(cache, EightBitCache):
        return [*(cache.keys or ()), *(cache.values or ())]
    return [cache.keys, cache.values]


def _hold(cache: Any, parts: list[mx.array]) -> None:
    """Let a plain cache hold others."""
    half = len(parts) // 2
    if isinstance(cache, EightBitCache):
        cache.keys, cache.values = parts[:half], parts[half:]
    else:
        cache.keys, cache.values = parts


class EightBitCache(BatchKVCache):
    """mlx-lm's `BatchKVCache`, whose `keys` and `values` are each a list: numbers, scales, offsets [B, K, S, ...].

    What is read for the first time is attended to as it is; from then on it is dequantised for one layer at a time.
    Rows leave and are added by `keep_rows` and `join`.
    """

    keys: list[mx.array] | None  # type: ignore[assignment]
    values: list[mx.array] | None  # type: ignore[assignment]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add keys and values [B, K, N, D]; returns those of all tokens so far, [B, K, S, D]."""
        before, self._idx = self._idx, self._idx + keys.shape[2]
        self.offset = self.offset + keys.shape[2]
        room = -(-keys.shape[2] // self.step) * self.step
        new = (_stored(keys), _stored(values))
        self.keys, self.values = (
            _added(old, parts, before, room) for old, parts in zip((self.keys, self.values), new, strict=True)
        )
        if before == 0:
            return keys, values
        return _dequantised(self.keys, self._idx, keys), _dequantised(self.values, self._idx, values)

    def finalize(self) -> None:
        """Move right padding, told of by `prepare`, to the left."""
        padding = self._right_padding
        if padding is None:
            return
        _hold(self, [dynamic_roll(part, padding[:, None], axis=2) for part in _parts(self)])
        self.offset = self.offset - padding
        self.left_padding = self.left_padding + padding
        self._right_padding = None


def _stored(array: mx.array) -> list[mx.array]:
    """Numbers, scales and offsets; the array alone where its heads can't be quantised."""
    group = next((size for size in _GROUPS if array.shape[-1] % size == 0), None)
    return [array] if group is None else list(mx.quantize(array, group_size=group, bits=_BITS))


def _added(old: Sequence[mx.array] | None, new: Sequence[mx.array], at: int, room: int) -> list[mx.array]:
    """Put new parts at a place, after making room where there isn't enough."""
    found: list[mx.array] = []
    for number, part in enumerate(new):
        whole = None if old is None else old[number]
        if whole is None or at + part.shape[2] > whole.shape[2]:
            more = mx.zeros((*part.shape[:2], room, part.shape[3]), part.dtype)
            whole = more if whole is None else mx.concatenate([whole[..., :at, :], more], axis=2)
        whole[..., at : at + part.shape[2], :] = part
        found.append(whole)
    return found


def _dequantised(parts: Sequence[mx.array], length: int, like: mx.array) -> mx.array:
    """Keys or values of so many tokens."""
    numbers, *rest = (part[..., :length, :] for part in parts)
    if not rest:
        return numbers
    scales, offsets = rest
    return mx.dequantize(numbers, scales, offsets, group_size=like.shape[-1] // scales.shape[-1], bits=_BITS)
