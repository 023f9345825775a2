"""A run held to its plan: phases measured, predictions corrected, passes made smaller where memory gets short."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_ppo.compute.cpu import threads
from mlx_ppo.compute.device import arrays_are_resident
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.choices import Possible, Shapes
from mlx_ppo.memory.phases import Phase
from mlx_ppo.memory.plan import GIB, RUNTIME, Plan, make_plan, plan_of
from mlx_ppo.memory.processes import LONG, parameters_of
from mlx_ppo.memory.starting import Planned
from mlx_ppo.runs.plan_file import BEGIN, PLACES, Choices, PlanChange, write_plan
from mlx_ppo.runtime.load import Load, left_by
from mlx_ppo.runtime.phases import Limit, Meter
from mlx_ppo.runtime.system import cores

NEAR = 0.97  # of the budget; a plan ends at 0.95
_STATES = "optimizer states"
_SPARE = 32 << 20  # bytes beside arrays that come and go
_LOWEST, _HIGHEST = 0.75, 1.5  # bounds of a correction


class Keeper:
    """Knows which choices hold at which optimizer step, and changes them where measurements ask for it.

    Whatever it decides is written to `plan.json` with its place, so that a resumed run decides the same there.
    """

    def __init__(self, config: TrainConfig, planned: Planned, folder: Path, meter: Meter) -> None:
        """Begin with what the run folder's plan says."""
        self.config, self.folder, self.meter = config, folder, meter
        self.plan, self.accountant, self.record = planned
        self.accountant.possible = Possible(evict=False, compact=False)  # the models are loaded
        self.iteration, self.step, self._tokens = 0, BEGIN, 0
        self.done = 0  # iterations, before this process's first
        self.said: list[str] = []
        self._states_before = 0
        self._load = Load()

    def begin(self, iteration: int, states: int) -> None:
        """An iteration begins, with so many bytes of optimizer states; on as many threads as other programs leave."""
        self.iteration, self.step, self._tokens, self._states_before = iteration, BEGIN, 0, states
        self._change_threads()

    def stage(self, name: str) -> None:
        """A stage of the iteration begins, see `_threads_of_place`."""
        self.step, self._tokens = PLACES[name], 0
        self._threads_of_place()

    def tokens(self, count: int) -> None:
        """So many more have been sampled in this stage, by this process."""
        before = self.now().threads
        self._tokens += count
        if self.record.processes == 1:
            self._change_threads()
            if (now := self.now().threads) != before:
                threads.use(now)

    def _threads_of_place(self) -> None:
        """Within an iteration, a run of one process changes its threads; several have theirs for a whole iteration."""
        if self.record.processes == 1:
            self._change_threads()
            threads.use(self.now().threads)

    def _change_threads(self) -> None:
        """Where large products compete with another program, each thread waits for the slowest at every one of them."""
        if self._load.seconds <= LONG:
            return
        load, self._load = self._load, Load()
        choices, processes = self.now(), self.record.processes
        most = threads.gaining(parameters_of(self.accountant), processes)
        if self.config.parallel.hosts is not None:  # the others' processors aren't known here
            return
        if most == 1 or threads.given() is not None or choices is not self.record.latest or not choices.threads:
            return
        others = load.others
        count = min(most, left_by(others, processes, now=choices.threads))
        if count != choices.threads:
            why = f"other programs keep {others:.1f} of {cores()} processors busy"
            self._change(PlanChange(self.iteration, self.step, replace(choices, threads=count), why, self._tokens))

    def now(self) -> Choices:
        """The choices in effect; before this process's first iteration the latest, as a run that was killed needs.

        Except for the threads: those of the iteration that is done, so that an evaluation is repeated exactly.
        """
        if self.iteration:
            return self.record.at(self.iteration, self.step, self._tokens)
        return replace(self.record.latest, threads=self.record.at(self.done, sys.maxsize).threads)

    def next_step(self) -> Choices:
        """Those of the next optimizer step; smaller passes from here on where the last came near the budget."""
        self._threads_of_place()
        choices = self.now()
        needs, budget = self._needs(), self.plan.budget
        may = not self.config.ppo.micro_batch and choices.micro_batch > 1 and choices is self.record.latest
        if may and budget is not None and needs > NEAR * budget:
            choices = replace(choices, micro_batch=(choices.micro_batch + 1) // 2)
            why = f"{needs / GIB:.2f} GiB needed of {budget / GIB:.2f}"
            self._change(PlanChange(self.iteration, self.step, choices, why))
            self.meter.peaks = {name: peak for name, peak in self.meter.peaks.items() if "update" not in name}
        self.step += 1
        return choices

    def finish(self, lengths: Sequence[tuple[int, int]], states: int) -> None:
        """An iteration is done: after the first one the predictions are corrected by what was measured.

        Args:
            lengths: tokens of the prompt and of the response, of every row.
            states: bytes of optimizer states that there are now.
        """
        if self.record.factors or self.plan.budget is None:
            return
        factors = self._factors(lengths, states)
        overhead = self.meter.overhead() + _SPARE if arrays_are_resident() else RUNTIME
        self.record = replace(self.record, factors=factors, overhead=overhead)
        self.plan = make_plan(
            self.accountant,
            self.config,
            self.plan.budget,
            start=self.record.latest,
            factors=factors,
            overhead=overhead,
        )
        if self.plan.choices != self.record.latest:
            why = "measured more than was expected"
            self._change(PlanChange(self.iteration + 1, BEGIN, self.plan.choices, why))
        else:
            write_plan(self.record, self.folder)

    def messages(self) -> list[str]:
        """What a person should know, each once."""
        said, self.said = self.said, []
        return said

    def _needs(self) -> int:
        """Bytes of the process at its largest in the update so far."""
        outside = {phase.name: phase.outside for phase in self.plan.phases}
        found = [peak + outside.get(name, 0) for name, peak in self.meter.peaks.items() if name.startswith("update")]
        return max(found, default=0) + self.plan.overhead

    def _change(self, change: PlanChange) -> None:
        before, choices = self.record.latest, change.choices
        if replace(choices, threads=before.threads) != before:
            self.meter.limits = limits_of(plan_of(self.accountant, choices, None).phases)
        self.record = replace(self.record, changes=(*self.record.changes, change))
        write_plan(self.record, self.folder)
        fields = vars(choices)
        smaller = ", ".join(f"{name} {fields[name]}" for name in fields if fields[name] != getattr(before, name))
        self.said.append(f"memory: {change.why}; from iteration {change.iteration} on: {smaller}")

    def _factors(self, lengths: Sequence[tuple[int, int]], states: int) -> dict[str, float]:
        """Measured over predicted, for the shapes that this iteration had."""
        accountant = self.accountant
        rows = math.ceil(len(lengths) / self.record.processes)
        actual = accountant.with_shapes(shapes_of_rows(accountant.shapes, lengths)._replace(responses=rows))
        choices = self.record.at(self.iteration, BEGIN)
        planned = {phase.name: phase for phase in plan_of(accountant, choices, None).phases}
        expected = {phase.name: phase for phase in plan_of(actual, choices, None).phases} | {
            "rollout": planned["rollout"]  # its cache has room for responses of full length
        }
        found = {}
        for name, peak in self.meter.peaks.items():
            if name in expected:
                # The first step makes the optimizers' states: passes find them only where another step went before.
                made = name == "update step" or (name.startswith("update") and self.step > 1)
                there = states if made else self._states_before
                there -= planned[name].resident.get(_STATES, 0)
                # Up to the planned peak mlx may run ahead, so that alone says nothing against the prediction.
                ratio = min(peak / (expected[name].peak + there), max(1.0, peak / (planned[name].peak + there)))
                found[name] = min(_HIGHEST, max(_LOWEST, ratio))
        return found


def shapes_of_rows(shapes: Shapes, lengths: Sequence[tuple[int, int]]) -> Shapes:
    """Shapes of which a batch has the size of this iteration's largest: its longest row, and its counted tokens."""
    longest = max(prompt + response for prompt, response in lengths)
    response = max(1, round(sum(response for _, response in lengths) / len(lengths)))
    return shapes._replace(prompt=max(1, longest - response), response=response, responses=len(lengths))


def limits_of(phases: Sequence[Phase]) -> Mapping[str, Limit]:
    """Where mlx is to wait for what it has begun: at a phase's predicted peak, without what it begins ahead.

    By default mlx runs some hundred operations ahead, and peaks are up to twice as high as they need to be.
    """
    return {phase.name: Limit(phase.peak - phase.ahead, phase.transient - phase.ahead) for phase in phases}


def is_tight(plan: Plan) -> bool:
    """Whether one phase's freed buffers are in the way of the next: the cache can't hold what the largest frees."""
    return plan.freed < max(phase.transient for phase in plan.phases)


def opening(plan: Plan) -> dict[str, Any]:
    """What the processes that follow a run need to know of its plan before they load anything; of what JSON has."""
    return {
        "threads": plan.choices.threads,
        "compact": plan.choices.compact,
        "evict": plan.choices.evict,
        "cache": plan.freed,
        "memory": plan.largest.peak,
        "limits": limits_of(plan.phases),
        "clearing": is_tight(plan),
    }
