"""The engine of a CPU: what mlx's CPU backend is slow with, by numpy and BLAS; the rest as on a GPU."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ppo.algo.truncation import Distribution
from mlx_ppo.compute import portable
from mlx_ppo.compute.adapted import count_of, parameters_of
from mlx_ppo.compute.attention import attending_by
from mlx_ppo.compute.checkpointing import Function, checkpointed, planned_twice
from mlx_ppo.compute.cpu import optimizer, threads
from mlx_ppo.compute.cpu.activations import use_fast_gates
from mlx_ppo.compute.cpu.attention import attend
from mlx_ppo.compute.cpu.common_blocks import unsupported
from mlx_ppo.compute.cpu.compact import keep_compact
from mlx_ppo.compute.cpu.head import CpuHead, copied
from mlx_ppo.compute.cpu.passes import states_of
from mlx_ppo.compute.cpu.rotary import share_angles
from mlx_ppo.compute.cpu.sampling import sample
from mlx_ppo.compute.cpu.steps import MOST_ROWS, Steps
from mlx_ppo.compute.engine import Arrays, Body, Capabilities, Numbers, Reader, Sampled, Step
from mlx_ppo.compute.needs import is_traced
from mlx_ppo.compute.portable import DTYPES, PortableEngine
from mlx_ppo.compute.probes import REFUSALS, decoded, short_rows, whole
from mlx_ppo.compute.sequences import Sequences, make_sequences

_CLOSE = 1e-3  # of what the kernels may differ by from the model, in float32
_SLOWER = 2  # times, about: what reading rows and decoding by mlx takes of the kernels' time on two cores


class CpuEngine(PortableEngine):
    """Numpy and BLAS; blocks that the kernels don't support are computed by mlx, with numpy's elementwise functions."""

    name = "cpu"
    runs_ahead = False
    head = CpuHead()

    def prepare(self, model: nn.Module) -> None:
        """Faster gates and rotary embeddings, and the threads that products of this size gain from."""
        threads.serve(count_of(parameters_of(model).values()))
        use_fast_gates(model)
        share_angles(model)

    def dtype(self, wanted: str, stored: mx.Dtype, parameters: int) -> mx.Dtype:
        """Float32 unless another is wanted: half precision is slow on a CPU."""
        return DTYPES.get(wanted, mx.float32)

    def unpacks(self, wanted: str) -> bool:
        """Unless half precision is wanted."""
        return wanted in ("auto", "float32")

    def unpacked(self, model: nn.Module, wanted: str, *, compact: bool) -> tuple[nn.Module, str]:
        """In float32, at once or, `compact`, a matrix at a time; as it is where half precision is wanted."""
        from mlx_lm.utils import dequantize_model

        if not self.unpacks(wanted) or not any(isinstance(m, nn.QuantizedLinear) for m in model.modules()):
            return model, ""
        model.set_dtype(mx.float32)  # scales too: in half precision the blocks would lose what they hold
        remark = "quantised; computed in float32 here, because a CPU is slow with quantised products"
        if not compact:
            return dequantize_model(model), remark
        keep_compact(model)
        return model, remark + ", of one matrix at a time"

    def capabilities(self, body: Body, *, checked: bool) -> Capabilities:
        """The kernels are tried against the model, once, with its own weights."""
        why = unsupported(body)
        rows = not why and (not checked or _rows_alike(body))
        steps = checked and not why and _steps_alike(body)
        found = super().capabilities(body, checked=checked)
        if checked and not why and not (rows and steps):
            why = "blocks whose numbers differ from the kernels'"
        slow = (f"computed by mlx, about {_SLOWER} times slower on a CPU: {why}",) if why and checked else ()
        return found._replace(rows=rows, steps=steps, remarks=(*slow, *found.remarks))

    def computing(self) -> AbstractContextManager[None]:
        """Attention's weights by numpy."""
        return attending_by(attend)

    def states(
        self, body: Body, sequences: Sequences, read: mx.array | None, *, learning: bool, saving: bool
    ) -> mx.array:
        """By the kernels, where they support the model and no dropout acts."""
        if body.capabilities.rows and not body.is_noisy:
            return states_of(body, sequences, read, learning=learning, saving=saving)
        return portable.read_rows(body, sequences)

    def shares_learning(self, body: Body, *, saving: bool) -> bool:
        """Also with gradient checkpointing, where the kernels read."""
        return body.capabilities.shares and (not saving or body.capabilities.rows)

    def checkpointed(self, body: Body, block: nn.Module) -> Callable[..., mx.array]:
        """Evaluated by itself."""
        return checkpointed(block, trained=bool(body.replaced), twice=_twice, computing=self.computing)

    def reader(self, body: Body, rows: int, *, full: bool) -> Reader:
        """Products of few rows by numpy and BLAS, where the model is supported."""
        if body.capabilities.steps and rows <= MOST_ROWS and full:
            return StepReader(body, rows)
        return CpuReader(body)

    def norm(self, arrays: Iterable[mx.array]) -> float:
        """By numpy."""
        return optimizer.norm(arrays)

    def adamw(
        self, weights: Mapping[str, mx.array], gradients: Arrays, moments: dict[str, Arrays], step: Step
    ) -> Arrays:
        """By numpy, in the memory of the gradients, which are taken out."""
        return optimizer.adamw(weights, gradients, moments, step)

    def exact(self, body: Body) -> bool:
        """A quantised model is computed in float32, too."""
        return all(array.dtype in (mx.float32, mx.uint32) for array in body.base.values())

    def truncation_needs(self, rows: int, vocabulary: int) -> dict[str, int]:
        """Nothing: numpy works on few rows at once."""
        return {}

    def step_needs(self, own: int, others: int, largest: int, *, transposed: bool) -> dict[str, int]:
        """Moments change where they are; new weights take the gradients' memory, unless these lie transposed."""
        return {"a gradient, copied": largest if transposed else 0}


