"""From a budget to batch sizes: the fastest choices first, smaller ones as needed, and what to change if none fits."""

from dataclasses import dataclass, replace

import numpy as np

from mlx_ppo.config import TrainConfig
from mlx_ppo.errors import ConfigError
from mlx_ppo.memory.phases import Accountant, Choices, Phase, Shapes

RUNTIME = 400 << 20  # bytes of the process beside arrays: Python, libraries, tokenizers
RESERVE = 0.05  # of the budget, for what a prediction misses
_ROLLOUT, _SCORE = 64, 32  # larger batches gain little
_LONGEST = 1 << 15  # tokens of a response that are looked at
GIB = 1 << 30
_FEW_TOKENS = 256  # of a micro-batch; fewer make products slow, so checkpointing comes first


@dataclass(frozen=True)
class Plan:
    """Choices, what they need, and whether that is within the budget."""

    choices: Choices
    phases: tuple[Phase, ...]
    budget: int | None  # bytes of the process; None: no bound
    freed: int  # bytes of mlx's cache of freed buffers
    concessions: tuple[str, ...]  # what was made smaller, in the order of the search

    @property
    def largest(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=needed)

    @property
    def process(self) -> int:
        """Bytes of the process at its largest, without mlx's cache."""
        return RUNTIME + needed(self.largest)

    @property
    def fits(self) -> bool:
        """Whether it stays within the budget, less a reserve."""
        return self.budget is None or self.process <= self.budget * (1 - RESERVE)


def needed(phase: Phase) -> int:
    """Bytes in mlx and numpy together."""
    return phase.peak + phase.outside


def make_plan(accountant: Accountant, config: TrainConfig, budget: int | None) -> Plan:
    """Choose what the configuration leaves open.

    Args:
        accountant: predicts the phases.
        config: keys that are 0 or "auto" are open; the others are pinned.
        budget: bytes of the process, None for no bound.
    """
    shapes = accountant.shapes
    choices = Choices(
        rollout_batch=config.rollout.batch_size or min(_ROLLOUT, shapes.responses),
        score_batch=config.score.batch_size or min(_SCORE, shapes.responses),
        micro_batch=min(config.ppo.micro_batch or shapes.minibatch, shapes.minibatch),
        checkpointing=config.ppo.gradient_checkpointing == "on",
    )
    concessions: list[str] = []
    while True:
        plan = Plan(choices, tuple(accountant.phases(choices)), budget, 0, tuple(concessions))
        smaller = None if plan.fits else _concede(plan, config, shapes.prompt + shapes.response)
        if smaller is None:
            return _with_cache(plan)
        choices, said = smaller
        concessions.append(said)


def plan_of(accountant: Accountant, choices: Choices, budget: int | None) -> Plan:
    """The plan that consists of these choices, such as an interrupted run's: others would change its last digits."""
    return _with_cache(Plan(choices, tuple(accountant.phases(choices)), budget, 0, ()))


def require_fit(plan: Plan, accountant: Accountant, config: TrainConfig) -> None:
    """Refuse a plan that is over its budget, and say which key to change and by how much.

    Raises:
        ConfigError: it doesn't fit.
    """
    if plan.fits:
        return
    assert plan.budget is not None
    wanted = plan.process / (1 - RESERVE) / GIB
    resident = RUNTIME + sum(plan.largest.resident.values())
    what, size = max(plan.largest.resident.items(), key=lambda item: item[1])
    if resident > plan.budget * (1 - RESERVE):
        mend = f"the {what} alone take {size / GIB:.2f} GiB; choose a smaller or quantised model"
    else:
        longest = longest_response(accountant, config, plan.budget)
        mend = f"the phase {plan.largest.name!r} takes most; "
        mend += f"rollout.max_tokens = {longest} would fit" if longest else "lower data.max_prompt_tokens"
    raise ConfigError(
        f"memory.budget_gb: the run needs {wanted:.2f} GiB and has {plan.budget / GIB:.2f}: {mend}, "
        f"or allow it {wanted:.2f}"
    )


def longest_response(accountant: Accountant, config: TrainConfig, budget: int) -> int:
    """About the largest rollout.max_tokens that would fit with the smallest choices; 0 where not even 1 would.

    Memory is a quadratic function of the length, because of attention; it is taken through three lengths.
    """
    smallest = _smallest(config, accountant.shapes)
    lengths = [1, 256, 1024]
    sizes = [
        max(map(needed, accountant.with_response(length).phases(smallest))) - (budget * (1 - RESERVE) - RUNTIME)
        for length in lengths
    ]
    if sizes[0] > 0:
        return 0
    square, slope, constant = np.polyfit(lengths, sizes, 2)
    roots = np.roots([square, slope, constant]) if square > 1e-6 else np.array([-constant / slope])
    found = [float(root.real) for root in roots if abs(root.imag) < 1e-6 and root.real >= 1]
    return min(int(min(found, default=_LONGEST)), _LONGEST)


def _smallest(config: TrainConfig, shapes: Shapes) -> Choices:
    """What needs least memory of what the configuration leaves open."""
    return Choices(
        rollout_batch=config.rollout.batch_size or 1,
        score_batch=config.score.batch_size or 1,
        micro_batch=min(config.ppo.micro_batch or 1, shapes.minibatch),
        checkpointing=config.ppo.gradient_checkpointing != "off",
    )


def _concede(plan: Plan, config: TrainConfig, length: int) -> tuple[Choices, str] | None:
    """One step smaller where it counts; None where everything there is pinned or at its smallest."""
    name, choices = plan.largest.name, plan.choices
    if name == "rollout" and not config.rollout.batch_size and choices.rollout_batch > 1:
        size = (choices.rollout_batch + 1) // 2
        return replace(choices, rollout_batch=size), f"rollout.batch_size {size}"
    if name.startswith("score") and not config.score.batch_size and choices.score_batch > 1:
        size = (choices.score_batch + 1) // 2
        return replace(choices, score_batch=size), f"score.batch_size {size}"
    if name.startswith("update") and name != "update step":
        open_batch = not config.ppo.micro_batch and choices.micro_batch > 1
        open_checkpointing = config.ppo.gradient_checkpointing == "auto" and not choices.checkpointing
        if open_checkpointing and (not open_batch or choices.micro_batch * length <= 2 * _FEW_TOKENS):
            return replace(choices, checkpointing=True), "ppo.gradient_checkpointing on"
        if open_batch:
            size = (choices.micro_batch + 1) // 2
            return replace(choices, micro_batch=size), f"ppo.micro_batch {size}"
    return None


def _with_cache(plan: Plan) -> Plan:
    """Give mlx's cache what is left, up to the largest transient: more is never used again."""
    most = max(phase.transient for phase in plan.phases)
    left = most if plan.budget is None else int(plan.budget * (1 - RESERVE)) - plan.process
    return replace(plan, freed=max(0, min(most, left)))


def applied(config: TrainConfig, plan: Plan) -> TrainConfig:
    """The configuration with the plan's choices in place of what was open."""
    choices = plan.choices
    rollout = config.rollout.model_copy(update={"batch_size": choices.rollout_batch})
    score = config.score.model_copy(update={"batch_size": choices.score_batch})
    checkpointing = "on" if choices.checkpointing else "off"
    update = {"micro_batch": choices.micro_batch, "gradient_checkpointing": checkpointing}
    return config.model_copy(update={"rollout": rollout, "score": score, "ppo": config.ppo.model_copy(update=update)})
