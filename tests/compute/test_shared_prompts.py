"""Prompts of several responses read once: the same states, the same gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.compute.shared_prompts import LayerCache, Reading
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.stages.records import Rollout

LEVEL = [[5, 6, 7, 8, 9, 10]] * 3 + [[11, 12, 13, 14, 15, 16]] * 3
UNEVEN = [[5, 6, 7, 8, 9, 10], [3, 4], [5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 10], [3, 4], [5, 6, 7, 8, 9, 10]]
RESPONSES = [[20, 21, 22], [23], [24, 25], [26, 27, 28], [29, 30], [31]]


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def own(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Trunk:
    return load_trunk(make_model(request.param, num_hidden_layers=3))


def rollout_of(trunk: Trunk, prompts: list[list[int]]) -> Rollout:
    """With kept states where the trunk keeps some."""
    width = max(map(len, RESPONSES))
    counts = np.array([len(response) for response in RESPONSES])
    whole = make_sequences(prompts, RESPONSES)
    return Rollout(
        prompts=tuple(map(tuple, prompts)),
        responses=tuple(map(tuple, RESPONSES)),
        logprobs=mx.zeros((len(prompts), width)),
        mask=mx.array(np.arange(width) < counts[:, None]),
        finished=mx.array([True] * len(prompts)),
        group=mx.zeros((len(prompts),), mx.int32),
        records=({},) * len(prompts),
        temperature=1.0,
        max_tokens=8,
        kept=trunk.entering(whole.tokens) if trunk.split else None,
    )


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("prompts", [LEVEL, UNEVEN, [LEVEL[0]] * 6], ids=["level", "uneven", "one"])
def test_states_and_gradients_are_those_of_whole_rows(
    own: Trunk,
    make_adapters: Callable[..., Weights],
    prompts: list[list[int]],
    layers: int,
    kernels: bool,
) -> None:
    """From the prompts and from kept states, by the model or by numpy; the last tokens' too, for a reward model."""
    assert own.capabilities.shares
    own.capabilities = own.capabilities._replace(rows=kernels)
    weights = make_adapters(own, layers=layers)
    own.share_below([weights])
    assert bool(own.split) == bool(layers)
    rollout = rollout_of(own, prompts)
    rows = [4, 0, 1, 2, 5, 3]
    whole, shared = (rollout.sequences(rows, sharing=sharing) for sharing in (False, True))
    assert shared.shared is not None and (shared.shared.kept is not None) == bool(layers) and shared.kept is None
    direction = mx.random.normal((whole.targets.size, 32), key=mx.random.key(1))

    def loss(arrays: dict[str, mx.array], sequences: Any) -> mx.array:
        with own.using(weights.holding(arrays)):
            return (own.response_states(sequences, learning=True) * direction).sum()

    with own.using(weights):
        for place in ("predicting", "last"):
            found, wanted = (own.states(s)[getattr(s, place)] for s in (shared, whole))
            np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-4, atol=1e-4)
    found, wanted = (mx.grad(loss)(dict(weights.arrays), sequences) for sequences in (shared, whole))
    size = max(mx.abs(array).max().item() for array in wanted.values())
    for name, array in wanted.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(array), atol=1e-5 * size, err_msg=name)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_architectures_with_windows_or_masks_of_their_own_read_whole_rows(
    make_model: Callable[..., Path], kind: str
) -> None:
    assert not load_trunk(make_model(kind)).capabilities.shares


def test_forms_of_a_mask_that_nobody_knows_are_refused() -> None:
    shared = make_sequences(LEVEL, RESPONSES, sharing=True).shared
    assert shared is not None
    cache = LayerCache(Reading(shared))
    for wrong in ({"return_array": True}, {"window_size": 3}):
        with pytest.raises(ValueError):
            cache.make_mask(2, **wrong)
