"""A run held to its plan: decisions kept and replayed, limits put back, models evicted, the watchdog."""

import gc
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.errors import ModelError, RunError
from mlx_ppo.memory import budget, watchdog
from mlx_ppo.memory.choices import Possible, Shapes, concede, one_smaller
from mlx_ppo.memory.keeping import Keeper, limits_of
from mlx_ppo.memory.starting import plan_run
from mlx_ppo.memory.watchdog import danger, watching
from mlx_ppo.models.load import load_trunk
from mlx_ppo.runs.plan_file import PLAN, Choices, PlanChange, as_document, read_plan, write_plan
from mlx_ppo.runtime.phases import Limit, metering, phase
from mlx_ppo.runtime.signals import Interrupts, Stopped

SHAPES = Shapes(prompt=24, response=24, responses=16, distinct=16, minibatch=8)
FREE = Choices(rollout_batch=16, score_batch=16, micro_batch=8, checkpointing=False)


@pytest.fixture
def config(make_model: Callable[..., Path], tmp_path: Path) -> TrainConfig:
    rule = tmp_path / "rule.py"
    rule.write_text("def one(prompts, completions):\n    return [1.0 for _ in prompts]\n")
    return TrainConfig.model_validate(
        {
            "model": {"path": make_model()},
            "data": {"prompts": tmp_path / "prompts.jsonl", "eval_count": 1},
            "rollout": {"prompts": 16, "max_tokens": 24},
            "reward": [{"kind": "function", "function": f"{rule}:one"}],
            "ppo": {"minibatches": 2},
        }
    )


def with_keys(config: TrainConfig, **sections: dict[str, Any]) -> TrainConfig:
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()}
    )


def test_ground_is_given_where_it_is_needed_and_in_order(config: TrainConfig) -> None:
    possible = Possible(evict=True, compact=True)
    seen: dict[str, list[str]] = {}
    for name in ("rollout", "score policy", "update critic", "update step", "load"):
        choices, seen[name] = FREE, []
        while (found := concede(name, choices, config, SHAPES, possible)) is not None:
            assert found[0] != choices
            choices = found[0]
            seen[name].append(found[1])
    assert seen["rollout"] == [
        "rollout.batch_size 8", "memory.residency on", "rollout.kv_cache 8-bit", "rollout.batch_size 4",
        "rollout.batch_size 2", "rollout.batch_size 1", "memory.compact on",
    ]  # fmt: skip
    assert seen["score policy"][:2] == ["score.batch_size 8", "memory.residency on"]
    assert seen["score policy"][-2:] == ["memory.positions 64", "memory.compact on"]
    assert {"ppo.micro_batch 1", "ppo.gradient_checkpointing on", "memory.positions 64"} <= set(seen["update critic"])
    assert seen["update step"] == seen["load"] == ["memory.residency on", "memory.compact on"]


def test_what_is_pinned_is_not_given(config: TrainConfig) -> None:
    pinned = with_keys(
        config,
        rollout={"batch_size": 16, "kv_cache": "full"},
        score={"batch_size": 16},
        ppo={"micro_batch": 8, "gradient_checkpointing": "off"},
        memory={"residency": "resident", "compact": "off", "positions": 10},
    )
    for name in ("rollout", "score policy", "update policy", "load"):
        assert concede(name, FREE, pinned, SHAPES, Possible(evict=True, compact=True)) is None


def test_a_killed_run_goes_on_smaller_where_it_needed_most(config: TrainConfig, tmp_path: Path) -> None:
    planned = plan_run(config, [24], tmp_path)
    phases = {"rollout": {"mlx_bytes": 5, "numpy_bytes": 0}, "update policy": {"mlx_bytes": 9, "numpy_bytes": 1}}
    record = replace(planned.record, phases=phases)
    assert one_smaller(record, config)[1].startswith(("memory.positions", "ppo."))  # type: ignore[index]
    assert one_smaller(record, config, ["rollout"])[1].startswith("rollout.")  # type: ignore[index]


