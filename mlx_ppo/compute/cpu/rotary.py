"""Rotary position embeddings whose angles are computed once for all blocks.

On the CPU mlx makes `mx.fast.rope` of some twenty operations, angles, cosines and sines included, for the queries and
again for the keys of every block. Here a call is three products' worth of elementwise work.

Source: Su et al. 2021, arXiv:2104.09864, eq. 34.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn


class SharedAngles:
    """Cosines and sines of the positions that were asked for last; the blocks of a model share one."""

    def __init__(self) -> None:
        """Nothing was asked for yet."""
        self._asked: tuple[int | mx.array, int] | None = None
        self._found = (mx.zeros(()), mx.zeros(()))

    def at(self, rope: nn.RoPE, offset: int | mx.array, length: int) -> tuple[mx.array, mx.array]:
        """Factors [..., S, D] of a vector's own elements, and of its exchanged halves, at S positions from an offset.

        Args:
            rope: whose angles.
            offset: of all rows or, [B], of each. An array is known again only as the same object.
            length: S.
        """
        if not self._is_asked_again(offset, length):
            rows = 1 if isinstance(offset, int) else offset.size
            self._found = factors_of(lambda one: _rotated(rope, one, offset), (rows, 1, length, rope.dims))
            self._asked = offset, length
        return self._found

    def _is_asked_again(self, offset: int | mx.array, length: int) -> bool:
        if self._asked is None or self._asked[1] != length:
            return False
        before = self._asked[0]
        return before is offset or (isinstance(offset, int) and isinstance(before, int) and before == offset)


def factors_of(turn: Callable[[mx.array], mx.array], shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    """Factors of a vector's own elements, and of its exchanged halves, by which a function turns arrays of a shape."""
    half = shape[-1] // 2
    cosines, sines = mx.split(
        turn(mx.broadcast_to(mx.concatenate([mx.ones((half,)), mx.zeros((half,))]), shape)), 2, -1
    )
    return mx.concatenate([cosines, cosines], axis=-1), mx.concatenate([-sines, sines], axis=-1)


class SharedRoPE(nn.RoPE):
    """`nn.RoPE` whose cosines and sines are shared with a model's other blocks; takes the place of the plain one."""

    shared: SharedAngles

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Rotate [..., S, D]; [B, H, S, D] in float32 by the shared factors."""
        large = not isinstance(offset, int) and x.shape[-2] > 1  # its factors would stay in memory
        if large or x.dtype != mx.float32 or x.ndim != 4 or x.shape[-1] != self.dims:
            return _rotated(self, x, offset)
        factors, exchanged = self.shared.at(self, offset, x.shape[-2])
        first, second = mx.split(x, 2, axis=-1)
        return x * factors + mx.concatenate([second, first], axis=-1) * exchanged


def _rotated(rope: nn.RoPE, x: mx.array, offset: int | mx.array) -> mx.array:
    return mx.fast.rope(x, rope.dims, traditional=False, base=rope.base, scale=rope.scale, offset=offset)


def share_angles(model: nn.Module) -> None:
    """Let a model's plain rotary embeddings of one kind share their factors; others are left alone."""
    known: dict[tuple[int, float, float], SharedAngles] = {}
    for module in model.modules():
        if type(module) is nn.RoPE and not module.traditional and module.dims % 2 == 0:
            module.__class__ = SharedRoPE
            key = (module.dims, module.base, module.scale)
            object.__setattr__(module, "shared", known.setdefault(key, SharedAngles()))
