"""Passes without padding: which rows are put together, which positions are left, and that nothing else changes."""

from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.compute.cpu import layout
from mlx_ppo.compute.cpu.layout import Layout, by_length
from mlx_ppo.compute.sequences import Sequences, make_sequences
from mlx_ppo.models.load import load_trunk

pytestmark = pytest.mark.usefixtures("on_cpu_engine")
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 4], [5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9, 10, 11], [3, 4]]
RESPONSES = [[20, 21, 22], [23], [24, 25], [26, 27, 28, 29], [30, 31]]


def packed(sequences: Sequences, dear: int = 0) -> Layout:
    found = Layout(sequences, sequences.predicting)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_DEAR", dear)
        found.leave_out_padding(1)
    return found


def divisions(count: int) -> Iterator[list[int]]:
    """Where rows in order may be cut: all ways."""
    for cuts in range(count):
        for at in combinations(range(1, count), cuts):
            yield [0, *at, count]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dear", [0, 3, 10, 1000])
def test_groups_are_the_cheapest_of_all(seed: int, dear: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 12, 8)
    groups = by_length(lengths, dear)
    assert sorted(np.concatenate(groups).tolist()) == list(range(8))
    falling = np.sort(lengths)[::-1]

    def cost(bounds: list[int]) -> int:
        return sum((to - at) * int(falling[at]) + dear for at, to in pairwise(bounds))

    own = sum(len(group) * int(lengths[group].max()) + dear for group in groups)
    assert own == min(map(cost, divisions(8)))
    assert all(lengths[group[0]] == lengths[group].max() for group in groups)


@pytest.mark.parametrize("sharing", [False, True])
def test_the_positions_that_are_left_are_those_of_tokens(sharing: bool) -> None:
    sequences = make_sequences(PROMPTS, RESPONSES, sharing=sharing)
    assert (sequences.shared is not None) == sharing
    whole, found = Layout(sequences, sequences.predicting), packed(sequences)
    responses = sum(map(len, RESPONSES))
    # Prompts that are shared stay as they are: two of seven positions.
    assert found.size == (2 * 7 + responses if sharing else sum(map(len, PROMPTS)) + responses) < whole.size
    read = np.asarray(sequences.predicting)
    tokens = np.asarray(found.of(whole.tokens))
    back = np.asarray(found.spread(mx.array(tokens.astype(np.float32))[:, None]))[:, 0]
    np.testing.assert_array_equal(back[read], np.asarray(whole.tokens)[read])
    last = found.read_last()
    positions = read if last is None else np.unique(read)
    np.testing.assert_array_equal(
        np.sort(tokens if last is None else tokens[last]), np.sort(np.asarray(whole.tokens)[positions])
    )


@pytest.mark.parametrize("sharing", [False, True])
def test_rows_of_one_length_and_few_positions_stay_a_rectangle(sharing: bool) -> None:
    level = make_sequences([[5, 6], [5, 6]], [[7, 8, 9], [9, 8, 7]], sharing=sharing)
    for found in (packed(level), packed(make_sequences(PROMPTS, RESPONSES, sharing=sharing), dear=10_000)):
        assert found.size == found.room == found.whole and found.of(found.tokens) is found.tokens


def test_where_every_position_is_read_none_is_left_out() -> None:
    found = Layout(make_sequences(PROMPTS, RESPONSES), None)
    found.leave_out_padding(1 << 10)
    assert found.size == found.whole


@pytest.mark.parametrize("sharing", [False, True])
def test_a_response_without_tokens_has_no_position(sharing: bool) -> None:
    responses = [[], [23], [24, 25], [], [30, 31]]
    sequences = make_sequences(PROMPTS, responses, sharing=sharing)
    found = packed(sequences)
    parts, places = found.positions()
    assert len(places) == found.size == sum(part.rows * part.length for part in parts)
    assert all(part.length for part in parts)


@pytest.mark.parametrize("sharing", [False, True])
def test_memory_is_asked_for_in_few_sizes_and_never_for_more_than_with_padding(sharing: bool) -> None:
    generator, rooms = np.random.default_rng(0), set()
    for _ in range(50):
        prompts = [[5, 6, 7]] * 16
        responses = [[9] * int(generator.integers(20, 60)) for _ in range(16)]
        found = packed(make_sequences(prompts, responses, sharing=sharing))
        assert found.size <= found.room <= found.whole and found.room <= 1.13 * found.size
        rooms.add(found.room)
    assert len(rooms) < 12


def test_a_batch_of_very_different_rows_is_read_as_each_row_by_itself(make_model: Callable[..., Path]) -> None:
    trunk = load_trunk(make_model())
    generator = np.random.default_rng(1)
    prompts = [generator.integers(3, 40, int(generator.integers(1, 9))).tolist() for _ in range(12)]
    responses = [generator.integers(3, 40, int(generator.integers(1, 30))).tolist() for _ in range(12)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_DEAR", 1 << 13)  # a group is as bad as two positions or eight
        together = np.array(trunk.response_states(make_sequences(prompts, responses)))
    single = [
        np.array(trunk.response_states(make_sequences([prompt], [response])))
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    np.testing.assert_allclose(together, np.concatenate(single), rtol=1e-4, atol=1e-5)
