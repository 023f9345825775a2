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
        self._change(lambda part: dynamic_roll(part, padding[:, None], axis=2))
        self.offset = self.offset - padding
        self.left_padding = self.left_padding + padding
        self._right_padding = None

    def filter(self, batch_indices: mx.array) -> None:
        """Keep some rows, in this order, and drop padding that all of them have."""
        self.offset = self.offset[batch_indices]
        self.left_padding = self.left_padding[batch_indices]
        spare = int(np.asarray(self.left_padding).min())
        self._change(lambda part: part[batch_indices][..., spare:, :])
        self._idx -= spare
        self.left_padding = self.left_padding - spare

    def _change(self, function: Callable[[mx.array], mx.array]) -> None:
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


def _written_out(parts: Sequence[mx.array], length: int, like: mx.array) -> mx.array:
    """Keys or values of so many tokens."""
    numbers, *rest = (part[..., :length, :] for part in parts)
    if not rest:
        return numbers
    scales, offsets = rest
    return mx.dequantize(numbers, scales, offsets, group_size=like.shape[-1] // scales.shape[-1], bits=_BITS)
