"""The plan of a run that starts or goes on: made once, kept in its folder, used again at every resume."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mlx_ppo.config import TrainConfig
from mlx_ppo.errors import RunError
from mlx_ppo.memory.budget import default_budget
from mlx_ppo.memory.phases import Accountant, Choices, Shapes
from mlx_ppo.memory.plan import GIB, Plan, make_plan, needed, plan_of, require_fit
from mlx_ppo.networks.adapters import Weights
from mlx_ppo.networks.roles import Roles
from mlx_ppo.runs import replace_file

PLAN = "plan.json"


def shapes_of(config: TrainConfig, longest_prompt: int) -> Shapes:
    """The largest arrays of a run, evaluations included."""
    section = config.rollout
    responses, evaluated = section.prompts * section.samples_per_prompt, config.data.eval_count
    return Shapes(
        prompt=longest_prompt,
        response=section.max_tokens,
        responses=max(responses, evaluated),
        distinct=max(section.prompts, evaluated),
        minibatch=-(-responses // config.ppo.minibatches),
    )


def budget_of(config: TrainConfig) -> int:
    """Bytes that the configuration allows, or a share of what is free."""
    given = config.memory.budget_gb
    return int(given * GIB) if given else default_budget()


def plan_run(
    config: TrainConfig, loaded: tuple[Roles, Weights, Weights | None], prompts: Sequence[int], folder: Path
) -> Plan:
    """The plan for a run folder: what its `plan.json` says, so that resuming is exact, or a new one, which is kept.

    Args:
        config: the run's.
        loaded: from `load_roles`.
        prompts: tokens of every prompt.
        folder: the run's.
    Raises:
        ConfigError: it doesn't fit the budget.
        RunError: `plan.json` can't be read or written.
    """
    accountant = Accountant(config, *loaded, shapes_of(config, max(prompts)))
    budget, file = budget_of(config), folder / PLAN
    if file.exists():
        try:
            choices = Choices(**json.loads(file.read_text("utf-8"))["choices"])
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(f"{file}: not a plan; remove it to have another one made") from None
        return plan_of(accountant, choices, budget)
    plan = make_plan(accountant, config, budget)
    require_fit(plan, accountant, config)
    document = {
        "choices": asdict(plan.choices),
        "budget_bytes": plan.budget,
        "phases": {phase.name: {"mlx_bytes": phase.peak, "numpy_bytes": phase.outside} for phase in plan.phases},
    }
    replace_file(file, json.dumps(document, indent=2) + "\n")
    return plan


def said(plan: Plan) -> str:
    """A plan in one line."""
    choices, largest = plan.choices, plan.largest
    budget = f" of {plan.budget / GIB:.1f}" if plan.budget is not None else ""
    text = (
        f"memory: up to {plan.process / GIB:.2f} GiB{budget} expected ({largest.name}: {needed(largest) / GIB:.2f}); "
    )
    text += f"together decoded {choices.rollout_batch}, scored {choices.score_batch}, updated {choices.micro_batch}"
    text += ", blocks computed again for the gradient" if choices.checkpointing else ""
    return text + ("" if plan.fits else "; that is more than the budget, as planned when there was more")


def smaller(folder: Path) -> str | None:
    """Make the plan of a run folder one step smaller; a line that says how, or None where nothing can be smaller.

    Raises:
        RunError: `plan.json` can't be read.
    """
    file = folder / PLAN
    if not file.exists():
        return None
    try:
        document = json.loads(file.read_text("utf-8"))
        choices = Choices(**document["choices"])
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{file}: not a plan; remove it to have another one made") from None
    sizes = {name: getattr(choices, name) for name in ("rollout_batch", "score_batch", "micro_batch")}
    if all(size == 1 for size in sizes.values()):
        return None
    halved = {name: (size + 1) // 2 for name, size in sizes.items()}
    replace_file(file, json.dumps({**document, "choices": {**document["choices"], **halved}}, indent=2) + "\n")
    return "smaller plan: " + ", ".join(f"{name} {size}" for name, size in halved.items())
