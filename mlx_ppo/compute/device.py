"""Which device computes: the one place that the networks ask."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

_assumed: ContextVar[bool | None] = ContextVar("assumed", default=None)


def on_cpu() -> bool:
    """Whether mlx computes on the CPU here, or a plan assumes so."""
    assumed = _assumed.get()
    return mx.default_device().type == mx.DeviceType.cpu if assumed is None else assumed


@contextmanager
def assuming(cpu: bool) -> Iterator[None]:
    """Let `on_cpu` say so within a `with` block, to trace what another device would do."""
    before = _assumed.set(cpu)
    try:
        yield
    finally:
        _assumed.reset(before)
