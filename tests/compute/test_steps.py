from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import COMMON_KINDS

from mlx_ppo.compute.cpu import common_blocks, steps
from mlx_ppo.compute.cpu.common_blocks import unsupported
from mlx_ppo.compute.cpu.products import can_prepare
from mlx_ppo.compute.cpu.steps import Steps
from mlx_ppo.compute.kv_cache import keep_rows, new_caches, size_caches
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.stages.rollout import Asked, Sampling, generate

pytestmark = [
    pytest.mark.skipif(not can_prepare(), reason="no BLAS with products of many small matrices"),
    pytest.mark.usefixtures("on_cpu_engine"),
]
LENGTHS = [5, 2, 4]
Models = Callable[..., Path]


def caches_of(trunk: Trunk, tokens: mx.array) -> list[Any]:
    """Caches that hold rows of different length."""
    found = new_caches(trunk.model, "full", len(LENGTHS))
    size_caches(found, 20)
    for layer in found:
        layer.prepare(lengths=LENGTHS, right_padding=[5 - length for length in LENGTHS])
    trunk.hidden(tokens, found)
    for layer in found:
        layer.finalize()
        mx.eval(layer.state)
    return found


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(1, 300, shape).astype(np.int32)


@pytest.mark.parametrize(("kind", "changes"), COMMON_KINDS)
@pytest.mark.parametrize("form", ["plain", "adapters", "all weights", "columns first"])
def test_states_logits_and_caches_are_those_of_the_model(
    make_model: Models, make_adapters: Callable[..., Weights], kind: str, changes: dict[str, Any], form: str
) -> None:
    trunk = load_trunk(make_model(kind, **changes))
    assert trunk.capabilities.steps
    weights = Weights({})
    if form == "adapters":
        weights = make_adapters(trunk, size=0.3)
    elif form == "all weights":
        weights = Weights({name: 1.1 * array for name, array in trunk.base.items()})
    elif form == "columns first":
        weights = Weights({name: mx.contiguous(array.T).T for name, array in trunk.base.items() if array.ndim == 2})
    first, then = mx.array(drawn(3, 5)), drawn(3, 6)
    with trunk.using(weights):
        ours, models = caches_of(trunk, first), caches_of(trunk, first)
        reader = Steps(trunk, 4)
        rows = [0, 1, 2]
        for column in range(6):
            if column == 3:  # a row goes
                rows = [0, 2]
                reader.detach()
                for caches in (ours, models):
                    keep_rows(caches, rows, 20)
            read = then[rows, column]
            wanted = trunk.hidden(mx.array(read[:, None]), models)[:, -1]
            states, entering = reader.read(read, ours)
            assert entering is None
            np.testing.assert_allclose(np.array(states), np.array(wanted), rtol=1e-4, atol=1e-4)
            logits = reader.logits(states)
            np.testing.assert_allclose(logits, np.array(trunk.logits(wanted)), rtol=1e-4, atol=1e-4)
        for mine, model in zip(ours, models, strict=True):
            assert mine._idx == model._idx and mine.offset.tolist() == model.offset.tolist()
            for name in ("keys", "values"):
                here, there = (np.array(getattr(cache, name))[:, :, : mine._idx] for cache in (mine, model))
                np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_other_architectures_are_left_to_the_model(make_model: Models, kind: str) -> None:
    assert not load_trunk(make_model(kind)).capabilities.steps


def test_other_types_and_windows_are_left_to_the_model(
    make_model: Models, quantised: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not load_trunk(make_model(), dtype="bfloat16").capabilities.steps
    assert not load_trunk(quantised(make_model()), compact=True).capabilities.steps
    windows = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
    assert "window" in unsupported(load_trunk(make_model(**windows)))
    trunk = load_trunk(make_model())
    assert not unsupported(trunk)
    monkeypatch.setattr(common_blocks, "can_prepare", lambda: False)
    assert "OpenBLAS" in unsupported(trunk)


@pytest.mark.parametrize("part", ["rotated", "_norm", "swiglu_into"])
def test_what_computes_something_else_is_found_out(
    make_model: Models, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    other: dict[str, Any] = {
        "rotated": lambda vectors, _: vectors,
        "_norm": lambda layer: lambda states: states,
        "swiglu_into": lambda gate, up, out: np.multiply(gate, up, out=out),
    }
    monkeypatch.setattr(steps, part, other[part])
    trunk = load_trunk(make_model())
    assert not unsupported(trunk) and not trunk.capabilities.steps


@pytest.mark.parametrize("places", [2, 5, 64, 65])
def test_a_rollout_is_the_models_own(
    make_model: Models,
    make_adapters: Callable[..., Weights],
    prompts: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    places: int,
) -> None:
    trunk = load_trunk(make_model(num_hidden_layers=4, eos_token_id=[2, *range(100, 140)]))
    weights = make_adapters(trunk, layers=2)
    trunk.share_below([weights])
    asked, how = Asked(prompts, range(5), [{}] * 5), Sampling((0,), 9, samples_per_prompt=14, batch_size=places)
    made: list[int] = []
    assert trunk.capabilities.steps
    prepare = Steps.__init__
    monkeypatch.setattr(Steps, "__init__", lambda self, trunk, rows: (made.append(rows), prepare(self, trunk, rows))[1])
    here = generate(trunk, weights, asked, how)
    assert made[-1:] == [places] * (places <= 64)
    trunk.capabilities = trunk.capabilities._replace(steps=False)
    there = generate(trunk, weights, asked, how)
    assert here.responses == there.responses and len(set(map(len, here.responses))) > 3
    np.testing.assert_allclose(np.array(here.logprobs), np.array(there.logprobs), atol=1e-4)
    assert here.kept is not None and there.kept is not None
    np.testing.assert_allclose(np.array(here.kept), np.array(there.kept), rtol=1e-4, atol=1e-4)


def test_a_role_that_brings_all_weights_reads_steps_while_the_trunk_is_away(make_model: Models) -> None:
    trunk = load_trunk(make_model())
    weights = Weights({name: mx.array(array) for name, array in trunk.base.items()})
    trunk.evict()
    assert trunk.capabilities.steps
    tokens = mx.array(drawn(3, 5))
    with trunk.using(weights):
        caches, others = caches_of(trunk, tokens), caches_of(trunk, tokens)
        states, _ = Steps(trunk, 3).read(drawn(3), caches)
        wanted = trunk.hidden(mx.array(drawn(3)[:, None]), others)[:, -1]
    np.testing.assert_allclose(np.array(states), np.array(wanted), rtol=1e-4, atol=1e-4)
    assert np.abs(np.array(wanted)).max() > 0.1
