"""The plan of a run that starts or goes on: made once, kept in its folder, used again at every resume."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.errors import ConfigError
from mlx_ppo.memory.budget import default_budget
from mlx_ppo.memory.choices import one_smaller, shapes_of
from mlx_ppo.memory.model import config_of, weightless_roles
from mlx_ppo.memory.phases import OF_LEADER, Accountant, Phase
from mlx_ppo.memory.plan import GIB, RUNTIME, Plan, make_plan, needed, plan_of, require_fit
from mlx_ppo.memory.processes import first_threads, most_processes, parameters_of
from mlx_ppo.models.load import is_quantised
from mlx_ppo.runs.folder import open_config
from mlx_ppo.runs.plan_file import BEGIN, PlanChange, PlanRecord, read_plan, write_plan
from mlx_ppo.runtime.hosts import Place, placed

_MIB = 1 << 20
_OF_TOKEN = 8  # bytes of a prompt's token, as a rollout keeps it
_OF_SLOT = 28  # of a response's: token, four kinds of log-probability and entropy, value, advantage, mask


class Planned(NamedTuple):
    """A run's plan, what it was made with, and what the run folder keeps of it."""

    plan: Plan
    accountant: Accountant
    record: PlanRecord


def budget_of(config: TrainConfig) -> int:
    """Bytes that the configuration allows, or a share of what is free."""
    given = config.memory.budget_gb
    return int(given * GIB) if given else default_budget()


def accountant_of(
    config: TrainConfig, model_config: dict[str, Any] | None, longest_prompt: int, processes: int = 1
) -> Accountant:
    """Predicts a configuration's phases from its models' configs, without their weights.

    Args:
        config: the run's.
        model_config: the content of another config.json for the policy, None for the one in its folder.
        longest_prompt: in tokens.
        processes: that share the run.
    Raises:
        ModelError: a folder is damaged, or its architecture isn't known.
    """
    shapes = shapes_of(config, longest_prompt, processes)

    def made(*, compact: bool) -> Accountant:
        return Accountant(config, *weightless_roles(config, model_config, compact=compact), shapes)

    content = model_config if model_config is not None else config_of(config.model.path)
    own = made(compact=False)
    if own.roles.trunk.engine.unpacks(config.model.dtype) and config.model.train == "lora" and is_quantised(content):
        own = Accountant(config, own.roles, own.policy, own.critic, shapes, compact=lambda: made(compact=True))
    return own


def require_countable(config: TrainConfig, longest_prompt: int, budget: int) -> None:
    """Refuse, before anything is traced, more responses than could be kept as mere numbers.

    Raises:
        ConfigError: says what they would need.
    """
    shapes = shapes_of(config, longest_prompt)
    needs = shapes.responses * (_OF_TOKEN * shapes.prompt + _OF_SLOT * shapes.response)
    if needs > budget:
        raise ConfigError(
            f"memory.budget_gb: {shapes.responses} responses of up to {shapes.response} tokens are answered together, "
            f"whose numbers alone take {needs / GIB:.1f} GiB of {budget / GIB:.1f}; lower rollout.prompts, "
            "rollout.samples_per_prompt, rollout.max_tokens or data.eval_count"
        )


def _asked(config: TrainConfig) -> tuple[Place | None, int]:
    """The machines that share a run, None where this one does it, and the processes asked for; 0 leaves them open."""
    place = placed(config.parallel.hosts, rank=0)
    return place, len(place.hosts) if place is not None else config.parallel.processes


