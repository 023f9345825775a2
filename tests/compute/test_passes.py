"""Whole rows read, both ways, by numpy and BLAS: the states and gradients of the model itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import COMMON_KINDS

from mlx_ppo.compute.cpu import activations, block_passes, layout, pass_attention
from mlx_ppo.compute.cpu.common_blocks import unsupported
from mlx_ppo.compute.cpu.products import can_prepare
from mlx_ppo.compute.sequences import Sequences, make_sequences
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk

pytestmark = [
    pytest.mark.skipif(not can_prepare(), reason="no BLAS with products of many small matrices"),
    pytest.mark.usefixtures("on_cpu_engine"),
]
PROMPTS = [[5, 6, 7, 8, 9], [3, 4], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [3, 4]]
RESPONSES = [[20, 21, 22], [23], [24, 25], [26, 27, 28, 29], [30, 31]]
Models = Callable[..., Path]
Gradients = dict[str, mx.array]


@contextmanager
def by_the_model(trunk: Trunk) -> Iterator[None]:
    """Without the kernels."""
    found = trunk.capabilities
    trunk.capabilities = found._replace(rows=False)
    try:
        yield
    finally:
        trunk.capabilities = found


def found_by(
    trunk: Trunk, weights: Weights, sequences: Sequences, *, own: bool, saving: bool = False
) -> tuple[np.ndarray, Gradients]:
    """States, and gradients of something that reads them all."""
    direction = mx.random.normal((sequences.targets.size, trunk.width), key=mx.random.key(1))

    def loss(arrays: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        with trunk.using(weights.holding(arrays)), trunk.checkpointing() if saving else nullcontext():
            states = trunk.response_states(sequences, learning=True)
        return (states * direction).sum() + mx.square(states).sum(), states

    with nullcontext() if own else by_the_model(trunk):
        (_, states), gradients = mx.value_and_grad(loss)(dict(weights.arrays))
        mx.eval(states, gradients)
    return np.array(states), gradients


def assert_alike(found: tuple[np.ndarray, Gradients], wanted: tuple[np.ndarray, Gradients]) -> None:
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert found[1].keys() == wanted[1].keys()
    size = max(mx.abs(array).max().item() for array in wanted[1].values())
    for name, array in wanted[1].items():
        np.testing.assert_allclose(np.array(found[1][name]), np.array(array), atol=2e-5 * size, err_msg=name)


def everything(trunk: Trunk) -> Weights:
    return Weights({name: 1.1 * array for name, array in trunk.base.items()})


@pytest.mark.parametrize(("kind", "changes"), COMMON_KINDS)
@pytest.mark.parametrize("form", ["adapters", "upper blocks", "kept states", "all weights"])
@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("saving", [False, True])
def test_states_and_gradients_are_those_of_the_model(
    make_model: Models,
    make_adapters: Callable[..., Weights],
    kind: str,
    changes: dict[str, Any],
    form: str,
    sharing: bool,
    saving: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layout, "_DEAR", 0)  # no padding, however small the model is
    trunk = load_trunk(make_model(kind, **changes))
    assert trunk.capabilities.rows
    weights = (
        everything(trunk) if form == "all weights" else make_adapters(trunk, layers=0 if form == "adapters" else 1)
    )
    whole = make_sequences(PROMPTS, RESPONSES)
    sequences = make_sequences(PROMPTS, RESPONSES, sharing=sharing)
    assert (sequences.shared is not None) == sharing
    if form == "kept states":
        trunk.share_below([weights])
        kept = trunk.entering(whole.tokens)
        whole = whole._replace(kept=kept)
        if sequences.shared is None:
            sequences = whole
        else:
            shared = sequences.shared
            firsts = mx.array([0, 1])
            starts = np.asarray(shared.lengths)[np.asarray(shared.owners), None]
            columns = np.minimum(starts + np.arange(shared.responses.shape[1]), kept.shape[1] - 1)
            rows = mx.arange(len(PROMPTS))[:, None]
            both = kept[firsts, : shared.prompts.shape[1]], kept[rows, mx.array(columns)]
            sequences = sequences._replace(shared=shared._replace(kept=both))
    wanted = found_by(trunk, weights, whole, own=False)
    assert max(mx.abs(array).max().item() for array in wanted[1].values()) > 0
    found = found_by(trunk, weights, sequences, own=True, saving=saving)
    assert_alike(found, wanted)
    with trunk.using(weights):  # the scoring pass is the training pass, whatever is kept
        np.testing.assert_array_equal(np.array(trunk.response_states(sequences)), found[0])


@pytest.mark.parametrize("sharing", [False, True])
def test_pieces_make_no_difference(
    make_model: Models, make_adapters: Callable[..., Weights], monkeypatch: pytest.MonkeyPatch, sharing: bool
) -> None:
    trunk = load_trunk(make_model("qwen3"))
    sequences = make_sequences(PROMPTS, RESPONSES, sharing=sharing)
    for weights in (make_adapters(trunk), everything(trunk)):
        wanted = found_by(trunk, weights, sequences, own=False)
        with monkeypatch.context() as patch:
            patch.setattr(block_passes, "_CHUNK", 7)
            patch.setattr(activations, "_PIECE", 100)
            patch.setattr(pass_attention, "_TOGETHER", 1)
            assert_alike(found_by(trunk, weights, sequences, own=True), wanted)


@pytest.mark.parametrize("sharing", [False, True])
def test_of_positions_that_nobody_reads_there_are_no_states(make_model: Models, sharing: bool) -> None:
    trunk = load_trunk(make_model())
    sequences = make_sequences(PROMPTS, RESPONSES, sharing=sharing)
    whole, some = (np.array(trunk.states(sequences, read=read)) for read in (None, sequences.last))
    last = np.array(sequences.last)
    np.testing.assert_allclose(some[last], whole[last], rtol=1e-4, atol=1e-5)
    assert not np.delete(some, last, axis=0).any() and np.abs(whole).min(axis=1).all()


def test_rows_that_are_padded_differently_get_the_same(make_model: Models) -> None:
    trunk = load_trunk(make_model())
    sequences = make_sequences(PROMPTS, RESPONSES)
    junk = sequences._replace(tokens=mx.where(sequences.tokens == 0, 77, sequences.tokens))
    clean, dirty = (np.array(trunk.response_states(one)) for one in (sequences, junk))
    np.testing.assert_array_equal(clean, dirty)


def test_a_gradient_that_was_not_announced_is_refused(
    make_model: Models, make_adapters: Callable[..., Weights]
) -> None:
    trunk = load_trunk(make_model())
    weights = make_adapters(trunk)
    sequences = make_sequences(PROMPTS, RESPONSES)

    def loss(arrays: dict[str, mx.array]) -> mx.array:
        with trunk.using(weights.holding(arrays)):
            return trunk.response_states(sequences).sum()

    with pytest.raises(RuntimeError, match="not to have one"):
        mx.grad(loss)(dict(weights.arrays))


def test_a_gradient_keeps_little_and_a_pass_without_one_nothing(make_model: Models) -> None:
    trunk = load_trunk(make_model(num_hidden_layers=8, hidden_size=64, intermediate_size=256))
    weights = Weights({name: mx.array(array) for name, array in trunk.base.items()})
    sequences = make_sequences([[1, 2, 3]] * 16, [[4] * 61] * 16)
    states = 16 * 64 * 64 * 4

    def peak(function: Callable[[], Any]) -> int:
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        function()
        return mx.get_peak_memory() - before

    def scoring() -> None:
        with trunk.using(weights):
            mx.eval(trunk.response_states(sequences))

    weight_gradients = sum(array.nbytes for array in weights.arrays.values())
    most = peak(lambda: found_by(trunk, weights, sequences, own=True)) - weight_gradients
    least = peak(lambda: found_by(trunk, weights, sequences, own=True, saving=True)) - weight_gradients
    assert peak(scoring) < 20 * states < least < 60 * states < 100 * states < most < 150 * states
    assert peak(lambda: found_by(trunk, weights, sequences, own=False)) > 3 * most


def test_dropout_other_types_and_architectures_are_left_to_the_model(
    make_model: Models, quantised: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not load_trunk(make_model("gemma2")).capabilities.rows
    assert not load_trunk(make_model(), dtype="bfloat16").capabilities.rows
    assert not load_trunk(quantised(make_model()), compact=True).capabilities.rows
    trunk = load_trunk(make_model())
    assert trunk.capabilities.rows
    monkeypatch.setattr("mlx_ppo.compute.cpu.engine.states_of", lambda *_, **__: pytest.fail("numpy was asked"))
    sequences = make_sequences(PROMPTS, RESPONSES)
    with trunk.using(Weights({})), trunk.noise(0.5, mx.random.key(0)):
        noisy = np.array(trunk.response_states(sequences))
    with by_the_model(trunk):
        assert np.abs(noisy - np.array(trunk.response_states(sequences))).max() > 0.1


@pytest.mark.parametrize("part", ["rotated", "normed", "swiglu_into"])
def test_what_computes_something_else_is_found_out(
    make_model: Models, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    other: dict[str, Any] = {
        "rotated": lambda vectors, _: vectors,
        "normed": lambda states, *_: states,
        "swiglu_into": lambda gate, up, out: np.multiply(gate, up, out=out),
    }
    monkeypatch.setattr(block_passes, part, other[part])
    trunk = load_trunk(make_model())
    assert not unsupported(trunk) and not trunk.capabilities.rows


def test_what_is_not_finite_stays_so(make_model: Models) -> None:
    trunk = load_trunk(make_model())
    broken = {name: mx.where(array == array.max(), mx.inf, array) for name, array in trunk.base.items()}
    states, gradients = found_by(trunk, Weights(broken), make_sequences(PROMPTS, RESPONSES), own=True)
    assert not np.isfinite(states).all()
    assert not all(np.isfinite(np.array(array)).all() for array in gradients.values())