def test_the_record_survives_its_file(config: TrainConfig, tmp_path: Path) -> None:
    planned = plan_run(config, [24], tmp_path)
    smaller = replace(planned.record.choices, micro_batch=2)
    record = replace(
        planned.record, changes=(PlanChange(3, 1, smaller, "because"),), factors={"rollout": 1.1}, overhead=7
    )
    write_plan(record, tmp_path)
    assert read_plan(tmp_path) == record
    assert [record.at(*place).micro_batch for place in ((2, 9), (3, 0), (3, 1), (4, 0))] == [8, 8, 2, 2]
    for fixed in ({"evict": True}, {"compact": True}):
        change = PlanChange(2, 0, replace(smaller, **fixed), "because")  # type: ignore[arg-type]
        with pytest.raises(RunError, match=f"the change at iteration 2 has another '{next(iter(fixed))}' than"):
            replace(planned.record, changes=(change,))
        document = as_document(record)
        document["changes"][0]["choices"] |= fixed
        (tmp_path / PLAN).write_text(json.dumps(document))
        with pytest.raises(RunError, match=r"plan\.json: the change at iteration 3 .* remove the file"):
            read_plan(tmp_path)
    (tmp_path / PLAN).write_text("{}")
    with pytest.raises(RunError, match="remove it to have another one made"):
        read_plan(tmp_path)


def keeper(config: TrainConfig, folder: Path, budget_bytes: int) -> Any:
    planned = plan_run(config, [24], folder)
    plan = replace(planned.plan, budget=budget_bytes)
    meter = SimpleNamespace(peaks={}, overhead=lambda: 100 << 20, limits={})
    return Keeper(config, planned._replace(plan=plan), folder, meter)  # type: ignore[arg-type]


def test_passes_get_smaller_near_the_budget_and_a_resumed_run_does_the_same(
    config: TrainConfig, tmp_path: Path
) -> None:
    own = keeper(config, tmp_path, 400 << 20)
    own.plan = replace(own.plan, overhead=100 << 20)
    own.begin(4, 0)
    assert own.next_step().micro_batch == 8
    own.meter.peaks = {"update policy": (399 << 20) - own.plan.overhead}
    assert own.next_step().micro_batch == 4
    own.meter.peaks = {"update policy": 40 << 20}
    assert own.next_step().micro_batch == 4
    assert len(own.messages()) == 1 and own.messages() == []
    again = keeper(config, tmp_path, 400 << 20)
    assert again.now().micro_batch == 4, "an evaluation before the first iteration fits, too"
    for iteration, wanted in ((3, 8), (4, 8), (5, 4), (4, 8)):
        again.begin(iteration, 0)
        assert again.now().micro_batch == wanted
    assert [again.next_step().micro_batch for _ in range(3)] == [8, 4, 4] and again.now().micro_batch == 4


def test_a_pinned_pass_stays(config: TrainConfig, tmp_path: Path) -> None:
    own = keeper(with_keys(config, ppo={"micro_batch": 8}), tmp_path, 200 << 20)
    own.begin(1, 0)
    own.meter.peaks = {"update policy": 500 << 20}
    assert own.next_step().micro_batch == 8 and own.messages() == []


@pytest.mark.parametrize("steps", [1, 3])
def test_the_first_iteration_corrects_the_plan(config: TrainConfig, tmp_path: Path, steps: int) -> None:
    """With a single step, no pass has found the optimizers' states in memory."""
    own = keeper(config, tmp_path, 300 << 20)
    own.begin(1, 0)
    own.stage("update")
    for _ in range(steps):
        own.next_step()
    planned = {part.name: part.peak for part in own.plan.phases}
    states = own.plan.phases[1].resident["optimizer states"]
    own.meter.peaks = {name: peak for name, peak in planned.items() if name.startswith("update")}
    if steps == 1:
        own.meter.peaks["update policy"] -= states
        own.meter.peaks["update critic"] -= states
    own.meter.peaks["update policy"] = int(1.2 * own.meter.peaks["update policy"])
    own.finish([(24, 24)] * 16, states)
    assert own.record.factors == pytest.approx(
        {"update policy": 1.2, "update critic": 1.0, "update step": 1.0}, rel=0.01
    )
    kept = read_plan(tmp_path)
    assert kept is not None and kept.factors == own.record.factors and kept.overhead == own.record.overhead
    own.meter.peaks["update critic"] *= 2
    own.finish([(24, 24)] * 16, states)
    assert own.record.factors["update critic"] == pytest.approx(1.0, rel=0.01), "the first iteration only"


