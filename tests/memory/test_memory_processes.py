"""How many processes and threads a run gets, by its length, its model, and what else the machine does."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_ppo.compute.cpu import threads
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory import keeping, processes, starting
from mlx_ppo.memory.keeping import Keeper
from mlx_ppo.runs.plan_file import BEGIN, read_plan
from mlx_ppo.runtime import load
from mlx_ppo.runtime.phases import Meter

GIB = 1 << 30


@pytest.fixture
def config(make_model: Callable[..., Path], tmp_path: Path) -> Callable[..., TrainConfig]:
    (tmp_path / "rule.py").write_text("def one(completions):\n    return [1.0] * len(completions)\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film"}\n')

    def make(**sections: dict[str, object]) -> TrainConfig:
        document: dict[str, object] = {
            "run": {"iterations": 100_000},
            "model": {"path": make_model()},
            "data": {"prompts": tmp_path / "prompts.jsonl", "eval_count": 2},
            "rollout": {"prompts": 16, "max_tokens": 16},
            "reward": [{"kind": "function", "function": f"{tmp_path}/rule.py:one"}],
        }
        return TrainConfig.model_validate({**document, **sections})

    return make


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, of which a process may use all, and no number of threads in the environment."""
    for module in (processes, threads, keeping, load):
        monkeypatch.setattr(module, "cores", lambda: 4)
    monkeypatch.setattr(processes.psutil, "cpu_count", lambda logical=True: 4)
    monkeypatch.setenv(threads.CHOSEN, "1")


def count(config: TrainConfig, budget: int = 16 * GIB) -> int:
    return starting.new_plan(config, [4], budget)[2]


def test_a_long_run_gets_a_process_for_each_core_and_a_short_one_one(config: Callable[..., TrainConfig]) -> None:
    assert count(config()) == 4
    assert count(config(run={"iterations": 3})) == 1
    assert count(config(rollout={"prompts": 3, "max_tokens": 16})) == 3
    assert count(config(run={"iterations": 3}, parallel={"processes": 2})) == 2