class CpuReader(portable.ModelReader):
    """The model reads, numpy samples."""

    ahead = False

    def sample(self, states: mx.array, draws: Numbers, how: Distribution) -> Sampled:
        """See `cpu.sampling.sample`."""
        return sample(np.asarray(self._body.logits(states).astype(mx.float32)), draws, how)

    def read(self, tokens: Any, caches: Sequence[Any]) -> tuple[mx.array, mx.array | None]:
        """Not evaluated."""
        return super().read(mx.array(tokens), caches)


class StepReader:
    """Numpy and BLAS read and sample."""

    ahead = False
    in_place = True

    def __init__(self, body: Body, rows: int) -> None:
        """With the weights that lie on the model."""
        self._steps = Steps(body, rows)

    def sample(self, states: mx.array, draws: Numbers, how: Distribution) -> Sampled:
        """See `cpu.sampling.sample`."""
        return sample(self._steps.logits(states), draws, how)

    def read(self, tokens: Any, caches: Sequence[Any]) -> tuple[mx.array, mx.array | None]:
        """Evaluated."""
        return self._steps.read(tokens, caches)

    def detach(self) -> None:
        """Let go of the caches."""
        self._steps.detach()


def _twice(inside: Function) -> Function:
    """The same function, whose inside is evaluated at once, both ways, and leaves nothing in memory.

    mlx keeps every array that it evaluates while it traces a gradient, for as long as its results live; and the numpy
    code of this project makes it evaluate. So what goes in and comes out here are copies that know of no graph.
    """
    if is_traced():
        return planned_twice(inside)

    @mx.custom_function
    def function(*primals: mx.array) -> mx.array:
        return copied(inside(*map(copied, primals)))

    @function.vjp
    def _(primals: Sequence[mx.array] | mx.array, cotangent: mx.array, _: mx.array) -> Any:
        given = [primals] if isinstance(primals, mx.array) else primals  # as mlx calls it for a function of one array
        found = [copied(array) for array in mx.vjp(inside, [*map(copied, given)], [copied(cotangent)])[1]]
        return found[0] if isinstance(primals, mx.array) else tuple(found)

    return cast(Function, function)


def _steps_alike(body: Body) -> bool:
    """Whether `cpu.steps` gives the states and the logits that the model gives."""

    def read(tokens: mx.array, caches: list[Any]) -> mx.array:
        return Steps(body, len(tokens)).read(np.array(tokens), caches)[0]

    turns = [(0, 1, 2), (3,)]
    try:
        found, wanted = decoded(body, turns, read), whole(body, turns)
        logits = mx.array(Steps(body, len(wanted)).logits(wanted))
    except REFUSALS:
        return False
    return _close(found, wanted) and _close(logits, body.logits(wanted))


def _rows_alike(body: Body) -> bool:
    """Whether `cpu.passes` gives the states that the model gives, of whole rows and where prompts are shared."""
    prompts, responses = short_rows(body)
    rows, shared = (make_sequences(prompts, responses, sharing=sharing) for sharing in (False, True))
    wanted = portable.read_rows(body, rows)[rows.predicting]
    try:
        found = [
            states_of(body, one, one.predicting, learning=False, saving=False)[one.predicting] for one in (rows, shared)
        ]
        return all(_close(states, wanted) for states in found)
    except REFUSALS:
        return False


def _close(states: mx.array, wanted: mx.array) -> bool:
    return bool(mx.allclose(states, wanted, rtol=_CLOSE, atol=_CLOSE).item())
