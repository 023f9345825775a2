"""Plans: what is predicted against what a run's own functions need, the search, the limits, the command."""

import gc
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from thorough import mostly

from mlx_ppo.algo.truncation import Distribution
from mlx_ppo.bench.dry_run import Measured, dry_run
from mlx_ppo.bundle import lora_example
from mlx_ppo.cli.main import main
from mlx_ppo.compute import portable
from mlx_ppo.compute.cpu import engine
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.data.random import philox
from mlx_ppo.errors import ConfigError
from mlx_ppo.memory.budget import keeping_to
from mlx_ppo.memory.choices import Shapes
from mlx_ppo.memory.keeping import limits_of
from mlx_ppo.memory.model import weightless_roles
from mlx_ppo.memory.phases import Accountant
from mlx_ppo.memory.plan import GIB, RUNTIME, Plan, fastest, longest_response, make_plan, needed, plan_of, require_fit
from mlx_ppo.memory.starting import accountant_of
from mlx_ppo.models.roles import load_roles
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.runtime.phases import metering, phase
from mlx_ppo.stages.rollout import Asked, generate, sampling

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
    "vocab_size": 2048,
}
PROMPT, RESPONSE, ROWS = 24, 24, 16
SHAPES = Shapes(prompt=PROMPT, response=RESPONSE, responses=ROWS, distinct=ROWS, minibatch=8)
LONG = SHAPES._replace(response=160)
REPLACED = (("full", (48, 64)), ("8-bit", (16, 128)))
Make = Callable[..., TrainConfig]


@pytest.fixture
def make_config(make_model: Callable[..., Path], tmp_path: Path) -> Make:
    """A configuration with a wide tiny model; no response of it ends before its time."""
    rule = tmp_path / "rule.py"
    rule.write_text("def one(prompts, completions):\n    return [float(len(text)) for text in completions]\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the film"}\n')

    def make(**sections: Any) -> TrainConfig:
        document: dict[str, Any] = {
            "model": {"path": make_model(deviation=0.02, eos_token_id=2047, **SIZES)},
            "data": {"prompts": prompts, "eval_count": 1},
            "rollout": {"prompts": ROWS, "max_tokens": RESPONSE},
            "reward": [{"kind": "function", "function": f"{rule}:one"}],
            "ppo": {"minibatches": 2, "epochs": 1},
        }
        for name, keys in sections.items():
            document[name] = {**document.get(name, {}), **keys}
        return TrainConfig.model_validate(document)

    return make


def accountant(config: TrainConfig, shapes: Shapes = SHAPES) -> Accountant:
    return Accountant(config, *weightless_roles(config, None), shapes)


def test_roles_without_weights_have_the_arrays_of_the_real_ones(make_config: Make) -> None:
    for sections in ({}, {"critic": {"kind": "model"}}, {"model": {"train": "full"}}, {"lora": {"layers": 2}}):
        config = make_config(**sections)
        gc.collect()
        before = mx.get_active_memory()
        roles, policy, critic = weightless_roles(config, None)
        assert mx.get_active_memory() - before < 100_000
        real, real_policy, real_critic = load_roles(config)
        real.close()
        assert critic is not None and real_critic is not None
        mx.eval(dict(real_policy.arrays), dict(real_critic.arrays))
        for found, wanted in (
            (roles.trunk.base, real.trunk.base),
            (policy.arrays, real_policy.arrays),
            (critic.arrays, real_critic.arrays),
        ):
            assert {n: (a.shape, a.dtype) for n, a in found.items()} == {
                n: (a.shape, a.dtype) for n, a in wanted.items()
            }
        assert roles.trunk.split == real.trunk.split
        free = make_plan(Accountant(config, real, real_policy, real_critic, SHAPES), config, None)
        assert make_plan(accountant(config), config, None).phases == free.phases


