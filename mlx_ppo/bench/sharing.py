"""What an iteration would take where several processes or machines share it: computed from one that was measured.

    seconds(n) = shared / gain(n) * largest part(n) * n + alone + sent(n) / bandwidth + hops(n) * latency

Decoding isn't divided as the rest is: a token of one row takes nearly as long as one of several where reading the
weights takes the time. It is measured twice, for all prompts and for one, and taken to be linear between.
A sum of S bytes round a ring of n is sent as 2 (n - 1) / n * S bytes by each, in 2 (n - 1) hops; a gathering of s
bytes from each as (n - 1) s, in n - 1 hops. In memory that processes share each reads the others' (n - 1) S or
(n - 1) s bytes, and the one that leads meets them in turn.

Source: Patarasu and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations", section 3.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_ppo.bench.operations import DECODE
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.choices import shapes_of
from mlx_ppo.memory.phases import Accountant
from mlx_ppo.runtime.group import Group
from mlx_ppo.runtime.local_group import local_group

_SMALL = 6  # exchanges of an iteration that carry next to nothing: orders, scores, its end
_TOKEN = 8  # bytes of a sampled one: its number and log-probability
_NUMBER = 4  # bytes
_TRIAL = 1 << 23  # bytes
_TIMES = 20
_ALONE = ("update step", "between")  # what every process does in full


class Line(NamedTuple):
    """What connects processes."""

    bandwidth: float  # bytes a second
    latency: float  # seconds


class Exchanged(NamedTuple):
    """Of each process in an iteration."""

    sent: float  # bytes
    hops: int


def exchanged(
    config: TrainConfig, accountant: Accountant, prompt: int, processes: int, *, memory: bool = False
) -> Exchanged:
    """What each of so many processes sends in an iteration whose responses all have full length.

    Args:
        config: the run's.
        accountant: knows the sizes of what is trained.
        prompt: tokens of each prompt.
        processes: how many.
        memory: they share memory, and "send" what they read of each other.
    """
    section, others = config.rollout, processes - 1
    response, trunk = section.max_tokens, accountant.roles.trunk
    responses = section.prompts * section.samples_per_prompt
    own = math.ceil(section.prompts / processes) * section.samples_per_prompt
    gathered = own * response * _TOKEN
    if trunk.split:
        gathered += own * (prompt + response) * trunk.width * trunk.dtype.size
    columns = 3 + (accountant.critic is not None)  # old, entropy, reference, values
    gathered += math.ceil(responses / processes) * response * columns * _NUMBER
    trained = [*accountant.policy.arrays.values()]
    trained += [] if accountant.critic is None else [*accountant.critic.arrays.values()]
    rows = math.ceil(responses / config.ppo.minibatches)
    summed = sum(array.size for array in trained) * _NUMBER + 2 * rows * response * _NUMBER
    steps = config.ppo.epochs * config.ppo.minibatches
    sent = others * (gathered + steps * summed * (1 if memory else 2 / processes))
    if memory:
        return Exchanged(sent, 2 * others * (steps + 3 + _SMALL))
    buckets = max(1, math.ceil(summed / _NUMBER / (1 << 21)))
    return Exchanged(sent, others * (2 * steps * buckets + 3 + _SMALL))


class Expected(NamedTuple):
    """An iteration as it would be, in seconds."""

    computing: float
    exchanging: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.computing + self.exchanging


class Parts(NamedTuple):
    """Of an iteration of one process, in seconds."""

    seconds: Mapping[str, float]  # by phase
    one_prompt: float  # what decoding takes where there is but one


def expected(config: TrainConfig, measured: Parts, own: Exchanged, line: Line, processes: int, gain: float) -> Expected:
    """An iteration that so many processes share.

    Args:
        config: the run's.
        measured: an iteration of one process.
        own: what each sends.
        line: between them.
        processes: how many.
        gain: how many times as much all of them compute in a second as the one that was measured.
    """
    alone = sum(took for name, took in measured.seconds.items() if name in _ALONE)
    shapes = shapes_of(config, 1, processes)
    rows = math.ceil(config.rollout.prompts * config.rollout.samples_per_prompt / config.ppo.minibatches)
    computing = alone
    for name, took in measured.seconds.items():
        if name not in _ALONE:
            part, whole = (shapes.minibatch, rows) if name.startswith("update") else _prompts(config, processes)
            own_part = took * part / whole
            if name == DECODE and whole > 1:
                own_part = measured.one_prompt + (took - measured.one_prompt) * (part - 1) / (whole - 1)
            computing += own_part * processes / gain
    return Expected(computing, own.sent / line.bandwidth + own.hops * line.latency if processes > 1 else 0.0)


def _prompts(config: TrainConfig, processes: int) -> tuple[int, int]:
    """Those of the process with most, and all."""
    return math.ceil(config.rollout.prompts / processes), config.rollout.prompts


def memory_line(worker: Path, patience: float) -> Line:
    """The line between two processes of this machine, by a short trial.

    Args:
        worker: the file that the other one runs; it is told to do `answer`.
        patience: seconds that they wait for each other.
    Raises:
        ProcessLost: the other one doesn't come.
    """
    with local_group(worker, {"trial": True}, processes=2, patience=patience) as group:
        large, small = answer(group)
    return Line((_TRIAL / max(large - small, 1e-9)), small / 2)


def answer(group: Group) -> tuple[float, float]:
    """Seconds of a sum of eight megabytes and of one of nothing, at their quickest; both processes do this.

    Of two each reads as many bytes of the other as are summed, after one meeting.
    """
    found = []
    for size in (_TRIAL // 4, 1):
        array, times = mx.zeros((size,)), []
        for _ in range(_TIMES):
            started = time.monotonic()
            group.total({"trial": array})
            times.append(time.monotonic() - started)
        found.append(min(times))
    return found[0], found[1]
