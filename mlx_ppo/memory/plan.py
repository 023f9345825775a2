"""From a budget to choices: the fastest first, smaller ones as needed, and what to change if none fits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.errors import ConfigError
from mlx_ppo.memory.choices import Possible, Shapes, concede
from mlx_ppo.memory.phases import Accountant, Phase
from mlx_ppo.runs.plan_file import Choices

RUNTIME = 170 << 20  # bytes of Python, libraries and what mlx and numpy hold beside arrays; 124 to 182 MiB measured
RESERVE = 0.05  # of the budget, for what a prediction misses
_ROLLOUT, _SCORE = 64, 32  # larger batches gain little
_LONGEST = 1 << 15  # tokens of a response that are looked at
GIB = 1 << 30


class Concession(NamedTuple):
    """What was made smaller to fit."""

    what: str  # key and value
    saved: int  # bytes of the process at its largest; 0 where another phase needs as much


@dataclass(frozen=True)
class Plan:
    """Choices, what they need, and whether that is within the budget."""

    choices: Choices
    phases: tuple[Phase, ...]
    budget: int | None  # bytes of the process; None: no bound
    concessions: tuple[Concession, ...] = ()  # in the order of the search
    overhead: int = RUNTIME  # bytes of the process beside arrays

    @property
    def largest(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=needed)

    @property
    def process(self) -> int:
        """Bytes of the process at its largest, without mlx's cache."""
        return self.overhead + needed(self.largest)

    @property
    def fits(self) -> bool:
        """Whether it stays within the budget, less a reserve."""
        return self.budget is None or self.process <= self.budget * (1 - RESERVE)

    @property
    def freed(self) -> int:
        """Bytes for mlx's cache of freed buffers: what is left, up to the largest transient; more is never used."""
        most = max(phase.transient for phase in self.phases)
        left = most if self.budget is None else int(self.budget * (1 - RESERVE)) - self.process
        return max(0, min(most, left))


def needed(phase: Phase) -> int:
    """Bytes in mlx and numpy together."""
    return phase.peak + phase.outside


def fastest(config: TrainConfig, shapes: Shapes) -> Choices:
    """What is pinned, and the fastest of what is open."""
    pinned = Choices.pinned(config)
    return replace(
        pinned,
        rollout_batch=pinned.rollout_batch or min(_ROLLOUT, shapes.responses),
        score_batch=pinned.score_batch or min(_SCORE, shapes.responses),
        micro_batch=min(pinned.micro_batch or shapes.minibatch, shapes.minibatch),
    )


def smallest(config: TrainConfig, shapes: Shapes, possible: Possible) -> Choices:
    """What is pinned, and what needs least memory of what is open."""
    choices = fastest(config, shapes)
    for phase in ("rollout", "score", "update"):
        while (found := concede(phase, choices, config, shapes, possible)) is not None:
            choices = found[0]
    return choices


def make_plan(
    accountant: Accountant,
    config: TrainConfig,
    budget: int | None,
    *,
    start: Choices | None = None,
    factors: Mapping[str, float] | None = None,
    overhead: int = RUNTIME,
) -> Plan:
    """Choose what the configuration leaves open.

    Args:
        accountant: predicts the phases.
        config: keys that are 0 or "auto" are open; the others are pinned.
        budget: bytes of the process, None for no bound.
        start: choices to begin with, such as those of an interrupted run.
        factors: measured over predicted peaks, by phase, where they are known.
        overhead: bytes of the process beside arrays.
    """
    shapes = accountant.shapes
    made: list[tuple[Choices, Choices, str]] = []
    first = plan = plan_of(accountant, start or fastest(config, shapes), budget, factors=factors, overhead=overhead)
    while not plan.fits:
        smaller = concede(plan.largest.name, plan.choices, config, shapes, accountant.possible)
        if smaller is None:
            break
        before, plan = plan, plan_of(accountant, smaller[0], budget, factors=factors, overhead=overhead)
        made.append((before.choices, plan.choices, smaller[1]))
    left: list[tuple[dict[str, Any], str]] = []
    for faster, slower, what in made:  # those that later ones made needless are taken back
        undone = _taken_back(plan.choices, faster, slower) if plan.fits else None
        trial = plan_of(accountant, undone, budget, factors=factors, overhead=overhead) if undone is not None else None
        if trial is not None and trial.fits:
            plan = trial
        else:
            left.append((_changed(faster, slower), what))
    found, before = [], first
    for changed, what in left:  # what each of the others saves on top of those before it
        after = plan_of(accountant, replace(before.choices, **changed), budget, factors=factors, overhead=overhead)
        found.append(Concession(what, before.process - after.process))
        before = after
    return replace(plan, concessions=tuple(found))


