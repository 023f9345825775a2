import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ppo.compute.sequences import Sequences, make_sequences
from mlx_ppo.stages.records import Rollout

rows = st.lists(
    st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.lists(st.integers(1, 9), max_size=4)),
    min_size=1,
    max_size=4,
)


def brute_force(sequences: Sequences, prompts: list[list[int]], responses: list[list[int]], slots: int) -> None:
    """Every array by its definition, one token at a time."""
    tokens = np.array(sequences.tokens)
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    assert tokens.shape == (len(prompts), width)
    flat = tokens.reshape(-1)
    counted = 0
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        both = [*prompt, *response]
        assert tokens[row].tolist() == both + [0] * (width - len(both))
        assert sequences.lengths[row].item() == len(both)
        assert sequences.last[row].item() == row * width + len(both) - 1
        assert flat[sequences.last[row].item()] == both[-1]
        assert np.array(sequences.mask[row]).tolist() == [slot < len(response) for slot in range(slots)]
        for slot, token in enumerate(response):
            assert sequences.slots[row, slot].item() == counted
            assert sequences.targets[counted].item() == token
            assert sequences.predicting[counted].item() == row * width + len(prompt) + slot - 1
            counted += 1
    assert sequences.targets.shape == sequences.predicting.shape == (counted,)


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(0, 3))
def test_make_sequences(data: list[tuple[list[int], list[int]]], spare: int) -> None:
    prompts, responses = [list(side) for side in zip(*data, strict=True)]
    longest = max(1, max(map(len, responses)))
    brute_force(make_sequences(prompts, responses), prompts, responses, longest)
    brute_force(make_sequences(prompts, responses, slots=longest + spare), prompts, responses, longest + spare)


def unshared(sequences: Sequences) -> np.ndarray:
    """The token at every position, prompts once and then responses; those of padding are 0."""
    assert sequences.shared is not None
    parts = (sequences.shared.prompts, sequences.shared.responses)
    return np.concatenate([np.array(part).reshape(-1) for part in parts])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.data())
def test_shared_prompts_are_there_once(owners: list[int], data: st.DataObject) -> None:
    """Positions, by their tokens and one at a time; whatever doesn't depend on them is as in whole rows."""
    known = [[7, 8, 9, 10, 11, 12], [5], [1, 2, 3, 4]]
    prompts = [known[owner] for owner in owners]
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=len(owners), max_size=len(owners)))
    responses = [list(range(100 * (row + 1), 100 * (row + 1) + n)) for row, n in enumerate(lengths)]
    whole, shared = (make_sequences(prompts, responses, sharing=sharing) for sharing in (False, True))
    worth = sum(map(len, {tuple(prompt) for prompt in prompts})) + sum(lengths) < 0.5 * whole.tokens.size
    if shared.shared is None:
        shapes = max(map(len, prompts)) * len(set(owners)) + max(lengths) * len(owners)
        assert not any(lengths) or shapes > 0.8 * whole.tokens.size
        assert whole.shared is None and not (any(lengths) and worth and shapes < 0.5 * whole.tokens.size)
        return
    for name in ("tokens", "targets", "slots", "mask", "lengths"):
        assert mx.array_equal(getattr(shared, name), getattr(whole, name))
    at = unshared(shared)
    assert len(np.array(shared.shared.prompts)) == len(set(owners))
    before = np.array(whole.tokens).reshape(-1)[np.array(whole.predicting)]
    assert at[np.array(shared.predicting)].tolist() == before.tolist()
    last = np.array(whole.tokens).reshape(-1)[np.array(whole.last)]
    assert at[np.array(shared.last)].tolist() == last.tolist()
    assert shared.shared.level == (len({len(prompt) for prompt in prompts}) == 1)


def test_spread_puts_counted_values_at_their_slots() -> None:
    sequences = make_sequences([[1], [1, 2], [3]], [[4, 5], [6], [7, 8, 9]], slots=4)
    spread = sequences.spread(mx.array([1.0, 2.0, np.nan, 4.0, 5.0, 6.0]))
    np.testing.assert_array_equal(np.array(spread), [[1, 2, 0, 0], [np.nan, 0, 0, 0], [4, 5, 6, 0]])


def test_gradients_of_spread_come_from_counted_slots_only() -> None:
    sequences = make_sequences([[1], [1, 2]], [[4, 5, 6], [6]])
    junk = mx.array([[1.0, 2.0, 3.0], [4.0, 100.0, 100.0]])
    gradient = mx.grad(lambda x: (sequences.spread(x) * junk).sum())(mx.zeros((4,)))
    assert np.array(gradient).tolist() == [1, 2, 3, 4]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        make_sequences([[1], []], [[2], [3]])


def test_a_rollouts_rows_keep_all_its_slots() -> None:
    rollout = Rollout(
        prompts=((1, 2), (3,)),
        responses=((4,), (5, 6, 7)),
        logprobs=mx.zeros((2, 3)),
        mask=mx.array([[True, False, False], [True, True, True]]),
        finished=mx.array([True, False]),
        group=mx.array([0, 1]),
        records=({}, {}),
        temperature=1.0,
        max_tokens=8,
    )
    brute_force(rollout.sequences(), [[1, 2], [3]], [[4], [5, 6, 7]], 3)
    brute_force(rollout.sequences([0]), [[1, 2]], [[4]], 3)
    brute_force(rollout.sequences([1, 0]), [[3], [1, 2]], [[5, 6, 7], [4]], 3)
