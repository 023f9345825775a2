"""AdamW over a role's flat weights: schedule, clipping by global norm, and a state that can be saved exactly."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.optimizers import AdamW

from mlx_ppo.compute.device import on_cpu
from mlx_ppo.config.sections import OptimizerSection
from mlx_ppo.errors import RunError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.stages.records import number

Arrays = dict[str, mx.array]
Floats = np.ndarray[Any, np.dtype[np.float32]]
_PIECE = 1 << 18  # elements at once: a handful of such arrays fits the cache, and calls take little of the time
_THREADS = 2


def finite_norm(gradients: Mapping[str, mx.array], *, what: str) -> float:
    """The global norm of a role's gradients.

    Raises:
        RunError: it is not finite.
    """
    if on_cpu():
        norm = math.sqrt(sum(_by_pieces(_square, [(np.asarray(g),) for g in gradients.values()])))
    else:
        norm = number(mx.sqrt(sum((mx.square(g).sum() for g in gradients.values()), mx.zeros(()))))
    if not math.isfinite(norm):
        raise RunError(f"the {what}'s gradient is not finite; the update was not applied")
    return norm


class Optimizer:
    """AdamW with bias correction. The rate of a step is a function of the step's number alone, so resuming is exact."""

    def __init__(self, section: OptimizerSection, *, learning_rate: float, total_steps: int) -> None:
        """Prepare; the schedule spans `total_steps` optimizer steps."""
        self._section = section
        self._peak = learning_rate
        self._total = total_steps
        self.steps = 0
        self._adam = AdamW(
            learning_rate=learning_rate,
            betas=[section.beta1, section.beta2],
            eps=section.eps,
            weight_decay=section.weight_decay,
            bias_correction=True,
        )

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, then the schedule down to 0."""
        warmup = self._section.warmup_steps
        if step < warmup:
            return self._peak * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self._total - warmup))
        if self._section.schedule == "linear":
            return self._peak * (1 - progress)
        if self._section.schedule == "cosine":
            return self._peak * 0.5 * (1 + math.cos(math.pi * progress))
        return self._peak

    def step(self, weights: Weights, gradients: Arrays, *, what: str) -> tuple[Weights, float]:
        """Apply one step's gradients.

        Args:
            weights: the weights to change.
            gradients: one float32 array for each of them. On a CPU they are taken out, and their memory holds the new
                weights.
            what: the role's name, for the error.
        Returns:
            The new weights, and the gradients' global norm before clipping.
        Raises:
            RunError: the norm is not finite; nothing is applied.
        """
        norm = finite_norm(gradients, what=what)
        factor = min(1.0, self._section.gradient_clip / (norm + 1e-6))
        arrays = (self._step_on_cpu if on_cpu() else self._step)(weights.arrays, gradients, factor)
        self.steps += 1
        return weights.holding(arrays), norm

    def _step(self, weights: Mapping[str, mx.array], gradients: Mapping[str, mx.array], factor: float) -> Arrays:
        clipped = {name: gradient * factor for name, gradient in gradients.items()}
        self._adam.learning_rate = mx.array(self.rate(self.steps))
        arrays: Arrays = self._adam.apply_gradients(clipped, dict(weights))
        mx.eval(arrays, self._adam.state)
        return arrays

    def _step_on_cpu(self, weights: Mapping[str, mx.array], gradients: Arrays, factor: float) -> Arrays:
        """The same in numpy; the moments change where they are.

        mlx's elementwise operations run on one core and unvectorised there.
        """
        if not self._adam._initialized:
            self._adam.init(dict(weights))
            mx.eval(self._adam.state)
        section, time = self._section, self.steps + 1
        rate = self.rate(self.steps)
        fresh, kept = 1 - section.beta1, 1 - section.beta2
        root = math.sqrt(1 - section.beta2**time)
        scale = rate * root / (1 - section.beta1**time)
        decay = 1 - rate * section.weight_decay

        def change(new: Floats, weight: Floats, m: Floats, v: Floats) -> float:
            new *= np.float32(factor * fresh)
            m *= np.float32(section.beta1)
            m += new
            new *= new
            new *= np.float32(kept / fresh**2)
            v *= np.float32(section.beta2)
            v += new
            np.sqrt(v, out=new)
            new += np.float32(section.eps * root)
            np.divide(m, new, out=new)
            new *= np.float32(scale)
            if decay != 1:
                weight = weight * np.float32(decay)
            np.subtract(weight, new, out=new)
            return 0.0

        changed = _to_write_over(gradients, weights)
        rows = []
        for name, new in changed.items():
            moments = self._adam.state[name]
            rows.append(tuple(map(np.asarray, (new, weights[name], moments["m"], moments["v"]))))
        _by_pieces(change, rows)
        return changed

    def state(self) -> Arrays:
        """Moments by `m/<name>` and `v/<name>`; empty before the first step."""
        arrays: Arrays = {}
        for name, moments in self._adam.state.items():
            if isinstance(moments, dict):
                arrays.update({f"{moment}/{name}": array for moment, array in moments.items()})
        return arrays

    def load(self, arrays: Arrays, steps: int) -> None:
        """Put back what `state` gave after `steps` steps."""
        state: dict[str, object] = {"step": mx.array(steps, mx.uint64), "learning_rate": mx.array(self._peak)}
        for key, array in arrays.items():
            moment, _, name = key.partition("/")
            held = state.setdefault(name, {})
            assert isinstance(held, dict)
            held[moment] = array
        if arrays:
            self._adam.state = state
            self._adam._initialized = True
        self.steps = steps


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
