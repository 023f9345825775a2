import time

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ppo.data.batches import length_batches, pad_right
from mlx_ppo.data.random import mx_key, philox


def test_pad_right():
    tokens, lengths = pad_right([[1, 2, 3], (4,), []], pad=9)
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]]
    assert lengths.tolist() == [3, 1, 0]
    assert tokens.dtype == lengths.dtype == np.int32
    assert pad_right([])[0].shape == (0, 0)


@given(
    lengths=st.lists(st.integers(0, 60), max_size=80),
    max_rows=st.integers(1, 9),
    max_tokens=st.none() | st.integers(1, 200),
    seed_parts=st.none() | st.tuples(st.integers(0, 9)),
)
def test_every_index_once_and_within_the_limits(lengths, max_rows, max_tokens, seed_parts):
    batches = length_batches(lengths, max_rows=max_rows, max_tokens=max_tokens, seed_parts=seed_parts)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert 1 <= len(batch) <= max_rows
        assert max_tokens is None or padded <= max_tokens or len(batch) == 1


def test_a_row_that_the_jitter_put_after_shorter_ones_counts_with_its_length():
    lengths = list(range(100, 130))
    for seed in range(20):
        batches = length_batches(lengths, max_rows=9, max_tokens=360, seed_parts=(seed,))
        assert max(len(batch) * max(lengths[index] for index in batch) for batch in batches) <= 360


def test_without_seed_the_longest_come_first():
    lengths = [3, 9, 5, 9]
    assert length_batches(lengths, max_rows=2, max_tokens=None, seed_parts=None) == [[1, 3], [2, 0]]
    assert length_batches(lengths, max_rows=4, max_tokens=10, seed_parts=None) == [[1], [3], [2, 0]]


def test_shuffled_batches_stay_dense_and_change_with_the_parts():
    lengths = np.random.default_rng(0).integers(5, 400, size=2000).tolist()

    def batches(*parts):
        return length_batches(lengths, max_rows=16, max_tokens=None, seed_parts=parts)

    first = batches(1, 0)
    assert first == batches(1, 0)
    other = batches(1, 1)
    assert first != other
    assert len({frozenset(batch) for batch in first} & {frozenset(batch) for batch in other}) < 3
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in first)
    assert padded < 1.12 * sum(lengths)
    widths = [max(lengths[index] for index in batch) for batch in first]
    assert abs(np.corrcoef(widths, range(len(widths)))[0, 1]) < 0.3


def test_rows_of_equal_length_are_mixed():
    first, other = (length_batches([7] * 40, max_rows=4, max_tokens=None, seed_parts=(n,)) for n in (0, 1))
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in other}


def test_a_batch_needs_a_row():
    with pytest.raises(ValueError, match="max_rows"):
        length_batches([1], max_rows=0, max_tokens=None, seed_parts=None)


def test_many_rows_are_quick():
    lengths = np.random.default_rng(0).integers(5, 400, size=100_000).tolist()
    start = time.process_time()
    length_batches(lengths, max_rows=16, max_tokens=4096, seed_parts=(0,))
    assert time.process_time() - start < 5


def test_philox_is_fixed_by_its_parts():
    assert philox("a", 1).bit_generator.random_raw() == 15623407591628994962  # a later version must give the same
    assert philox("a", 1).random() == philox("a", np.int64(1)).random()
    draws = {philox(*parts).random() for parts in [("a", 1), ("a", 2), ("b", 1), (1, "a"), ("a",), ("a", "1"), ()]}
    assert len(draws) == 7
    with pytest.raises(TypeError):
        philox(1.5)


def test_mx_key_is_fixed_by_its_parts():
    assert mx_key("a", 1).tolist() == mx_key("a", np.int64(1)).tolist()
    assert mx_key("a", 1).tolist() != mx_key("a", 2).tolist()
    assert mx_key("a", 1).dtype == mx.uint32
    assert any(mx_key(n).tolist()[0] for n in range(3))  # all 64 bits count
