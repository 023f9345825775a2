"""AdamW and global norms by numpy, on two threads; mlx's elementwise operations run on one core and unvectorised."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.cpu.products import Floats
from mlx_ppo.compute.engine import Arrays, Step

_PIECE = 1 << 18  # elements at once: a handful of such arrays fits the cache, and calls take little of the time
_THREADS = 2


def norm(arrays: Iterable[mx.array]) -> float:
    """The global norm."""
    return math.sqrt(sum(_by_pieces(_square, [(np.asarray(array),) for array in arrays])))


def adamw(weights: Mapping[str, mx.array], gradients: Arrays, moments: dict[str, Arrays], step: Step) -> Arrays:
    """New weights, in the memory of the gradients, which are taken out; the moments change where they are."""
    fresh, kept = 1 - step.beta1, 1 - step.beta2
    root = math.sqrt(1 - step.beta2**step.number)
    scale = step.rate * root / (1 - step.beta1**step.number)
    decay = 1 - step.rate * step.weight_decay

    def change(new: Floats, weight: Floats, m: Floats, v: Floats) -> float:
        new *= np.float32(step.factor * fresh)
        m *= np.float32(step.beta1)
        m += new
        new *= new
        new *= np.float32(kept / fresh**2)
        v *= np.float32(step.beta2)
        v += new
        np.sqrt(v, out=new)
        new += np.float32(step.eps * root)
        np.divide(m, new, out=new)
        new *= np.float32(scale)
        if decay != 1:
            weight = weight * np.float32(decay)
        np.subtract(weight, new, out=new)
        return 0.0

    changed = _to_write_over(gradients, weights)
    rows = [
        tuple(map(np.asarray, (new, weights[name], moments[name]["m"], moments[name]["v"])))
        for name, new in changed.items()
    ]
    _by_pieces(change, rows)
    return changed


def _to_write_over(gradients: Arrays, names: Iterable[str]) -> Arrays:
    """Take gradients out; copied are those that lie transposed, as weights do not, or where another one lies."""
    found: Arrays = {}
    places: set[int] = set()
    for name in names:
        gradient = gradients.pop(name)
        values = np.asarray(gradient)
        usable = values.flags.c_contiguous and values.ctypes.data not in places
        places.add(values.ctypes.data)
        found[name] = gradient if usable else mx.array(np.ascontiguousarray(values))
    return found


def _square(values: Floats) -> float:
    with np.errstate(over="ignore"):  # too large for a step: the norm is infinite then
        return float(np.einsum("i,i->", flat := values.ravel(), flat))


def _by_pieces(function: Callable[..., float], rows: Sequence[tuple[Floats, ...]]) -> list[float]:
    """Call a function with pieces of the arrays of each row, on several threads; what it returns, in order."""
    pieces = [piece for row in rows for piece in _pieces(row)]
    if len(pieces) <= len(rows):  # small ones only
        return [function(*piece) for piece in pieces]
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(lambda piece: function(*piece), pieces))


def _pieces(arrays: tuple[Floats, ...]) -> Iterator[list[Floats]]:
    """The same pieces of arrays of one shape: flat ones, or rows where some lie transposed, as mlx's gradients do."""
    if all(array.flags.f_contiguous for array in arrays):
        arrays = tuple(array.T for array in arrays)
    size = _PIECE
    if all(array.flags.c_contiguous for array in arrays):
        arrays = tuple(array.reshape(-1) for array in arrays)
    else:
        size = max(1, _PIECE // arrays[0][0].size)
    for start in range(0, len(arrays[0]), size):
        yield [array[start : start + size] for array in arrays]