def _changed(before: Choices, after: Choices) -> dict[str, Any]:
    """What one concession made of the choices that it changed."""
    return {name: value for name, value in vars(after).items() if value != getattr(before, name)}


def _taken_back(choices: Choices, faster: Choices, slower: Choices) -> Choices | None:
    """Choices with what one concession changed taken back; None where a later one went further."""
    changed = _changed(slower, faster)
    if any(getattr(choices, name) != getattr(slower, name) for name in changed):
        return None
    return replace(choices, **changed)


def plan_of(
    accountant: Accountant,
    choices: Choices,
    budget: int | None,
    *,
    factors: Mapping[str, float] | None = None,
    overhead: int = RUNTIME,
) -> Plan:
    """What given choices need."""
    phases = [replace(phase, factor=(factors or {}).get(phase.name, 1.0)) for phase in accountant.phases(choices)]
    return Plan(choices, tuple(phases), budget, overhead=overhead)


def require_fit(plan: Plan, accountant: Accountant, config: TrainConfig) -> None:
    """Refuse a plan that is over its budget, and say which key to change and by how much.

    Raises:
        ConfigError: it doesn't fit.
    """
    if plan.fits:
        return
    assert plan.budget is not None
    has = math.floor(100 * plan.budget / GIB) / 100
    wanted = math.ceil(100 * plan.process / (1 - RESERVE) / GIB) / 100  # rounded up: what is said has to be enough
    resident = plan.overhead + sum(plan.largest.resident.values())
    what, size = max(plan.largest.resident.items(), key=lambda item: item[1])
    if plan.overhead > max(size, plan.budget // 2):
        mend = f"Python and its libraries alone take {plan.overhead / GIB:.2f} GiB; train a smaller model"
    elif resident > plan.budget * (1 - RESERVE):
        mend = f"the {what} alone take {size / GIB:.2f} GiB; choose a smaller or quantised model"
        if accountant.possible.evict and not plan.choices.evict:
            mend += ", or memory.residency = 'evict'"
    else:
        longest = longest_response(accountant, config, plan.budget)
        mend = f"the phase {plan.largest.name!r} takes most; "
        mend += f"rollout.max_tokens = {longest} would fit" if longest else "lower data.max_prompt_tokens"
    raise ConfigError(
        f"memory.budget_gb: the run needs {wanted:.2f} GiB and has {has:.2f}: {mend}, or allow it {wanted:.2f}"
    )


def longest_response(accountant: Accountant, config: TrainConfig, budget: int) -> int:
    """About the largest rollout.max_tokens that would fit with the smallest choices; 0 where not even 1 would.

    Memory is a quadratic function of the length, because of attention; it is taken through three lengths.
    """
    choices = smallest(config, accountant.shapes, accountant.possible)
    lengths = [1, 256, 1024]
    sizes = []
    for length in lengths:
        other = accountant.with_shapes(accountant.shapes._replace(response=length))
        sizes.append(plan_of(other, choices, budget).process - budget * (1 - RESERVE))
    if sizes[0] > 0:
        return 0
    square, slope, constant = np.polyfit(lengths, sizes, 2)
    roots = np.roots([square, slope, constant]) if square > 1e-6 else np.array([-constant / slope])
    found = [float(root.real) for root in roots if abs(root.imag) < 1e-6 and root.real >= 1]
    return min(int(min(found, default=_LONGEST)), _LONGEST)
