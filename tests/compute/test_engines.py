"""The two engines compute the same, and what the CPU's kernels take over is what mlx-lm has."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_lm.models
import numpy as np
import pytest

from mlx_ppo.bundle import bundle_root
from mlx_ppo.compute.choose import SWITCH, chosen_engine, using
from mlx_ppo.compute.cpu import activations, common_blocks
from mlx_ppo.compute.cpu.engine import CpuEngine
from mlx_ppo.compute.cpu.sampling import sample
from mlx_ppo.compute.engine import Step
from mlx_ppo.compute.portable import PortableEngine, sampled
from mlx_ppo.errors import ConfigError
from mlx_ppo.models.load import load_trunk

BLOCK = {"self_attn", "input_layernorm", "mlp", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "n_heads", "n_kv_heads", "scale", "rope", "offset", "reshape"}
ATTENTION |= {"scaled_dot_product_attention", "shape", "transpose", "update_and_fetch"}
# Of that form, too, but with mixtures of experts, or with pairs of neighbours rotated.
OTHERS = {"dots1", "ernie4_5", "ernie4_5_moe", "helium", "qwen2_moe", "qwen3_moe"}
GATED = {"down_proj", "swiglu", "gate_proj", "up_proj"}
ENGINES = [CpuEngine(), PortableEngine()]


def kinds() -> Iterator[tuple[str, set[str], set[str]]]:
    """Every module of mlx-lm's models as `file.Class`, the names that its call reads, and its methods' names."""
    for found in pkgutil.iter_modules(mlx_lm.models.__path__):
        try:
            file = importlib.import_module(f"mlx_lm.models.{found.name}")
        except (ImportError, SystemExit):  # it needs something that isn't installed
            continue
        for name, kind in inspect.getmembers(file, inspect.isclass):
            if issubclass(kind, nn.Module) and kind.__module__ == file.__name__:
                code = getattr(kind.__call__, "__code__", None)
                yield f"{found.name}.{name}", set(code.co_names) if code else set(), set(vars(kind))


def test_gates_that_numpy_computes_are_all_of_mlx_lms_that_are_of_this_form() -> None:
    assert {kind for kind, names, _ in kinds() if names == GATED} == activations._GATED


def test_blocks_that_numpy_computes_are_of_mlx_lms_common_form() -> None:
    """And no others but those that have parts which the form doesn't show."""
    found = {kind: names for kind, names, _ in kinds()}
    norms = {"q_norm", "k_norm"}
    for block, attention in common_blocks._SUPPORTED.items():
        assert found[block] == BLOCK and found[attention] - norms == ATTENTION, block
    files = {kind.partition(".")[0] for kind, names in found.items() if names == BLOCK}
    files &= {kind.partition(".")[0] for kind, names in found.items() if names - norms == ATTENTION}
    gated = {kind.partition(".")[0] for kind in activations._GATED}
    assert files & gated - OTHERS == {kind.partition(".")[0] for kind in common_blocks._SUPPORTED}


@pytest.mark.parametrize("engine", ENGINES, ids=["cpu", "portable"])
def test_steps_are_those_of_mlx_optimizers(engine: PortableEngine) -> None:
    """AdamW with bias correction, ten steps, to float32's rounding."""
    generator = np.random.default_rng(0)
    names = {"a": (7, 5), "b": (300, 40)}
    ours = {name: mx.array(generator.normal(size=shape), mx.float32) for name, shape in names.items()}
    theirs = dict(ours)
    moments = {name: {"m": mx.zeros(shape), "v": mx.zeros(shape)} for name, shape in names.items()}
    options: dict[str, Any] = {"betas": [0.8, 0.95], "eps": 1e-5, "weight_decay": 0.1, "bias_correction": True}
    other = mlx.optimizers.AdamW(0.02, **options)
    for number in range(1, 11):
        drawn = {name: generator.normal(size=shape).astype(np.float32) for name, shape in names.items()}
        ours = engine.adamw(
            ours,
            {name: mx.array(one) for name, one in drawn.items()},
            moments,
            Step(number, 0.02, 1.0, 0.8, 0.95, 1e-5, 0.1),
        )
        theirs = other.apply_gradients({name: mx.array(one) for name, one in drawn.items()}, theirs)
    for name, array in theirs.items():
        np.testing.assert_allclose(np.array(ours[name]), np.array(array), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("size", [5, 256, 257, 5000])
def test_the_device_draws_what_numpy_draws(temperature: float, size: int) -> None:
    generator = np.random.default_rng(size)
    logits = (3 * generator.normal(size=(400, size))).astype(np.float32)
    draws = generator.random(400, dtype=np.float32)
    tokens, logprobs = sample(logits, draws, temperature)
    found, others = map(np.array, sampled(mx.array(logits), mx.array(draws), temperature))
    assert (found == tokens).mean() > 0.99  # a draw may lie within rounding of a border
    same = found == tokens
    np.testing.assert_allclose(others[same], logprobs[same], atol=2e-5)
    assert found.max() < size


def test_gradients_of_policy_and_critic_are_those_of_the_other_engine(make_world: Callable[..., Any]) -> None:
    """On the bundled model; 1e-5 of the largest."""
    worlds = []
    for engine in ENGINES:
        with using(engine):
            worlds.append(make_world(given=load_trunk(bundle_root() / "models" / "reviews")))
    assert worlds[0].rollout.responses == worlds[1].rollout.responses
    seen: list[dict[str, np.ndarray]] = []

    class Recorder:
        def step(self, engine: Any, weights: Any, gradients: Any, *, what: str) -> tuple[Any, float]:
            seen.append({f"{what} {name}": np.array(array) for name, array in gradients.items()})
            return weights, 0.0

    for world in worlds:
        world.policy.optimizer, world.critic.optimizer = Recorder(), Recorder()
        world.update(epochs=1, minibatches=1, value_clip=0.0)
    for cpu, portable in ((seen[0], seen[2]), (seen[1], seen[3])):
        assert cpu.keys() == portable.keys()
        most = max(np.abs(array).max() for array in cpu.values())
        for name, array in cpu.items():
            np.testing.assert_allclose(portable[name], array, atol=1e-5 * most, err_msg=name)


def test_an_engine_that_isnt_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "gpu")
    with pytest.raises(ConfigError, match=f"^{SWITCH}: no engine is called 'gpu'; choose cpu or portable"):
        chosen_engine()