def test_limits_of_phases_come_back() -> None:
    before, limit = mx.set_memory_limit(1 << 40), Limit(1 << 38, 1 << 20)
    try:
        with metering({"a": limit}), pytest.raises(KeyboardInterrupt), phase("a"):
            now = mx.set_memory_limit(12345)
            assert 1 << 38 < now < 1.02 * (1 << 38)
            raise KeyboardInterrupt
        assert mx.set_memory_limit(1 << 40) == 1 << 40
        with metering({"a": limit}), phase("b"):
            assert mx.set_memory_limit(1 << 40) == 1 << 40
    finally:
        mx.set_memory_limit(before)
    assert limits_of([]) == {}


def test_a_limit_leaves_room_for_what_a_phase_needs_on_top_of_what_is_there() -> None:
    there = mx.zeros((1 << 20,))
    mx.eval(there)
    assert Limit(0, 1 << 20).now() > there.nbytes + (1 << 20)
    assert Limit(1 << 40, 1 << 20).now() > 1 << 40


def test_an_evicted_trunk_comes_back_as_it_was(make_model: Callable[..., Path]) -> None:
    folder = make_model(hidden_size=128, intermediate_size=352, num_hidden_layers=4, vocab_size=2048, deviation=0.02)
    trunk = load_trunk(folder)
    tokens = mx.array([[1, 2, 3]])
    wanted = trunk.logits(trunk.hidden(tokens))
    mx.eval(wanted)
    size = sum(array.nbytes for array in trunk.base.values())
    gc.collect()
    before = mx.get_active_memory()
    trunk.evict()
    assert before - mx.get_active_memory() == pytest.approx(size, rel=0.01)
    trunk.evict()
    trunk.restore()
    assert mx.get_active_memory() == pytest.approx(before, rel=0.01)
    assert mx.array_equal(trunk.logits(trunk.hidden(tokens)), wanted)
    trunk.evict()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ModelError, match="changed on disk"):
        trunk.restore()
    file.unlink()
    with pytest.raises(ModelError, match="can't be read again"):
        trunk.restore()


def machine(available: int, total: int = 1 << 34) -> Callable[[], SimpleNamespace]:
    return lambda: SimpleNamespace(available=available, total=total)


def test_dangers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(watchdog.psutil, "virtual_memory", machine(1 << 33))
    monkeypatch.setattr(watchdog.psutil, "swap_memory", lambda: SimpleNamespace(used=3 << 30))
    monkeypatch.setattr(watchdog, "_PRESSURE", tmp_path / "none")
    monkeypatch.setattr(budget, "_CGROUP", tmp_path)
    assert danger(0) == ""
    monkeypatch.setattr(watchdog.psutil, "virtual_memory", machine(1 << 30))
    assert danger(3 << 30) == "" and "begun to swap" in danger(0)
    monkeypatch.setattr(watchdog.psutil, "virtual_memory", machine(1 << 27))
    assert "only 128 MB" in danger(3 << 30)
    monkeypatch.setattr(watchdog.psutil, "virtual_memory", machine(1 << 33))
    (tmp_path / "pressure").write_text("some avg10=90.00 avg60=1.00\nfull avg10=55.10 avg60=0.00 total=1\n")
    monkeypatch.setattr(watchdog, "_PRESSURE", tmp_path / "pressure")
    assert "wait for memory" in danger(3 << 30)
    monkeypatch.setattr(watchdog, "_PRESSURE", tmp_path / "none")
    for name, text in {
        "memory.max": f"{1 << 30}",
        "memory.current": f"{1 << 30}",
        "memory.stat": "inactive_file 9",
    }.items():
        (tmp_path / name).write_text(text)
    assert "control group" in danger(3 << 30)
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 29}\n")  # caches of files can go
    assert danger(3 << 30) == ""
    (tmp_path / "memory.max").write_text("max\n")
    assert budget.cgroup_room() is None


def test_the_watchdog_has_the_run_saved_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupts = Interrupts()
    told = threading.Event()

    def stop(why: str) -> None:
        interrupts.stop(why)
        told.set()

    monkeypatch.setattr(watchdog, "danger", lambda _: "nothing is left")
    with watching(stop, every=0.001):
        assert told.wait(5)
    with pytest.raises(Stopped, match="short memory: nothing is left") as caught:
        interrupts.check()
    assert caught.value.exit_code == 4
    told.clear()
    monkeypatch.setattr(watchdog, "danger", lambda _: "")
    with watching(stop, every=0.001):
        assert not told.wait(0.05)
    assert not [thread for thread in threading.enumerate() if thread.name == "memory watchdog"]
