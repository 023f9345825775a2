"""What `plan.json` of a run says: what its memory plan has chosen, and from where on which choices hold."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.errors import RunError
from mlx_ppo.runs.folder import replace_file

PLAN = "plan.json"
_FIXED = ("evict", "compact")  # how models are loaded; all other choices may change in mid-run


@dataclass(frozen=True)
class Choices:
    """What a run may change as it goes. None changes what is computed but for rounding, except `kv_cache`."""

    rollout_batch: int
    score_batch: int
    micro_batch: int
    checkpointing: bool
    evict: bool = False  # weights that only some phases read are read anew in every iteration
    compact: bool = False  # a quantised model stays quantised on a CPU
    positions: int = 0  # response positions whose logits are computed together; 0: as many as is fast
    kv_cache: str = "full"  # or "8-bit"
    threads: int = 0  # of a process's products on a CPU; 0: as the engine says

    @classmethod
    def pinned(cls, config: TrainConfig) -> "Choices":
        """What the configuration itself says, where no plan was made: 0 is all together, "auto" the fastest."""
        return cls(
            rollout_batch=config.rollout.batch_size,
            score_batch=config.score.batch_size,
            micro_batch=config.ppo.micro_batch,
            checkpointing=config.ppo.gradient_checkpointing == "on",
            evict=config.memory.residency == "evict",
            compact=config.memory.compact == "on",
            positions=config.memory.positions,
            kv_cache="8-bit" if config.rollout.kv_cache == "8-bit" else "full",
        )


PLACES = {"rollout": -2, "score": -1, "update": 0}  # where stages begin, as optimizer steps of the iteration
BEGIN = min(PLACES.values())


class PlanChange(NamedTuple):
    """Choices that hold from an optimizer step of an iteration on, or from one of `PLACES` after so many tokens."""

    iteration: int
    step: int
    choices: Choices
    why: str
    tokens: int = 0  # sampled since the stage began


@dataclass(frozen=True)
class PlanRecord:
    """What `plan.json` of a run says: enough to make every later start do the same at the same place."""

    choices: Choices
    budget: int | None  # bytes of a process
    longest_prompt: int
    phases: Mapping[str, Mapping[str, int]]  # name -> mlx_bytes, numpy_bytes; leader_bytes of the former
    factors: Mapping[str, float]  # measured over predicted, by phase, after the first iteration
    overhead: int | None  # bytes of the process beside arrays, measured; None: not yet
    changes: tuple[PlanChange, ...] = ()
    processes: int = 1  # that share the run

    def __post_init__(self) -> None:
        """Refuse changes that can't be made.

        Raises:
            RunError: one is of a choice that models are loaded with.
        """
        for change in self.changes:
            for name in _FIXED:
                if getattr(change.choices, name) != getattr(self.choices, name):
                    raise RunError(
                        f"{PLAN}: the change at iteration {change.iteration} has another {name!r} than the models are "
                        "loaded with; remove the file to have another plan made"
                    )

    def at(self, iteration: int, step: int = 0, tokens: int = 0) -> Choices:
        """The choices in effect at an optimizer step of an iteration, or at one of `PLACES` after so many tokens."""
        place = iteration, step, tokens
        held = [change.choices for change in self.changes if (change.iteration, change.step, change.tokens) <= place]
        return held[-1] if held else self.choices

    @property
    def latest(self) -> Choices:
        """The choices after all changes."""
        return self.changes[-1].choices if self.changes else self.choices


def read_plan(folder: Path) -> PlanRecord | None:
    """The plan of a run folder, None where it has none yet.

    Raises:
        RunError: `plan.json` can't be read, or changes what can't change.
    """
    file = folder / PLAN
    if not file.exists():
        return None
    try:
        document = json.loads(file.read_text("utf-8"))
        return PlanRecord(
            choices=Choices(**document["choices"]),
            budget=document["budget_bytes"],
            longest_prompt=document["longest_prompt"],
            phases=document["phases"],
            factors=document["factors"],
            overhead=document["overhead_bytes"],
            changes=tuple(
                PlanChange(**{**change, "choices": Choices(**change["choices"])}) for change in document["changes"]
            ),
            processes=document.get("processes", 1),
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{file}: not a plan; remove it to have another one made") from None


def as_document(record: PlanRecord) -> dict[str, Any]:
    """The content of `plan.json`."""
    return {
        "choices": asdict(record.choices),
        "processes": record.processes,
        "budget_bytes": record.budget,
        "longest_prompt": record.longest_prompt,
        "phases": record.phases,
        "factors": record.factors,
        "overhead_bytes": record.overhead,
        "changes": [{**change._asdict(), "choices": asdict(change.choices)} for change in record.changes],
    }


def write_plan(record: PlanRecord, folder: Path) -> None:
    """Write `plan.json`.

    Raises:
        RunError: the disk is full, or the file can't be written.
    """
    replace_file(folder / PLAN, json.dumps(as_document(record), indent=2) + "\n")
