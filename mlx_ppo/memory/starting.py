"""The plan of a run that starts or goes on: made once, kept in its folder, used again at every resume."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.budget import default_budget
from mlx_ppo.memory.choices import one_smaller, shapes_of
from mlx_ppo.memory.model import config_of, weightless_roles
from mlx_ppo.memory.phases import Accountant
from mlx_ppo.memory.plan import GIB, RUNTIME, Plan, make_plan, needed, plan_of, require_fit
from mlx_ppo.models.load import is_quantised
from mlx_ppo.runs.folder import open_config
from mlx_ppo.runs.plan_file import PlanChange, PlanRecord, read_plan, write_plan


class Planned(NamedTuple):
    """A run's plan, what it was made with, and what the run folder keeps of it."""

    plan: Plan
    accountant: Accountant
    record: PlanRecord


def budget_of(config: TrainConfig) -> int:
    """Bytes that the configuration allows, or a share of what is free."""
    given = config.memory.budget_gb
    return int(given * GIB) if given else default_budget()


def accountant_of(config: TrainConfig, model_config: dict[str, Any] | None, longest_prompt: int) -> Accountant:
    """Predicts a configuration's phases from its models' configs, without their weights.

    Args:
        config: the run's.
        model_config: the content of another config.json for the policy, None for the one in its folder.
        longest_prompt: in tokens.
    Raises:
        ModelError: a folder is damaged, or its architecture isn't known.
    """
    shapes = shapes_of(config, longest_prompt)

    def made(*, compact: bool) -> Accountant:
        return Accountant(config, *weightless_roles(config, model_config, compact=compact), shapes)

    content = model_config if model_config is not None else config_of(config.model.path)
    own = made(compact=False)
    if own.roles.trunk.engine.unpacks(config.model.dtype) and config.model.train == "lora" and is_quantised(content):
        own = Accountant(config, own.roles, own.policy, own.critic, shapes, compact=lambda: made(compact=True))
    return own


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
    accountant = accountant_of(config, None, max(prompts))
    budget = budget_of(config)
    if record is not None:
        overhead = record.overhead or RUNTIME
        plan = plan_of(accountant, record.latest, budget, factors=record.factors, overhead=overhead)
        return Planned(plan, accountant, record)
    plan = make_plan(accountant, config, budget)
    require_fit(plan, accountant, config)
    record = PlanRecord(
        choices=plan.choices,
        budget=budget,
        longest_prompt=accountant.shapes.prompt,
        phases={phase.name: {"mlx_bytes": phase.peak, "numpy_bytes": phase.outside} for phase in plan.phases},
        factors={},
        overhead=None,
    )
    write_plan(record, folder)
    return Planned(plan, accountant, record)


def said(plan: Plan) -> str:
    """A plan in one line."""
    choices, largest = plan.choices, plan.largest
    budget = f" of {plan.budget / GIB:.1f}" if plan.budget is not None else ""
    text = (
        f"memory: up to {plan.process / GIB:.2f} GiB{budget} expected ({largest.name}: {needed(largest) / GIB:.2f}); "
    )
    text += f"together decoded {choices.rollout_batch}, scored {choices.score_batch}, updated {choices.micro_batch}"
    told = {
        "blocks computed again for the gradient": choices.checkpointing,
        "some weights read anew in every iteration": choices.evict,
        "the model kept quantised": choices.compact,
        "keys and values in 8 bits": choices.kv_cache == "8-bit",
    }
    return ", ".join([text, *(what for what, so in told.items() if so)])


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
    change = PlanChange(saved + 1, 0, choices, "the run was killed")
    write_plan(replace(record, changes=(*record.changes, change)), folder)
    return f"a smaller plan: {said}"
