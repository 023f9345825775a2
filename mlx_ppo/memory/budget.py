"""How much memory there is, and mlx's limits while a run lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import psutil

from mlx_ppo.compute.device import working_set
from mlx_ppo.memory.plan import Plan

_SHARE = 0.75  # of what is free
_WORKING_SET = 0.9  # of what Metal recommends
_WIRED_SPARE = 1 << 30  # bytes beside weights and caches
_CGROUP = Path("/sys/fs/cgroup")


def default_budget() -> int:
    """Bytes that a run may use where its configuration says nothing."""
    free = psutil.virtual_memory().available
    limit = cgroup_room()
    if limit is not None:
        free = min(free, limit)
    budget = int(_SHARE * free)
    recommended = working_set()
    return budget if recommended is None else min(budget, int(_WORKING_SET * recommended))


def cgroup_room() -> int | None:
    """What a control group (a container, a slice) leaves of its limit; None without one. Caches of files don't count.

    Source: Linux, Documentation/admin-guide/cgroup-v2, memory.max, memory.current, memory.stat.
    """
    try:
        limit = (_CGROUP / "memory.max").read_text("ascii").strip()
        if limit == "max":
            return None
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text("ascii").splitlines())
        used = int((_CGROUP / "memory.current").read_text("ascii")) - int(stat.get("inactive_file", 0))
        return int(limit) - used
    except (OSError, ValueError):
        return None


@contextmanager
def keeping_to(plan: Plan) -> Iterator[None]:
    """Mlx's limits for the length of a `with` block; the former ones come back, whatever happens.

    The cache of freed buffers gets what the plan leaves. The memory limit, from which on mlx waits for what it has
    begun, is the largest phase's peak outside of phases that have a limit of their own (see `keeping.limits_of`). On
    Metal, weights and caches are kept wired, never the whole working set.
    """
    cache = mx.set_cache_limit(plan.freed)
    memory = mx.set_memory_limit(plan.largest.peak)
    recommended, wired = working_set(), None
    if recommended is not None:
        resident = sum(plan.largest.resident.values())
        wired = mx.set_wired_limit(min(resident + _WIRED_SPARE, int(_WORKING_SET * recommended)))
    try:
        yield
    finally:
        mx.set_cache_limit(cache)
        mx.set_memory_limit(memory)
        if wired is not None:
            mx.set_wired_limit(wired)
        mx.clear_cache()
