"""Which engine computes: chosen by the device, or said in an environment variable."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

from mlx_ppo.compute.cpu.engine import CpuEngine
from mlx_ppo.compute.device import kind
from mlx_ppo.compute.engine import Engine
from mlx_ppo.compute.portable import PortableEngine
from mlx_ppo.errors import ConfigError

SWITCH = "MLX_PPO_ENGINE"  # "portable" or "cpu"; otherwise the device decides

_given: ContextVar[Engine | None] = ContextVar("given", default=None)


def chosen_engine() -> Engine:
    """The engine for models that are loaded now.

    Raises:
        ConfigError: the environment names none.
    """
    given = _given.get()
    if given is not None:
        return given
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", CpuEngine.name, PortableEngine.name):
        raise ConfigError(f"{SWITCH}: no engine is called {wanted!r}; choose cpu or portable, or leave it out")
    on_cpu = kind() == "CPU"
    if wanted == PortableEngine.name or not (wanted or on_cpu):
        return PortableEngine(
            f"{SWITCH} says so" if wanted else f"mlx computes by {kind()}",
            remark=f"computed by the portable engine, which is slow on a CPU: {SWITCH} says so" if on_cpu else "",
            fused=not on_cpu,
        )
    if not on_cpu:
        raise ConfigError(f"{SWITCH}: the engine cpu computes on a CPU, and mlx's device here is a GPU")
    return CpuEngine(f"{SWITCH} says so" if wanted else "mlx computes on a CPU")


def engine_for(device: str | None) -> Engine:
    """The engine that a plan assumes for "cpu", "gpu", or (None) this machine.

    Raises:
        ConfigError: see `chosen_engine`.
    """
    if device == "gpu":
        return PortableEngine("planned for a GPU", fused=True)
    return CpuEngine("planned for a CPU") if device == "cpu" else chosen_engine()


@contextmanager
def using(engine: Engine) -> Iterator[None]:
    """Let this engine be chosen for the length of a `with` block."""
    before = _given.set(engine)
    try:
        yield
    finally:
        _given.reset(before)


@contextmanager
def exactly() -> Iterator[None]:
    """Compute on the CPU, where float32 is exact and quantised models are dequantised, for a `with` block."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        with using(CpuEngine("exact")):
            yield
    finally:
        mx.set_default_device(before)
