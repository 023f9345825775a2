"""One pass over prompts that several responses have, and one over the responses on top of it; gradients flow through.

The pass over the responses attends to the prompts' keys and values, as decoding does to its cache. Nothing is computed
twice, and the numbers are those of whole rows.
"""

from typing import Any

import mlx.core as mx

from mlx_ppo.compute.sequences import SharedPrompts


class Reading:
    """What the layers' caches have in common: whose turn it is, the prompts' or the responses'."""

    def __init__(self, shared: SharedPrompts) -> None:
        """Begin with the prompts."""
        self.shared = shared
        self.offset: int | mx.array = 0  # positions before those that are read
        self.answering = False

    def answer(self) -> None:
        """Go on to the responses."""
        shared = self.shared
        self.answering = True
        self.offset = shared.prompts.shape[1] if shared.level else shared.lengths[shared.owners]

    def mask(self, count: int) -> str | mx.array | None:
        """Which keys count for the `count` positions that are read, in a form that mlx's attention takes."""
        if not self.answering or self.shared.level:
            return "causal" if count > 1 else None
        width, lengths = self.shared.prompts.shape[1], self.shared.lengths[self.shared.owners]
        prompt = mx.arange(width)[None, :] < lengths[:, None]
        whole = (len(prompt), count)
        return mx.concatenate(
            [
                mx.broadcast_to(prompt[:, None], (*whole, width)),
                mx.broadcast_to(mx.tri(count, dtype=mx.bool_), (*whole, count)),
            ],
            axis=-1,
        )[:, None]


class LayerCache:
    """Stands where mlx-lm's models expect a layer's KV cache."""

    def __init__(self, reading: Reading) -> None:
        """Begin empty."""
        self._reading = reading
        self._prompts: tuple[mx.array, mx.array] | None = None

    @property
    def offset(self) -> int | mx.array:
        """Positions before those that are read, of all rows or [B] of each."""
        return self._reading.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The prompts' [G, K, P, D] as they are; the responses' [B, K, R, D] with those of their prompts before."""
        if self._prompts is None:
            self._prompts = keys, values
            return keys, values
        before = self._prompts
        return self._joined(before[0], keys), self._joined(before[1], values)

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Of `count` positions.

        Raises:
            ValueError: a form is asked for that this doesn't know.
        """
        if return_array or window_size is not None:
            raise ValueError("no windows and no arrays")
        return self._reading.mask(count)

    def _joined(self, prompts: mx.array, responses: mx.array) -> mx.array:
        owners = self._reading.shared.owners
        many = len(prompts) > 1
        before = prompts[owners] if many else mx.broadcast_to(prompts, (len(responses), *prompts.shape[1:]))
        return mx.concatenate([before, responses], axis=2)
