from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache

from mlx_ppo.compute.kv_cache import EightBitCache, filled, join, keep_rows, new_caches, share_offsets, size_caches
from mlx_ppo.memory.simulator.trace import trace
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk

ROWS = [(1, 286, 288, 40, 7), (1, 9), (1, 212, 9, 8)]
NEXT = [[5, 6, 7], [41, 3, 9], [2, 30, 44]]


@pytest.fixture(scope="module", params=[32, 64])
def wide(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Trunk:
    """Heads of one group."""
    return load_trunk(make_model(head_dim=request.param))


def decode(trunk: Trunk, form: str, *, step: int, keep: list[int] | None = None) -> tuple[np.ndarray, list[Any]]:
    """Logits [rows, 1 + 3, V] after prompts of different length, right-padded, and after each of three more tokens.

    `keep`: rows that stay after the first of these.
    """
    lengths = [len(row) for row in ROWS]
    padding = [max(lengths) - length for length in lengths]
    caches = new_caches(trunk.model, form, len(ROWS))
    for cache in caches:
        cache.step = step
        cache.prepare(lengths=lengths, right_padding=padding)
    prompts = mx.array([[*row, *[0] * pad] for row, pad in zip(ROWS, padding, strict=True)])
    states = trunk.hidden(prompts, caches)
    found = [states[mx.arange(len(ROWS)), mx.array(lengths) - 1]]
    for cache in caches:
        cache.finalize()
    rows = list(range(len(ROWS)))
    for number in range(3):
        if number == 1 and keep is not None:
            rows = keep
            keep_rows(caches, keep, 20)
        found.append(trunk.hidden(mx.array([[NEXT[row][number]] for row in rows]), caches)[:, -1])
    last = [np.array(trunk.logits(state)) for state in found]
    return np.stack([logits[-len(rows) :] if len(logits) == len(rows) else logits[rows] for logits in last], 1), caches


@pytest.mark.parametrize("keep", [None, [0, 2], [1], [2, 1], [1, 1, 0, 0]])
@pytest.mark.parametrize("step", [256, 3])
def test_eight_bits_are_close_to_all(wide: Trunk, keep: list[int] | None, step: int) -> None:
    """Right padding, rows dropped, repeated and exchanged, and caches that grow."""
    full, plain = decode(wide, "full", step=step, keep=keep)
    close, caches = decode(wide, "8-bit", step=step, keep=keep)
    assert all(type(cache) is BatchKVCache for cache in plain)
    assert all(type(cache) is EightBitCache and cache.keys[0].dtype == mx.uint32 for cache in caches)
    np.testing.assert_array_equal(close[:, 0], full[:, 0], err_msg="a prompt is attended to as it is")
    assert 0 < np.abs(close[:, 1:] - full[:, 1:]).max() < 0.05 * np.abs(full).max()
    for cache, other in zip(caches, plain, strict=True):
        assert cache.size() == other.size()
        assert cache.offset.tolist() == other.offset.tolist()
        assert cache.left_padding.tolist() == other.left_padding.tolist()


@pytest.mark.parametrize("form", ["full", "8-bit"])
@pytest.mark.parametrize("keep", [[0, 1], [1, 2], [2], [0, 2], [2, 0, 1], [1, 1, 0, 0]])
def test_rows_moved_in_place_are_those_that_are_copied(wide: Trunk, form: str, keep: list[int]) -> None:
    """Whether or not the order is one in which rows may move, and whether padding is dropped."""
    _, copied = decode(wide, form, step=256)
    _, moved = decode(wide, form, step=256)
    for caches, in_place in ((copied, False), (moved, True)):
        keep_rows(caches, filled(np.array(keep)).tolist() if keep == sorted(set(keep)) else keep, 8, in_place=in_place)
    for one, other in zip(copied, moved, strict=True):
        assert (one._idx, one.offset.tolist()) == (other._idx, other.offset.tolist())
        assert one.left_padding.tolist() == other.left_padding.tolist()
        for mine, its in zip(one.state[:2], other.state[:2], strict=True):
            for part, its_part in zip(*(each if form == "8-bit" else [each] for each in (mine, its)), strict=True):
                np.testing.assert_array_equal(np.array(part)[:, :, : one._idx], np.array(its_part)[:, :, : one._idx])


def test_rows_that_stay_move_only_into_places_of_those_that_leave() -> None:
    generator = np.random.default_rng(0)
    for count in range(1, 40):
        stay = np.flatnonzero(generator.random(count) < 0.7)
        order = filled(stay)
        assert sorted(order) == stay.tolist()
        assert all(row == place or (row >= len(stay) and place not in stay) for place, row in enumerate(order))


def read_prompts(trunk: Trunk, form: str, prompts: list[tuple[int, ...]], room: int) -> list[Any]:
    lengths = [len(prompt) for prompt in prompts]
    padding = [max(lengths) - length for length in lengths]
    caches = new_caches(trunk.model, form, len(prompts))
    size_caches(caches, room)
    for cache in caches:
        cache.prepare(lengths=lengths, right_padding=padding)
    trunk.hidden(mx.array([[*row, *[0] * pad] for row, pad in zip(prompts, padding, strict=True)]), caches)
    for cache in caches:
        cache.finalize()
    return caches


TEXTS = [(1, 7, 9), (1, 212, 9, 8, 30), (1, 9), tuple(range(40, 53)), (1, 286, 288, 40, 7)]
DECODED = np.random.default_rng(0).integers(3, 300, (5, 24)).tolist()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("form", ["full", "8-bit"])
@pytest.mark.parametrize("between", [1, 4, 11])
@pytest.mark.parametrize("turns", [([0, 1], [2, 3]), ([3, 2], [0], [4, 1]), ([0], [2], [4, 1, 3])])
def test_rows_that_join_get_what_they_get_alone(
    make_model: Callable[..., Path], kind: str, form: str, between: int, turns: tuple[list[int], ...]
) -> None:
    """Longer and shorter than those that are there, before and after a window of 6 is full; some leave meanwhile."""
    trunk = load_trunk(make_model(kind, head_dim=32, deviation=0.15, num_hidden_layers=3))
    caches: list[Any] = []
    live: list[int] = []
    done = dict.fromkeys(range(5), 0)
    room = max(map(len, TEXTS)) + 24
    for number, turn in enumerate(turns):
        added = read_prompts(trunk, form, [TEXTS[row] for row in turn], room)
        if number:
            keep_rows(caches, [len(live) - 1], room)
            live = live[-1:]
            join(caches, added, room)
            assert added == []
        caches, live = caches or added, [*live, *turn]
        for _ in range(between):
            share_offsets(caches)
            states = trunk.hidden(mx.array([[DECODED[row][done[row]]] for row in live]), caches)[:, -1]
            done.update({row: done[row] + 1 for row in live})
        wanted = [trunk.hidden(mx.array([[*TEXTS[row], *DECODED[row][: done[row]]]]))[0, -1] for row in live]
        np.testing.assert_allclose(np.array(states), np.array(mx.stack(wanted)), atol=1e-4 if form == "full" else 0.3)
        for cache in caches:
            if isinstance(cache, BatchKVCache):
                assert cache.size() == max(len(TEXTS[row]) + done[row] for row in live)
                assert min(cache.left_padding.tolist()) == 0


def test_it_takes_nine_bits_an_element(make_model: Callable[..., Path]) -> None:
    """8, and two float32 numbers for each 64 elements."""
    trunk = load_trunk(make_model(head_dim=64))
    sizes = {}
    for form in ("full", "8-bit"):
        _, caches = decode(trunk, form, step=256)
        leaves = [leaf for cache in caches for leaf in trace(lambda c=cache: [c.keys, c.values]).outputs]
        sizes[form] = sum(leaf.nbytes for leaf in leaves)
    assert sizes["full"] == 2 * 2 * 3 * 2 * 256 * 64 * 4
    assert sizes["8-bit"] == sizes["full"] * 9 // 32


def test_heads_that_have_no_group_stay_as_they_are(make_model: Callable[..., Path]) -> None:
    trunk = load_trunk(make_model(head_dim=8))
    full, _ = decode(trunk, "full", step=3, keep=[2, 0])
    found, caches = decode(trunk, "8-bit", step=3, keep=[2, 0])
    np.testing.assert_array_equal(found, full)
    assert [array.dtype for array in caches[0].keys] == [mx.float32]


def test_windows_stay_as_they_are(make_model: Callable[..., Path]) -> None:
    trunk = load_trunk(make_model("gemma3_text", head_dim=32))
    kinds = [type(cache) for cache in new_caches(trunk.model, "8-bit", 2)]
    assert kinds == [BatchRotatingKVCache, EightBitCache]


@pytest.mark.parametrize("form", ["full", "8-bit"])
def test_a_plan_can_trace_it(wide: Trunk, form: str) -> None:
    """The arrays of the cache that a rollout will have."""

    def read(tokens: mx.array) -> list[Any]:
        caches = new_caches(wide.model, form, tokens.shape[0])
        for cache in caches:
            cache.step = 20
        states = wide.hidden(tokens, caches)
        return [states, [[cache.keys, cache.values] for cache in caches]]

    outputs = trace(read, mx.zeros((3, 20), mx.int32)).outputs
    head = wide.base["model.layers.0.self_attn.k_proj.weight"].shape[0] // 2
    elements = 2 * 2 * 3 * 2 * 20 * head
    cached = sum(tensor.nbytes for tensor in outputs) - 3 * 20 * 32 * 4
    assert cached == (elements * 4 if form == "full" else elements + elements // head * 8)
