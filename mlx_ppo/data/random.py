"""One way to derive random generators from named parts, so that every draw can be repeated without stored state."""

import operator
from hashlib import blake2b

import mlx.core as mx
import numpy as np


def philox(*parts: int | str) -> np.random.Generator:
    """A numpy generator whose 128-bit key depends on the parts and nothing else."""
    return np.random.Generator(np.random.Philox(key=_digest(parts, size=16)))


def mx_key(*parts: int | str) -> mx.array:
    """A key for mx.random's functions that depends on the parts and nothing else."""
    return mx.random.key(_digest(parts, size=8))


def _digest(parts: tuple[int | str, ...], *, size: int) -> int:
    # numpy's integers have another repr than Python's, and must not lead to another generator
    plain = tuple(part if isinstance(part, str) else operator.index(part) for part in parts)
    return int.from_bytes(blake2b(repr(plain).encode(), digest_size=size).digest(), "little")