def test_a_large_models_processes_decode_enough_together(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading its weights takes the time of a token, and each process reads them for itself."""

    def asked(**rollout: int) -> int:
        return count(config(rollout={"prompts": 16, "max_tokens": 16, **rollout}, run={"iterations": 10_000_000}))

    assert asked() == 4
    monkeypatch.setattr(threads, "_GAINING", 1)
    assert asked() == 1
    assert asked(samples_per_prompt=2) == 2 and asked(samples_per_prompt=2, batch_size=20) == 1
    assert asked(samples_per_prompt=8) == 4
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # the user's word: then they have a core each
    monkeypatch.delenv(threads.CHOSEN)
    assert asked() == 4


def test_no_more_than_the_budget_of_all_together_has_room_for(config: Callable[..., TrainConfig]) -> None:
    each = starting.new_plan(config(parallel={"processes": 1}), [4], 16 * GIB)[0].process
    assert count(config(), int(2.5 * each)) == 2
    assert count(config(), int(1.2 * each)) == 1


def test_threads_are_for_large_models_and_for_what_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads.gaining(1_000_000) == 1 and threads.gaining(100_000_000) == 4
    assert threads.gaining(100_000_000, 2) == 2 and threads.gaining(100_000_000, 8) == 1
    monkeypatch.setattr(load.Load, "others", property(lambda _: 1.2))
    assert processes.first_threads(100_000_000, 1) == 3 and processes.first_threads(100_000_000, 2) == 1
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    monkeypatch.delenv(threads.CHOSEN)
    assert processes.first_threads(1_000_000, 1) == 7  # the user's word counts


def long_under_load(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, others: Callable[[], float]
) -> TrainConfig:
    """A run of one process and a large model, which looks at what others take wherever it may."""
    monkeypatch.setattr(load.Load, "others", property(lambda _: others()))
    monkeypatch.setattr(load.Load, "seconds", 60.0)
    for module in (processes, keeping, starting):
        monkeypatch.setattr(module, "parameters_of", lambda _: 100_000_000)
    return config(run={"iterations": 5}, parallel={"processes": 1})


def test_a_run_gives_way_to_another_program_and_its_plan_says_where(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = 0.0
    given = long_under_load(config, monkeypatch, lambda: busy)
    keeper = Keeper(given, starting.plan_run(given, [4], tmp_path), tmp_path, Meter({}, clearing=False))
    found = []
    for iteration, busy in enumerate((0.0, 2.1, 2.0, 0.2), start=1):  # noqa: B007  the property reads it
        keeper.begin(iteration, 0)
        found.append(keeper.now().threads)
    assert found == [4, 2, 2, 4]
    assert keeper.messages() == [
        "memory: other programs keep 2.1 of 4 processors busy; from iteration 2 on: threads 2",
        "memory: other programs keep 0.2 of 4 processors busy; from iteration 4 on: threads 4",
    ]
    record = read_plan(tmp_path)
    assert record is not None and [record.at(number).threads for number in range(1, 6)] == [4, 2, 2, 4, 4]


def test_within_an_iteration_a_single_process_gives_way_and_a_resumed_run_does_at_the_same_place(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, used = 0.0, list[int]()
    monkeypatch.setattr(keeping.threads, "use", used.append)
    given = long_under_load(config, monkeypatch, lambda: busy)

    def iterate(others: tuple[float, ...]) -> list[int]:
        nonlocal busy
        busy = others[0]
        keeper = Keeper(given, starting.plan_run(given, [4], tmp_path), tmp_path, Meter({}, clearing=False))
        keeper.begin(1, 0)
        used.clear()
        for place, busy in zip(("rollout", "score", "update"), others, strict=True):  # noqa: B007
            keeper.stage(place)
        busy = 0.0
        return [*tuple(used), keeper.next_step().threads, keeper.next_step().threads]

    assert iterate((0.0, 2.1, 2.1)) == [4, 2, 2, 4, 4]
    record = read_plan(tmp_path)
    assert record is not None and [record.at(1, step).threads for step in (-2, -1, 0, 1)] == [4, 2, 4, 4]
    assert iterate((0.0, 0.0, 0.0)) == [4, 2, 4, 4, 4]  # the change at the first optimizer step came after its stage


def test_a_single_process_gives_way_in_mid_rollout_and_a_resumed_run_does_after_as_many_tokens(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, used = 0.0, list[int]()
    monkeypatch.setattr(keeping.threads, "use", used.append)
    given = long_under_load(config, monkeypatch, lambda: busy)

    def sample(others: tuple[float, ...]) -> list[tuple[int, int]]:
        """After how many tokens the threads changed, and to what."""
        nonlocal busy
        keeper = Keeper(given, starting.plan_run(given, [4], tmp_path), tmp_path, Meter({}, clearing=False))
        busy = others[0]
        keeper.begin(1, 0)
        keeper.stage("rollout")
        changes = []
        for step, busy in enumerate(others, start=1):  # noqa: B007
            used.clear()
            keeper.tokens(10)
            changes += [(10 * step, count) for count in used]
        keeper.stage("score")
        return [*changes, (0, used[-1])]

    first = sample((0.0, 0.0, 2.1, 2.1, 0.0, 0.0))
    assert first == [(30, 2), (50, 4), (0, 4)]  # and then what recorded changes say, whatever else is busy now
    assert sample((0.0,) * 6) == first == sample((2.1,) * 4 + (0.0,) * 2)
    record = read_plan(tmp_path)
    assert record is not None and [record.at(1, BEGIN, tokens).threads for tokens in (29, 30, 49, 50)] == [4, 2, 2, 4]


def test_outside_runs_the_threads_follow_what_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, there = 0.0, [1]
    monkeypatch.setattr(load.Load, "others", property(lambda _: busy))
    monkeypatch.setattr(threads, "_EVERY", 0.01)
    monkeypatch.setattr(threads, "use", lambda count: there.append(count) if count else None)
    monkeypatch.setattr(threads, "current", lambda: there[-1])
    monkeypatch.setattr(threads, "loaded_blas", object)

    def settles_at(count: int) -> bool:
        until = time.monotonic() + 10
        while there[-1] != count and time.monotonic() < until:
            time.sleep(0.01)
        return there[-1] == count

    threads.serve(1_000_000)
    assert set(there) == {1}
    try:
        threads.serve(100_000_000)
        assert settles_at(4) and threads.news() == []
        busy = 2.9
        assert settles_at(1)
        busy = 0.0
        assert settles_at(4)
        (line,) = threads.news()
        assert "up to 2.9 of 4 processors" in line and threads.news() == []
        busy = 2.9
        assert settles_at(1)
        for given, number in ((2, 2), (0, 4)):  # in a run a number stands, whatever others take then or took before
            with threads.choosing(given):
                time.sleep(0.1)
                assert there[-1] == number
        assert settles_at(1)
        busy = 1.5  # 2.5 are free: two, but not three
        assert settles_at(2)
        busy = 0.0
        assert settles_at(4)
    finally:
        threads._yielding.end()
    time.sleep(0.1)
    before, busy = len(there), 2.9
    time.sleep(0.1)
    assert len(there) == before


def test_what_others_take_is_seen_and_what_this_process_takes_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def others(work: Callable[[], object]) -> float:
        seen = load.Load()
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            work()
        return seen.others

    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            own = others(lambda: sum(range(10_000)))  # with a child that works
            monkeypatch.setattr(load, "_family", lambda _: [])  # as if it were somebody else's
            busy = others(lambda: time.sleep(0.05))
        finally:
            other.kill()
    assert busy > own + 0.3, (own, busy)