def new_plan(config: TrainConfig, prompts: Sequence[int], budget: int) -> tuple[Plan, Accountant, int]:
    """A plan that fits, what it was made with, and how many processes it is for, which have the budget together.

    Raises:
        ConfigError: none does.
        ModelError: a folder is damaged.
    """
    require_countable(config, max(prompts), budget)
    accountant = accountant_of(config, None, max(prompts))
    place, wanted = _asked(config)
    processes = wanted or most_processes(config, accountant)
    while True:
        shared = accountant.with_shapes(shapes_of(config, max(prompts), processes))
        here = processes if place is None else 1
        plan = make_plan(shared, config, budget // here)
        if plan.fits or processes == 1 or wanted:
            require_fit(plan, shared, config)
            count = first_threads(parameters_of(accountant), here)
            return replace(plan, choices=replace(plan.choices, threads=count)), shared, processes
        processes -= 1


def plan_run(config: TrainConfig, prompts: Sequence[int], folder: Path) -> Planned:
    """The plan for a run folder: what its `plan.json` says, so that resuming is exact, or a new one, which is kept.

    Args:
        config: the run's.
        prompts: tokens of every prompt.
        folder: the run's.
    Raises:
        ConfigError: it doesn't fit the budget.
        ModelError: a folder is damaged.
        RunError: `plan.json` can't be read or written.
    """
    record = read_plan(folder)
    budget = budget_of(config)
    place, wanted = _asked(config)
    if record is not None and wanted in (0, record.processes):
        accountant = accountant_of(config, None, max(prompts), record.processes)
        overhead, own = record.overhead or RUNTIME, budget // (record.processes if place is None else 1)
        plan = plan_of(accountant, record.latest, own, factors=record.factors, overhead=overhead)
        return Planned(plan, accountant, record)
    plan, accountant, processes = new_plan(config, prompts, budget)
    record = PlanRecord(
        choices=plan.choices,
        processes=processes,
        budget=plan.budget,
        longest_prompt=accountant.shapes.prompt,
        phases={phase.name: _sizes(phase) for phase in plan.phases},
        factors={},
        overhead=None,
    )
    write_plan(record, folder)
    return Planned(plan, accountant, record)


def _sizes(phase: Phase) -> dict[str, int]:
    """A phase as `plan.json` has it."""
    leading = {"leader_bytes": phase.resident[OF_LEADER]} if OF_LEADER in phase.resident else {}
    return {"mlx_bytes": phase.peak, "numpy_bytes": phase.outside, **leading}


def said(plan: Plan, processes: int) -> str:
    """A plan in one line."""
    choices, largest = plan.choices, plan.largest
    budget = f" of {plan.budget / GIB:.1f}" if plan.budget is not None else ""
    each = f"{processes} processes, each of them " if processes > 1 else ""
    text = f"memory: {each}up to {plan.process / GIB:.2f} GiB{budget} expected "
    text += f"({largest.name}: {needed(largest) / GIB:.2f}); "
    text += f"together decoded {choices.rollout_batch}, scored {choices.score_batch}, updated {choices.micro_batch}"
    told = {
        "blocks computed again for the gradient": choices.checkpointing,
        "some weights read anew in every iteration": choices.evict,
        "the model kept quantised": choices.compact,
        "keys and values in 8 bits": choices.kv_cache == "8-bit",
    }
    return ", ".join([text, *(what for what, so in told.items() if so)])


def held(peaks: Sequence[int], record: PlanRecord) -> str:
    """What each process of a run needed in arrays, beside what the first plan expected of it, in one line."""
    both = zip(peaks, expected_peaks(record), strict=True)
    each = ", ".join(f"{peak / _MIB:.0f} of {planned / _MIB:.0f} ({peak / planned - 1:+.0%})" for peak, planned in both)
    return f"memory: arrays of each process at most, of what was planned for it, in MiB: {each}"


def expected_peaks(record: PlanRecord) -> list[int]:
    """Bytes of arrays that the first plan expects at most, by process; the first keeps more than the others."""
    phases = record.phases.values()
    own = max(phase["mlx_bytes"] for phase in phases)
    others = max(phase["mlx_bytes"] - phase.get("leader_bytes", 0) for phase in phases)
    return [own, *[others] * (record.processes - 1)]


def smaller(folder: Path) -> str | None:
    """Make the plan of a run that was killed one step smaller from its last checkpoint on.

    Returns:
        A line that says what is smaller; None where nothing can be.
    Raises:
        RunError: `plan.json` can't be read or written.
    """
    record, config = read_plan(folder), open_config(folder)
    found = one_smaller(record, config) if record is not None and isinstance(config, TrainConfig) else None
    if record is None or found is None:
        return None
    choices, said = found
    saved = max((int(item.name) for item in (folder / "checkpoints").glob("[0-9]*")), default=0)
    change = PlanChange(saved + 1, BEGIN, choices, "the run was killed")
    write_plan(replace(record, changes=(*record.changes, change)), folder)
    return f"a smaller plan: {said}"
