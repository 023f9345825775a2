import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_ppo.compute.cpu import products
from mlx_ppo.compute.cpu.products import by_matrix, can_prepare, integers, prepare

pytestmark = pytest.mark.skipif(not can_prepare(), reason="no BLAS with products of many small matrices")


def drawn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("outputs", [1, 23, 24, 25, 48, 100])
@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_rows_by_a_matrix(outputs, columns_first, add):
    left, matrix, out = drawn(5, 13), drawn(outputs, 13, seed=1), drawn(4, outputs, seed=2)
    if columns_first:
        matrix = np.asfortranarray(matrix)
    before, rows = out.copy(), integers([4, 4])
    run = by_matrix(rows, left, matrix, out, add=add)
    run()
    np.testing.assert_allclose(out, left[:4] @ matrix.T + add * before, atol=1e-5)
    rows[:], out[:] = [2, 2], before
    left[0] = 1
    run()
    np.testing.assert_allclose(out[:2], left[:2] @ matrix.T + add * before[:2], atol=1e-5)
    np.testing.assert_array_equal(out[2:], before[2:], err_msg="rows that weren't asked for stay")


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_as_many_rows_as_are_asked_for_on_any_processor(monkeypatch, small, columns_first, add):
    """Where OpenBLAS has kernels for small products, many rows are computed in two parts; elsewhere plainly."""
    monkeypatch.setattr(products, "_has_small_kernels", lambda: small)
    left, matrix, before = drawn(64, 13), drawn(100, 13, seed=1), drawn(64, 100, seed=2)
    matrix = np.asfortranarray(matrix) if columns_first else matrix
    out, rows = before.copy(), integers([64, 64])
    run = by_matrix(rows, left, matrix, out, add=add)
    for count in (64, 1, 32, 33, 50, 51, 52, 63, 17):
        rows[:], out[:] = [count, count], before
        run()
        np.testing.assert_allclose(out[:count], left[:count] @ matrix.T + add * before[:count], atol=2e-5)
        np.testing.assert_array_equal(out[count:], before[count:])


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names of another architecture's kernels")
@pytest.mark.parametrize(("kernels", "small"), [("Nehalem", False), ("SkylakeX", True)])
def test_which_processors_have_small_kernels(kernels, small):
    if small and " avx512bw " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512")
    script = "import mlx_ppo; from mlx_ppo.compute.cpu import products; print(products._has_small_kernels())"
    surroundings = {**os.environ, "OPENBLAS_CORETYPE": kernels}
    shown = subprocess.run([sys.executable, "-c", script], env=surroundings, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == str(small)


def test_shapes_that_dont_fit_never_reach_c():
    for left, matrix, out in (((4, 6), (3, 5), (4, 3)), ((4, 5), (3, 5), (4, 4)), ((4, 5), (3, 5), (5, 3))):
        with pytest.raises(ValueError, match="don't fit"):
            by_matrix(integers([1, 1]), drawn(*left), drawn(*matrix), drawn(*out))


def test_matrices_in_the_midst_of_arrays_and_a_length_that_grows():
    """As attention does: scores of queries with the keys so far, and sums of values."""
    queries, keys, scores = drawn(2, 3, 4), drawn(2, 7, 4), np.full((2, 3, 7), 9, np.float32)
    length = integers([0])
    run = prepare(
        (integers([3]), length, integers([4])),
        (queries, [0, 12], 4),
        (keys, [0, 28], 4),
        (scores, [0, 21], 7),
        transposed=True,
    )
    for count in (2, 5):
        length[0] = count
        run()
        np.testing.assert_allclose(scores[..., :count], queries @ keys[:, :count].swapaxes(1, 2), atol=1e-5)
        assert (scores[..., count:] == 9).all()
    sums = np.empty((2, 3, 4), np.float32)
    prepare(
        (integers([3]), integers([4]), length),
        (scores, [0, 21], 7),
        (keys, [0, 28], 4),
        (sums, [0, 12], 4),
        transposed=False,
    )()
    np.testing.assert_allclose(sums, scores[..., :5] @ keys[:, :5], atol=1e-4)


def test_without_the_function_nothing_is_prepared(monkeypatch):
    monkeypatch.setattr(products, "loaded_blas", lambda: None)
    products._batched.cache_clear()
    assert not can_prepare()
    products._batched.cache_clear()