def measured(config: TrainConfig, turns: int = 2) -> tuple[Plan, list[Measured]]:
    """A plan without a bound, and what iterations of its shapes really needed."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()  # what other tests have left in this process is none of the run's
    own = accountant_of(config, None, PROMPT)
    plan = make_plan(own, config, None)
    found = dry_run(config, plan, own.shapes, iterations=turns)
    gc.collect()
    mx.synchronize()
    before = min(before, mx.get_active_memory())
    return plan, [replace(one, peaks={name: peak - before for name, peak in one.peaks.items()}) for one in found]


def errors(plan: Plan, found: Measured) -> dict[str, float]:
    """Predicted over measured, less 1, by phase."""
    peaks = {part.name: part.peak for part in plan.phases}
    return {name: peaks[name] / peak - 1 for name, peak in found.peaks.items() if name in peaks}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"lora": {"layers": 2}},
        {"lora": {"layers": 1}, "critic": {"kind": "head"}},
        {"ppo": {"gradient_checkpointing": "on"}},
        {"ppo": {"micro_batch": 2}},
        {"model": {"train": "full"}},
        {"model": {"train": "full"}, "critic": {"kind": "model"}, "memory": {"residency": "evict"}},
        {"rollout": {"prompts": 2, "samples_per_prompt": 4}},
        {"rollout": {"prompts": 1, "samples_per_prompt": 8}, "lora": {"layers": 2}, "ppo": {"micro_batch": 4}},
        {"rollout": {"top_p": 0.9}, "ppo": {"micro_batch": 2}},
    ],
    ids=[
        "lora",
        "upper blocks",
        "head",
        "checkpointing",
        "micro-batches",
        "full",
        "evicted",
        "groups",
        "one prompt",
        "truncated",
    ],
)
def test_predicted_peaks_are_those_of_the_phases(make_config: Make, sections: dict[str, Any]) -> None:
    """Within what the moment at which mlx's threads let go of a buffer changes, which is much in a model of 4 MB.

    So the middle one of three iterations counts.
    """
    plan, found = measured(make_config(**sections), turns=4)
    of_each = [errors(plan, one) for one in found[1:]]
    off = {name: median(one[name] for one in of_each) for name in of_each[0]}
    assert {"rollout", "score policy", "score reference", "update policy", "update step"} <= set(off)
    assert all(-0.22 < error < 0.12 for error in off.values()), off


@pytest.mark.parametrize("case", mostly([*itertools.product(("full", "8-bit"), ((16, 128), (48, 64)))], REPLACED))
def test_the_predicted_peak_of_a_rollout_whose_rows_are_replaced(
    make_config: Make,
    make_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[str, tuple[int, int]],
) -> None:
    """Caches that are joined, and prompts that are read while others are decoded, take no more than was expected."""
    form, (prompt, response) = case
    sizes = {"hidden_size": 256, "num_hidden_layers": 6, "num_key_value_heads": 4, "head_dim": 64}
    config = make_config(
        model={"path": make_model(deviation=0.02, eos_token_id=2047, **{**SIZES, **sizes})},
        rollout={"prompts": 32, "max_tokens": response, "batch_size": 8, "kv_cache": form},
    )
    own = accountant(config, Shapes(prompt=prompt, response=response, responses=32, distinct=32, minibatch=8))
    plan = make_plan(own, config, None)
    draw, on_device, shares = engine.sample, portable.sampled, [3 / response, 0.0]

    def ending(logits: Any, draws: Any, how: Distribution) -> Any:
        """End responses at tokens of chance."""
        tokens, *rest = draw(logits, draws, how)
        return np.where(draws < shares[-1], 2047, np.where(tokens == 2047, 5, tokens)), *rest

    def ending_on_device(logits: mx.array, draws: mx.array, how: Distribution) -> Any:
        tokens, *rest = on_device(logits, draws, how)
        return mx.where(draws < shares[-1], 2047, mx.where(tokens == 2047, 5, tokens)), *rest

    monkeypatch.setattr(engine, "sample", ending)
    monkeypatch.setattr(portable, "sampled", ending_on_device)
    roles, policy, critic = load_roles(config)
    roles.close()
    mx.eval(dict(policy.arrays), dict(critic.arrays) if critic is not None else {})
    prompts = [tuple(row) for row in philox("prompts").integers(0, 2047, (32, prompt)).tolist()]
    asked, how = Asked(prompts, range(32), [{}] * 32), sampling(config.rollout, plan.choices, 0)
    gc.collect()
    there = mx.get_active_memory()
    peaks = []
    while shares:
        rows: list[int] = []
        with metering(limits_of(plan.phases)) as meter:
            generate(roles.trunk, policy, asked, how, rows.append)
        peaks.append(meter.peaks["rollout"] - there)
        shares.pop()
    assert len(set(rows)) > 4, "rows have ended, and others have joined"
    rollout = next(part for part in plan.phases if part.name == "rollout")
    assert peaks[1] < 1.03 * max(peaks[0], sum(rollout.passing.values()))
    assert 0.9 < (there + peaks[1]) / (there + sum(rollout.passing.values())) < 1.1


def test_an_iteration_may_have_fewer_responses_than_an_evaluation_has_prompts(make_config: Make) -> None:
    config = make_config()
    own = accountant(config, SHAPES._replace(responses=2, distinct=8))
    assert all(phase.peak > 0 for phase in make_plan(own, config, None).phases)


def test_a_smaller_budget_means_smaller_batches_and_then_a_refusal(make_config: Make) -> None:
    config = make_config()
    own = accountant(config, LONG)
    free = make_plan(own, config, None)
    assert free.concessions == () and free.choices.micro_batch == 8 and free.choices.rollout_batch == ROWS
    budget = free.process
    seen = [free]
    while (plan := make_plan(own, config, budget)).fits:
        assert plan.process <= budget
        seen.append(plan)
        budget -= (budget - RUNTIME) // 16
    assert len({plan.choices for plan in seen}) >= 3
    assert sum(saved for _, saved in seen[-1].concessions) == free.process - seen[-1].process
    assert seen[-1].choices.checkpointing
    assert all(b.process <= a.process for a, b in itertools.pairwise(seen))
    with pytest.raises(ConfigError, match=r"memory.budget_gb: the run needs \S+ GiB and has \S+: .*"):
        require_fit(plan, own, config)


def test_what_a_later_concession_makes_needless_is_taken_back(make_config: Make) -> None:
    """No choice alone can be taken back any more, whatever the budget."""
    config = make_config(model={"train": "full"}, critic={"kind": "model"})
    own = accountant(config, LONG)
    most, fast = make_plan(own, config, None).process, vars(fastest(config, LONG))
    seen = set()
    for share in (0.95, 0.9, 0.8, 0.75, 0.7, 0.65, 0.6):
        plan = make_plan(own, config, int(share * most))
        if not plan.fits:
            continue
        slower = {name: value for name, value in vars(plan.choices).items() if value != fast[name]}
        assert len(slower) <= len(plan.concessions)
        seen.update(slower)
        for name in slower:
            assert not plan_of(own, replace(plan.choices, **{name: fast[name]}), plan.budget).fits, (share, name)
    assert len(seen) > 1


def test_pinned_keys_stay(make_config: Make) -> None:
    config = make_config(
        ppo={"micro_batch": 8, "gradient_checkpointing": "off"},
        score={"batch_size": 16},
        rollout={"batch_size": 16, "kv_cache": "full"},
        memory={"residency": "resident", "compact": "off", "positions": 100},
    )
    plan = make_plan(accountant(config), config, 1 << 20)
    assert not plan.fits and plan.concessions == ()
    assert plan.choices == Choices.pinned(config)


def test_the_longest_response_fits_and_a_longer_one_does_not(make_config: Make) -> None:
    config = make_config()
    own = accountant(config)
    budget = int(make_plan(own, config, None).process * 1.2)
    longest = longest_response(own, config, budget)
    assert longest > RESPONSE
    assert make_plan(own.with_shapes(SHAPES._replace(response=int(longest * 0.9))), config, budget).fits
    assert not make_plan(own.with_shapes(SHAPES._replace(response=int(longest * 1.1) + 2)), config, budget).fits


def test_limits_come_back(make_config: Make) -> None:
    config = make_config()
    plan = make_plan(accountant(config), config, 4 * GIB)
    assert plan.freed == max(part.transient for part in plan.phases)
    before = mx.set_cache_limit(12345)
    try:
        with pytest.raises(KeyboardInterrupt), keeping_to(plan):
            assert mx.set_cache_limit(plan.freed) == plan.freed
            raise KeyboardInterrupt
        assert mx.set_cache_limit(12345) == 12345
    finally:
        mx.set_cache_limit(before)


def test_phases_measure_only_where_somebody_asks() -> None:
    with phase("nobody"):
        pass
    with metering() as meter:
        with phase("a"):
            mx.eval(mx.zeros((1000, 1000)))
        with phase("b"):
            pass
    assert meter.peaks["a"] - meter.peaks["b"] >= 4_000_000
    with phase("later"):
        pass
    assert set(meter.take()) == {"a", "b"} and meter.take() == {}


def test_the_command_plans_for_the_bundled_example() -> None:
    config = lora_example()
    result = CliRunner().invoke(main, ["plan", str(config), "--memory-gb", "2", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["fits"] and document["budget_gib"] == 2
    assert {"load", "rollout", "score reward", "update policy", "update critic"} <= {
        p["name"] for p in document["phases"]
    }
    assert document["shared"]["by"] == ["policy", "reference", "critic"]  # its reward model has a trunk of its own
    weights = document["phases"][0]["resident"]["weights of the shared trunk"]
    assert document["shared"]["saved_gib"] == pytest.approx(2 * weights / GIB, abs=1e-3)
    assert document["variants_gib"]["no critic (ppo.advantage = 'rloo')"] <= document["needs_gib"]
    shown = CliRunner().invoke(main, ["plan", str(config), "--memory-gb", "0.17"])
    assert shown.exit_code == 0 and "does NOT fit" in shown.output


def test_the_command_plans_for_a_model_that_is_not_here(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    document = {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "quantization": {"bits": 4, "group_size": 64},
    }
    file.write_text(json.dumps(document))
    config = Path(__file__).resolve().parents[2] / "configs" / "smollm2-reviews.toml"
    sizes = {}
    for device, budget in (("cpu", 16), ("cpu", 4), ("gpu", 8)):
        arguments = ["plan", str(config), "--model-config", str(file), "--device", device]
        result = CliRunner().invoke(main, [*arguments, "--memory-gb", str(budget), "--json"])
        assert result.exit_code == 0, result.output
        plan = json.loads(result.stdout)
        assert plan["fits"] and plan["choices"]["compact"] == (budget == 4)
        phases = {p["name"]: p for p in plan["phases"]}
        sizes[device, budget] = phases["load"]["resident"]["weights of the shared trunk"]
    parameters = 1.236e9
    assert sizes["cpu", 16] == pytest.approx(4 * parameters, rel=0.01)
    assert sizes["cpu", 4] == pytest.approx(0.625 * parameters, rel=0.01)  # scales and offsets in float32
    assert sizes["gpu", 8] == pytest.approx(0.5625 * parameters, rel=0.01)
    file.write_text("[]")
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 3 and "config.json" in refused.output


def test_needed_counts_numpy(make_config: Make) -> None:
    config = make_config()
    plan = make_plan(accountant(config), config, None)
    largest = plan.largest
    assert needed(largest) == largest.peak + largest.outside == plan.process - RUNTIME


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_architectures_that_refuse_batches_or_keep_windows_are_planned(
    make_model: Callable[..., Path], make_config: Make, kind: str
) -> None:
    """gemma2's attention refuses padded rows; gemma3's caches of a window hold numbers beside arrays."""
    config = make_config(model={"path": make_model(kind)}, rollout={"prompts": 8, "max_tokens": 4})
    found = {phase.name: phase for phase in make_plan(accountant_of(config, None, 6), config, None).phases}
    assert sum(found["rollout"].passing.values()) > 0
