"""What a plan may choose for a run's shapes, and in which order it gives ground. Nothing heavy here."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.runs.plan_file import Choices, PlanRecord

_FEW_ROWS = 8  # computed together; fewer make products slow, so reading weights anew, or 8-bit keys, come first
_FEW_TOKENS = 256  # of a micro-batch; fewer make products slow, so checkpointing comes first
_FEW_POSITIONS = 64  # whose logits are computed together; fewer save little


class Shapes(NamedTuple):
    """The largest arrays of a run."""

    prompt: int  # tokens of the longest prompt
    response: int  # tokens of the longest response
    responses: int  # of an iteration, of one process
    distinct: int  # prompts of an iteration, of one process
    minibatch: int  # responses of an optimizer step, of one process
    everywhere: int = 0  # responses of an iteration, of all processes; 0: there is one


class Possible(NamedTuple):
    """What a model leaves to choose."""

    evict: bool
    compact: bool


def shapes_of(config: TrainConfig, longest_prompt: int, processes: int = 1) -> Shapes:
    """The largest arrays of a run, evaluations included, in one of the processes that share it."""
    section = config.rollout
    samples, evaluated = section.samples_per_prompt, config.data.eval_count
    responses = section.prompts * samples
    prompts, own_evaluated = math.ceil(section.prompts / processes), math.ceil(evaluated / processes)
    return Shapes(
        prompt=longest_prompt,
        response=section.max_tokens,
        responses=max(prompts * samples, own_evaluated),
        distinct=max(prompts, own_evaluated),
        minibatch=math.ceil(math.ceil(responses / config.ppo.minibatches) / processes),
        everywhere=max(responses, evaluated),
    )


def concede(
    phase: str, choices: Choices, config: TrainConfig, shapes: Shapes, possible: Possible
) -> tuple[Choices, str] | None:
    """One step smaller where a phase needs it, the step that costs least time first.

    Args:
        phase: name of the phase that needs most.
        choices: so far.
        config: keys that are 0 or "auto" are open; the others are pinned.
        shapes: of the run.
        possible: what the models leave to choose.
    Returns:
        The smaller choices and what was changed, None where everything is pinned or at its smallest.
    """
    steps: list[tuple[str, Any]] = []
    rows = 0
    if phase == "rollout":
        steps, rows = _smaller_rollout(choices, config), choices.rollout_batch
    elif phase.startswith("score"):
        steps, rows = _smaller_scores(choices, config), choices.score_batch
    elif phase.startswith("update") and phase != "update step":
        steps, rows = _smaller_update(choices, config, shapes.prompt + shapes.response), choices.micro_batch
    if possible.evict and config.memory.residency == "auto" and not choices.evict:
        steps.insert(len(steps) if rows > _FEW_ROWS else 0, ("evict", True))
    if possible.compact and config.memory.compact == "auto" and not choices.compact:
        steps.append(("compact", True))
    if not steps:
        return None
    name, value = steps[0]
    return replace(choices, **{name: value}), f"{_KEYS[name]} {_said(value)}"


def _smaller_rollout(choices: Choices, config: TrainConfig) -> list[tuple[str, Any]]:
    steps: list[tuple[str, Any]] = []
    rows = choices.rollout_batch
    if not config.rollout.batch_size and rows > 1:
        steps.append(("rollout_batch", (rows + 1) // 2))
    if config.rollout.kv_cache == "auto" and choices.kv_cache == "full":
        steps.append(("kv_cache", "8-bit"))
        if rows <= _FEW_ROWS:
            steps.reverse()
    return steps


def _smaller_scores(choices: Choices, config: TrainConfig) -> list[tuple[str, Any]]:
    if not config.score.batch_size and choices.score_batch > 1:
        return [("score_batch", (choices.score_batch + 1) // 2)]
    return _fewer_positions(choices, config)


def _smaller_update(choices: Choices, config: TrainConfig, length: int) -> list[tuple[str, Any]]:
    steps = _fewer_positions(choices, config)
    rows = choices.micro_batch
    open_batch = not config.ppo.micro_batch and rows > 1
    if config.ppo.gradient_checkpointing == "auto" and not choices.checkpointing:
        steps.append(("checkpointing", True))
    if open_batch:
        steps.append(("micro_batch", (rows + 1) // 2))
        if rows * length > 2 * _FEW_TOKENS:
            steps.reverse()
    return steps


def _fewer_positions(choices: Choices, config: TrainConfig) -> list[tuple[str, Any]]:
    if config.memory.positions or choices.positions == _FEW_POSITIONS:
        return []
    return [("positions", _FEW_POSITIONS)]


_KEYS = {
    "rollout_batch": "rollout.batch_size",
    "score_batch": "score.batch_size",
    "micro_batch": "ppo.micro_batch",
    "checkpointing": "ppo.gradient_checkpointing",
    "evict": "memory.residency",
    "compact": "memory.compact",
    "positions": "memory.positions",
    "kv_cache": "rollout.kv_cache",
}


def _said(value: object) -> str:
    return "on" if value is True else str(value)


def one_smaller(record: PlanRecord, config: TrainConfig, first: Sequence[str] = ()) -> tuple[Choices, str] | None:
    """The choices that a run should go on with after it was killed for its memory, and what is smaller in them.

    Args:
        record: the run's plan.
        config: the run's.
        first: phases to look at before those that were expected to need most.
    """
    sizes = {name: size["mlx_bytes"] + size["numpy_bytes"] for name, size in record.phases.items()}
    order: Iterable[str] = [*first, *sorted(sizes, key=lambda name: -sizes[name])]
    shapes = shapes_of(config, record.longest_prompt, record.processes)
    for name in order:
        found = concede(name, record.latest, config, shapes, Possible(evict=False, compact=False))
        if found is not None:
            return found
    return None
