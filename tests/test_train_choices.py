"""What a run's plan says reaches the run: every choice, wherever it changes."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from mlx_ppo.compute.cpu import threads
from mlx_ppo.compute.output_head import OutputHead
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.starting import plan_run, smaller
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.runs.folder import Run, create_run
from mlx_ppo.runs.plan_file import BEGIN, Choices, PlanChange, read_plan, write_plan
from mlx_ppo.runtime.signals import Interrupts
from mlx_ppo.stages import rollout
from mlx_ppo.stages.optimizer import Optimizer
from mlx_ppo.stages.records import Rollout
from mlx_ppo.train import train

FIXED = {"evict", "compact"}  # as the models are loaded
FIRST = Choices(rollout_batch=16, score_batch=16, micro_batch=8, checkpointing=False, threads=1)
SECOND = Choices(4, 5, micro_batch=4, checkpointing=True, positions=64, kv_cache="8-bit", threads=2)
THIRD = replace(SECOND, micro_batch=2, checkpointing=False, positions=32)


@pytest.fixture
def config(make_model: Callable[..., Path], tmp_path: Path) -> TrainConfig:
    rule = tmp_path / "rule.py"
    rule.write_text("def one(prompts, completions):\n    return [float(len(text)) for text in completions]\n")
    words = ["the film", "a very good story", "it was bad", "is it not in the story"]
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{text}"}}\n' for text in words))
    return TrainConfig.model_validate(
        {
            "run": {"iterations": 2, "save_every": 1, "folder": tmp_path / "runs"},
            "model": {"path": make_model()},
            "data": {"prompts": tmp_path / "prompts.jsonl", "eval_count": 4},
            "rollout": {"prompts": 16, "max_tokens": 6},
            "reward": [{"kind": "function", "function": f"{rule}:one"}],
            "critic": {"kind": "head"},
            "ppo": {"minibatches": 2, "epochs": 1},
        }
    )


class Seen:
    """What each stage of each iteration did; a reporter, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place: tuple[str, int, int] = ("plan", 0, 0)  # stage, iteration, optimizer step
        self.found: dict[tuple[str, int, int], dict[str, set[Any]]] = {}
        decoder, sequences = rollout.Decoder, Rollout.sequences
        statistics, checkpointing, step = OutputHead.statistics, Trunk.checkpointing, Optimizer.step

        def decode(*given: Any, **named: Any) -> Any:
            self.note(rollout_batch=named["places"], kv_cache=named["cache_form"], threads=threads.current())
            return decoder(*given, **named)

        def read(own: Rollout, rows: Any = None, **named: Any) -> Any:
            self.note(rows=len(rows), checkpointing=False, threads=threads.current())
            return sequences(own, rows, **named)

        def logits(own: OutputHead, trunk: Trunk, *given: Any, **named: Any) -> Any:
            self.note(positions=trunk.positions)
            return statistics(own, trunk, *given, **named)

        def save_memory(trunk: Trunk) -> Any:
            self.note(checkpointing=True)
            return checkpointing(trunk)

        def stepped(own: Optimizer, *given: Any, what: str, **named: Any) -> Any:
            if what == "critic":  # the last of a step
                self.place = (*self.place[:2], self.place[2] + 1)
            return step(own, *given, what=what, **named)

        monkeypatch.setattr(rollout, "Decoder", decode)
        monkeypatch.setattr(Rollout, "sequences", read)
        monkeypatch.setattr(OutputHead, "statistics", logits)
        monkeypatch.setattr(Trunk, "checkpointing", save_memory)
        monkeypatch.setattr(Optimizer, "step", stepped)

    def note(self, **values: Any) -> None:
        for name, value in values.items():
            self.found.setdefault(self.place, {}).setdefault(name, set()).add(value)

    def phase(self, name: str, iteration: int, iterations: int) -> None:
        self.place = (name, iteration, 0)

    def message(self, text: str) -> None: ...

    def tokens(self, count: int) -> None: ...

    def iteration(self, metrics: dict[str, float], iterations: int, sample: tuple[str, str, float]) -> None: ...

    def sampled(self, stage: str, iteration: int) -> tuple[int, str]:
        """Decoded together, and the form of keys and values."""
        there = self.found[stage, iteration, 0]
        (rows,), (form,) = there["rollout_batch"], there["kv_cache"]
        return rows, form

    def scored(self, stage: str, iteration: int) -> tuple[int, int]:
        """The most rows scored together, and positions whose logits are."""
        there = self.found[stage, iteration, 0]
        (positions,) = there["positions"]
        return max(there["rows"]), positions

    def updated(self, iteration: int, step: int) -> tuple[int, bool, int]:
        """The most rows in a pass, checkpointing, and positions whose logits are computed together."""
        there = self.found["update", iteration, step]
        (positions,) = there["positions"]
        return max(there["rows"]), max(there["checkpointing"]), positions


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def test_every_choice_takes_effect_where_it_changes(config: TrainConfig, tmp_path: Path, seen: Seen) -> None:
    different = {name for name in vars(FIRST) if getattr(FIRST, name) != getattr(SECOND, name)}
    assert different | FIXED == {field.name for field in fields(Choices)}, "a new choice: look at it here, too"
    folder = create_run(config, tmp_path / "runs", "a")
    record = replace(plan_run(config, [8], folder).record, choices=FIRST, factors={"rollout": 1.0})
    changes = PlanChange(2, BEGIN, SECOND, "between iterations"), PlanChange(2, 1, THIRD, "between optimizer steps")
    write_plan(replace(record, changes=changes), folder)
    before = threads.current()
    with Run(folder) as run:
        train(config, run, seen, Interrupts())
    assert [seen.sampled("rollout", number) for number in (1, 2)] == [(16, "full"), (4, "8-bit")]
    assert [seen.scored("score", number) for number in (1, 2)] == [(16, 0), (5, 64)]
    assert [seen.updated(1, step) for step in (0, 1)] == [(8, False, 0)] * 2
    assert [seen.updated(2, step) for step in (0, 1)] == [(4, True, 64), (2, False, 32)]
    if threads.loaded_blas() is not None:
        for place, there in seen.found.items():
            assert there.get("threads", {place[1] or 1}) == {place[1] or 1}, place
        assert threads.current() == before
    assert seen.sampled("evaluate", 2) == (4, "8-bit") and seen.scored("evaluate", 2) == (4, 32)


def test_a_run_that_was_killed_is_as_small_as_its_plan_became(config: TrainConfig, tmp_path: Path, seen: Seen) -> None:
    """The first iteration after it, and the evaluation before that."""
    folder = create_run(config, tmp_path / "runs", "a")
    planned = plan_run(config, [8], folder).record
    while smaller(folder) is not None:
        pass
    record = read_plan(folder)
    assert record is not None and record.choices == planned.choices
    least = record.latest
    assert replace(least, threads=0) == Choices(1, 1, 1, checkpointing=True, positions=64, kv_cache="8-bit")
    with Run(folder) as run:
        train(config, run, seen, Interrupts())
    for stages in (("evaluate", 0), ("rollout", 1), ("rollout", 2), ("evaluate", 2)):
        assert seen.sampled(*stages) == (1, "8-bit")
    for stages in (("evaluate", 0), ("score", 1), ("score", 2), ("evaluate", 2)):
        assert seen.scored(*stages) == (1, 64)
    assert {seen.updated(number, step) for number in (1, 2) for step in (0, 1)} == {(1, True, 64)}
