"""How much freed memory mlx keeps for its next arrays."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_MOST = 2 << 30  # bytes
_SHARE = 16  # of the machine's memory


@contextmanager
def keeping_buffers() -> Iterator[None]:
    """On the CPU, let mlx keep up to 2 GiB (or a 16th of the machine's memory) of freed buffers; then as before.

    Its default there is 32 MiB, so that nearly every large array is new memory, which the system clears page by page:
    that was 40 % of the time of a forward and backward pass through a model of 135 M parameters. On a GPU mlx's own
    default stays.
    """
    import mlx.core as mx

    if mx.default_device().type != mx.DeviceType.cpu:
        yield
        return
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    before = mx.set_cache_limit(min(_MOST, machine // _SHARE))
    try:
        yield
    finally:
        mx.set_cache_limit(before)
        mx.clear_cache()
