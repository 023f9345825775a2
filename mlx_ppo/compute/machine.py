"""What this machine reaches at best: float32 matrix products, and moving memory."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.device import kind
from mlx_ppo.runtime.system import cores

SIDE = 1024
_TRIALS = 5
_COPIED = 1 << 28  # bytes, far more than a processor's caches hold


def gigaflops(side: int = SIDE, dtype: mx.Dtype = mx.float32) -> float:
    """GFLOP/s (1e9 operations a second) of a product of two square matrices of a type, the best of some trials.

    A product of N x N matrices is counted as 2 N^3 operations.
    """
    left = mx.random.normal((side, side), key=mx.random.key(0)).astype(dtype)
    mx.eval(left)
    return 2 * side**3 / _quickest(lambda: mx.eval(left @ left)) / 1e9


def gigabytes() -> float:
    """GB/s (1e9 bytes a second) read and written by a copy of 256 MiB, the best of some trials.

    On a CPU by a thread for each processor that this process may use; on a GPU by mlx.

    Source: the copy of McCalpin's STREAM, IEEE TCCA Newsletter, December 1995, which counts reads and writes.
    """
    if kind() != "CPU":
        array = mx.ones((_COPIED // 4,))
        mx.eval(array)
        return 2 * _COPIED / _quickest(lambda: mx.eval(-array)) / 1e9
    source, target = np.ones((2, _COPIED // 4), np.float32)
    count = cores()
    pieces = list(zip(np.array_split(target, count), np.array_split(source, count), strict=True))
    with ThreadPoolExecutor(count) as threads:
        return 2 * _COPIED / _quickest(lambda: list(threads.map(lambda pair: np.copyto(*pair), pieces))) / 1e9


def _quickest(work: Callable[[], object]) -> float:
    """Seconds of the best of some trials, after one that isn't counted."""
    work()
    seconds = []
    for _ in range(_TRIALS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
