"""What the process that leads a run tells those that follow it, and how they answer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.runs.checkpoint import Checkpoint
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.runtime.group import Group
from mlx_ppo.runtime.phases import ASKING, Meter

_SEVERAL = 3.0  # times
_NOTHING = 0.02  # seconds


def order(what: str, choices: Choices) -> dict[str, Any]:
    """What is to be done: "iterate", "evaluate" or "restore"."""
    return {"do": what, "choices": asdict(choices)}


class Spent(NamedTuple):
    """What an iteration took of a process."""

    peak: int  # bytes
    seconds: float  # that it computed for


def closing(group: Group, meter: Meter) -> list[Spent]:
    """Meet at the end of an iteration: what it took of each process.

    Of the seconds, those since the meter began.
    """
    computed = sum(took for name, took in meter.seconds.items() if name != ASKING)
    own = np.array([max(meter.peaks.values(), default=0), computed], np.float64)
    return [Spent(int(part[0][0]), float(part[0][1])) for part in group.gather([own])]


def held_up(spent: Sequence[Spent]) -> int | None:
    """The rank of a process that computes several times as long as all others; None where there is none."""
    order = sorted(range(len(spent)), key=lambda rank: spent[rank].seconds)
    slowest, second = spent[order[-1]].seconds, spent[order[-2]].seconds
    return order[-1] if slowest > _SEVERAL * max(second, _NOTHING) else None


def shared(group: Group, saved: Checkpoint | None) -> Checkpoint | None:
    """The leader's checkpoint at every process, to the bit; None where it has none.

    Args:
        group: of processes.
        saved: the leader's; None elsewhere.
    """
    if group.size == 1:
        return saved
    head = None
    if saved is not None:
        kinds = {
            file: {name: [array.shape, str(array.dtype).rpartition(".")[2]] for name, array in arrays.items()}
            for file, arrays in saved.arrays.items()
        }
        head = {"step": saved.step, "state": saved.state, "arrays": kinds}
    head = group.told(head)
    if head is None:
        return None
    arrays = saved.arrays if saved is not None else _empty(head["arrays"])
    given = group.given({f"{file}/{name}": array for file, each in arrays.items() for name, array in each.items()})
    found = {file: {name: given[f"{file}/{name}"] for name in each} for file, each in arrays.items()}
    return Checkpoint(head["step"], found, head["state"], {})


def _empty(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, mx.array]]:
    return {
        file: {name: mx.zeros(shape, getattr(mx, dtype)) for name, (shape, dtype) in each.items()}
        for file, each in kinds.items()
    }
