"""Forms in which a rollout keeps keys and values: as they are, or in 8 bits an element."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ppo.networks.open_files import open_files_limit_kept

with open_files_limit_kept():
    from mlx_lm.models.cache import BatchKVCache, KVCache, dynamic_roll, make_prompt_cache

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


def keep_rows(caches: Sequence[Any], rows: mx.array, length: int) -> None:
    """Keep some rows of a model's caches, in this order; one layer at a time, so that only one is there twice.

    Args:
        caches: of the model's layers, which are changed.
        rows: [N] int32.
        length: tokens that plain caches shall have room for; padding that all rows have is dropped.
    """
    for cache in caches:
        cache.filter(rows)
        _settle(cache, length)


def join(caches: Sequence[Any], others: list[Any], length: int) -> None:
    """Add the rows of other caches, after those that are there; one layer at a time, so that only one is there twice.

    Args:
        caches: of the model's layers, which are changed.
        others: those of the rows that are added; the list is emptied.
        length: tokens that plain caches shall have room for; shorter rows are padded on the left.
    """
    for cache in caches:
        cache.extend(others.pop(0))
        _settle(cache, length)


def _settle(cache: Any, length: int) -> None:
    """Compute what a cache has become, with room for so many tokens: a plain one that grew later would double."""
    if isinstance(cache, EightBitCache):
        cache.change(lambda part: _with_room(part, length))
    elif isinstance(cache, BatchKVCache) and cache.keys is not None:
        cache.keys, cache.values = _with_room(cache.keys, length), _with_room(cache.values, length)
    mx.eval(cache.state)


def _with_room(part: mx.array, length: int) -> mx.array:
    """[B, K, S, ...] with S at least `length`."""
    missing = length - part.shape[2]
    return mx.pad(part, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing > 0 else part


class EightBitCache(BatchKVCache):
    """mlx-lm's `BatchKVCache`, whose `keys` and `values` are each a list: numbers, scales, offsets [B, K, S, ...].

    What is read for the first time is attended to as it is; from then on it is written out for one layer at a time.
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
        return _written_out(self.keys, self._idx, keys), _written_out(self.values, self._idx, values)

    def finalize(self) -> None:
        """Move right padding, told of by `prepare`, to the left."""
        padding = self._right_padding
        if padding is None:
            return
        self.change(lambda part: dynamic_roll(part, padding[:, None], axis=2))
        self.offset = self.offset - padding
        self.left_padding = self.left_padding + padding
        self._right_padding = None

    def filter(self, batch_indices: mx.array) -> None:
        """Keep some rows, in this order, and drop padding that all of them have."""
        self.offset = self.offset[batch_indices]
        self.left_padding = self.left_padding[batch_indices]
        spare = int(np.asarray(self.left_padding).min())
        self.change(lambda part: part[batch_indices][..., spare:, :])
        self._idx -= spare
        self.left_padding = self.left_padding - spare

    def extend(self, other: "EightBitCache") -> None:
        """Add another's rows after these; the shorter ones are padded on the left."""
        mine, others = (self.keys, self.values), (other.keys, other.values)
        end = max(self._idx, other._idx)
        self.keys, self.values = (
            [_stacked(part, self._idx, more, other._idx) for part, more in zip(parts or (), added or (), strict=True)]
            for parts, added in zip(mine, others, strict=True)
        )
        self.offset = mx.concatenate([self.offset, other.offset])
        padding = [self.left_padding + (end - self._idx), other.left_padding + (end - other._idx)]
        self.left_padding = mx.concatenate(padding)
        self._idx = end

    def change(self, function: Callable[[mx.array], mx.array]) -> None:
        """Put something else in the place of every part of the keys and values, if there are any."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = ([function(part) for part in parts] for parts in (self.keys, self.values))


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


def _stacked(one: mx.array, length: int, other: mx.array, other_length: int) -> mx.array:
    """Rows of two parts, of which so many tokens count, so that these end at the same place."""
    end, room = max(length, other_length), max(one.shape[2], other.shape[2])
    return mx.concatenate(
        [
            mx.pad(part[..., :own, :], [(0, 0), (0, 0), (end - own, room - end), (0, 0)])
            for part, own in ((one, length), (other, other_length))
        ]
    )


def _written_out(parts: Sequence[mx.array], length: int, like: mx.array) -> mx.array:
    """Keys or values of so many tokens."""
    numbers, *rest = (part[..., :length, :] for part in parts)
    if not rest:
        return numbers
    scales, offsets = rest
    return mx.dequantize(numbers, scales, offsets, group_size=like.shape[-1] // scales.shape[-1], bits=_BITS)
