"""What takes the place of things that can't or needn't be there while a function is traced.

mlx cannot trace a function that reads an array's values, such as one that computes in numpy. While tracing, such code
is replaced by operations that allocate the same arrays, with a mark (see `outside`) where it leaves mlx.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_ppo.compute import checkpointing, output_head
from mlx_ppo.compute.cpu import activations, attention, compact, passes, vocabulary
from mlx_ppo.compute.device import assuming, on_cpu
from mlx_ppo.models.parts import placeholder

_MARK = 1 << 60  # a mark is a strided view with an offset that no real array has


class Inside(NamedTuple):
    """A function that is evaluated by itself, and arrays like those that it is called with, which are there already."""

    function: Callable[..., Any]
    arguments: Sequence[mx.array]
    beside: int  # bytes of arrays that are there only meanwhile
    key: Hashable = None  # functions with the same one need the same; None: this one is like no other


class Work(NamedTuple):
    """What code outside of mlx needs while it runs, and while its gradient does.

    In bytes that mlx doesn't count, in arrays of mlx, and in evaluations of its own.
    """

    forward: int
    gradient: int
    forward_arrays: int = 0
    gradient_arrays: int = 0
    inside: tuple[Inside | None, Inside | None] = (None, None)


_marks: ContextVar[list[Work] | None] = ContextVar("marks", default=None)


def outside(result: mx.array, reads: Sequence[mx.array], work: Work) -> mx.array:
    """Mark, while tracing, a place where code leaves mlx and needs `reads` evaluated.

    The mark has to be an input of the one operation that stands for the code's result, which must read one of `reads`
    itself; operations that mlx derives from that one for the gradient read the mark too, and so are found. All of
    these stand for new arrays. What only local variables of callers still hold at that moment isn't known and isn't
    counted.

    Args:
        result: what the mark is to look like.
        reads: what the code reads. No gradient flows through the mark.
        work: what the code needs.
    Raises:
        RuntimeError: nothing is being traced.
    """
    marks = _marks.get()
    if marks is None:
        raise RuntimeError("stand-ins are for tracing only")
    marks.append(work)
    (waiting,) = mx.depends([result], [mx.stop_gradient(array) for array in reads])
    return mx.as_strided(waiting, result.shape, [0] * result.ndim, _MARK + len(marks) - 1)


def mark_of(name: str, arguments: Sequence[Any]) -> int | None:
    """The number of the mark that an operation is, None if it is an ordinary one."""
    return arguments[-1] - _MARK if name == "AsStrided" and arguments[-1] >= _MARK else None


def weightless(model: nn.Module) -> nn.Module:
    """Put in place of each of a model's arrays an evaluated one of the same shape and type that takes four bytes.

    The model can then be captured by functions to be traced, without its weights being loaded; its outputs mean
    nothing, and computing them would allocate whole weights. Changes and returns `model`.
    """
    model.update(tree_map(placeholder, model.parameters()))
    return model


def present(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """An array that is in memory already, as far as a trace can see; it takes no more than an element."""
    array = mx.broadcast_to(mx.zeros((), dtype), shape)
    mx.eval(array)
    return array


@contextmanager
def standing_in() -> Iterator[list[Work]]:
    """Replace this project's own numpy code for the length of a `with` block; the marks that are made are collected."""
    real = [(module, name, getattr(module, name)) for module, name, _ in _STAND_INS]
    collected: list[Work] = []
    before = _marks.set(collected)
    try:
        for module, name, stand_in in _STAND_INS:
            setattr(module, name, stand_in)
        yield collected
    finally:
        for module, name, function in real:
            setattr(module, name, function)
        _marks.reset(before)


@contextmanager
def as_on_metal() -> Iterator[None]:
    """Trace what a GPU would compute, for the length of a `with` block: no numpy, and attention in one kernel."""
    attention = mx.fast.scaled_dot_product_attention
    try:
        mx.fast.scaled_dot_product_attention = _fused_attention
        with assuming(cpu=False):
            yield
    finally:
        mx.fast.scaled_dot_product_attention = attention


def _fused_attention(q: mx.array, k: mx.array, v: mx.array, **_: Any) -> mx.array:
    """Makes an array like q; its gradient makes ones like k and v."""
    return q + (k[..., :1, :1].sum() + v[..., :1, :1].sum())


@contextmanager
def spelt_out() -> Iterator[None]:
    """Switch `mx.compile` off for the length of a `with` block, because mlx can't trace what it makes."""
    if not _compiling():
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def _compiling() -> bool:
    """Whether `mx.compile` is on; mlx has no way to ask, but what is compiled runs in Python just once."""
    runs: list[int] = []

    def count(array: mx.array) -> mx.array:
        runs.append(1)
        return array + 1

    compiled = mx.compile(count)
    compiled(mx.zeros(()))
    compiled(mx.zeros(()))
    return len(runs) == 1


def _vocabulary_on_cpu(logits: mx.array, tokens: mx.array, inverse: mx.array) -> tuple[mx.array, mx.array]:
    """For `vocabulary._on_cpu`; gathering has the gradient that it has, one array [N, V].

    Numpy works by pieces: on shifted logits, their exponentials and a third array; the gradient is whole.
    """
    pieces = 3 * min(logits.nbytes, max(logits.shape[-1], vocabulary._PIECE) * 4)
    work = Work(pieces, pieces + logits.nbytes)
    index = outside(tokens[:, None].astype(mx.int32), [logits, tokens, inverse], work)
    picked = mx.take_along_axis(logits, index, axis=-1).squeeze(-1)
    return picked, picked * 1.0


def _summed_vocabulary(logits: mx.array, tokens: mx.array, inverse: mx.array) -> tuple[mx.array, ...]:
    """For `vocabulary._summed`, whose gradient [N, V] is made in the forward pass and then only handed over."""
    if on_cpu():
        return _vocabulary_on_cpu(logits, tokens, inverse)
    logprobs, entropies, slopes = map(mx.stop_gradient, vocabulary.summed_on_gpu(logits, tokens, inverse))
    return _sloping(logits, slopes, logprobs), entropies


def _head_by_chunks(
    statistics: output_head.Statistics,
    size: int,
    ahead: bool,
    states: mx.array,
    tokens: mx.array,
    *arrays: mx.array,
) -> tuple[mx.array, ...]:
    """For `output_head._by_chunks`: a chunk by itself, and what is left of it."""
    if not on_cpu():
        found = output_head.forward(statistics, size, ahead, states, tokens, *arrays)
        if not ahead:
            return found  # a gradient keeps all logits, and is overestimated
        logprobs, entropies, slopes = map(mx.stop_gradient, found)
        return _sloping(states, slopes, logprobs), entropies

    def one(states: mx.array, *arrays: mx.array) -> Sequence[mx.array]:
        own = mx.zeros(states.shape[:1], mx.int32)
        return output_head.one_ahead(statistics, states, own) if ahead else statistics(states, own, *arrays)

    def gradient(states: mx.array, *arrays: mx.array) -> list[mx.array]:
        own, given = mx.zeros(states.shape[:1], mx.int32), [states, *arrays]
        cotangents = [mx.zeros(own.shape), mx.zeros(own.shape)]
        values, made = mx.vjp(lambda states, *arrays: statistics(states, own, *arrays), given, cotangents)
        return [*values, *made, *(mx.zeros(array.shape) for array in arrays)]

    chunk = [
        mx.zeros((size, states.shape[-1]), states.dtype),
        *(mx.zeros(array.shape, array.dtype) for array in arrays),
    ]
    parts = states.nbytes * (len(states) - size) // len(states)  # gradients by the states of the chunks before
    forward = Inside(one, chunk, states.nbytes + (parts if ahead else 0))
    work = Work(0, 0, 0, 0, (forward, None if ahead else Inside(gradient, chunk, states.nbytes + parts)))
    picked = [_picked(array, 1, [array], Work(0, 0)).sum() for array in arrays]
    kept = _picked(states, states.shape[-1] if ahead else 1, [states, tokens], work)
    logprobs = (kept * mx.stop_gradient(kept)).sum(axis=-1).astype(mx.float32) + sum(picked, mx.zeros(()))
    return logprobs, logprobs * 1.0


def _pass_on_cpu(one: passes.Pass, entering: mx.array, *arrays: mx.array, learning: bool) -> mx.array:
    """For `passes.computed`: new states, and what is kept for a gradient, which has an array for each given one."""
    needs = one.needs(learning=learning)
    work = Work(needs.scores, 2 * needs.scores, needs.forward, needs.back + sum(array.nbytes for array in arrays))
    if not learning:
        return _picked(entering, entering.shape[-1], [entering, *arrays], work)
    # The sums are two arrays that there are not in truth, in place of as much of what is kept.
    read = sum((_picked(array, 1, [array], Work(0, 0)).sum() for array in arrays), mx.zeros(()))
    given = entering + read
    found = _picked(given, entering.shape[-1], [given, *arrays], work)
    width = (needs.kept - 2 * entering.nbytes) // (4 * len(entering))
    kept = _picked(mx.stop_gradient(entering), width, [mx.stop_gradient(entering)], Work(0, 0))
    return found + kept @ mx.broadcast_to(read, (width, 1))


def _block_twice(inside: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """For `checkpointing.twice`: a block by itself, on copies, and again together with its gradient."""

    def gradient(cotangent: mx.array, *primals: mx.array) -> Sequence[mx.array]:
        values, gradients = mx.vjp(inside, list(primals), [cotangent])
        return [*values, *gradients]  # the values too: what computes them outside of mlx does so whoever asks

    def function(*primals: mx.array) -> mx.array:
        states, *arrays = primals
        like = [mx.zeros(primal.shape, primal.dtype) for primal in primals]
        key = tuple((primal.shape, primal.dtype) for primal in primals)
        copies = sum(primal.nbytes for primal in primals) if on_cpu() else 0
        forward = Inside(inside, like, copies, ("block", key))
        backward = Inside(gradient, [like[0], *like], copies + states.nbytes, ("gradient", key))
        picked = [_picked(array, 1, [array], Work(0, 0)).sum() for array in arrays]
        kept = _picked(states, states.shape[-1], [states], Work(0, 0, 0, 0, (forward, backward)))
        return kept + sum(picked, mx.zeros((), kept.dtype)).astype(kept.dtype)

    return function


def _picked(array: mx.array, columns: int, reads: Sequence[mx.array], work: Work) -> mx.array:
    """A new array [..., columns] made outside of mlx; so is a gradient like `array`."""
    index = outside(mx.zeros((*array.shape[:-1], columns), mx.int32), reads, work)
    return mx.take_along_axis(array, index, axis=-1)


def _sloping(array: mx.array, slopes: mx.array, rows: mx.array) -> mx.array:
    """Something like `rows` [N], after them, that has these slopes [N, D] as its gradient by `array` [N, D]."""
    found: mx.array = mx.depends([(array * slopes).sum(axis=-1)], [rows])[0]
    return found.astype(rows.dtype)


def _gate_on_cpu(gate: mx.array, up: mx.array) -> mx.array:
    """For `activations._on_cpu`; selecting has gradients of the same shapes. Numpy holds what it returns as well."""
    anywhere = mx.broadcast_to(mx.array(True), gate.shape)
    return mx.where(outside(anywhere, [gate, up], Work(gate.nbytes, 2 * gate.nbytes)), gate, up)


def _attention_on_cpu(scores: mx.array, mask: mx.array, scale: mx.array) -> mx.array:
    """For `attention._weights`; selecting has a gradient of the same shape. Numpy holds what it returns as well."""
    anywhere = mx.broadcast_to(mx.array(True), scores.shape)
    work = Work(scores.nbytes, scores.nbytes + scores.nbytes // len(scores))
    return mx.where(outside(anywhere, [scores, mask, scale], work), scores, mx.zeros(()))


def _compact_on_cpu(x: mx.array, packed: compact.Packed) -> mx.array:
    """For `compact._on_cpu`; gathering makes an array as the product does, its gradient one like x.

    There is a piece of the matrix, and what is multiplied with it; and what comes out, before it is copied.
    """
    shape = (*x.shape[:-1], packed.outputs)
    columns = next(packed.pieces()).stop
    matrix, part = columns * packed.inputs * 4, x.size // packed.inputs * columns * 4
    whole = x.size // packed.inputs * packed.outputs * 4 if columns < packed.outputs else 0
    work = Work(0, 0, x.nbytes + matrix + part + whole, part + matrix + 2 * x.nbytes)
    index = outside(mx.broadcast_to(mx.array(0), shape), [x], work)
    return mx.take_along_axis(x, index, axis=-1)


_STAND_INS: tuple[tuple[ModuleType, str, Callable[..., Any]], ...] = (
    (vocabulary, "_on_cpu", _vocabulary_on_cpu),
    (vocabulary, "_summed", _summed_vocabulary),
    (output_head, "_by_chunks", _head_by_chunks),
    (output_head, "_times", lambda states, matrix: states @ matrix.T),
    (activations, "_on_cpu", _gate_on_cpu),
    (attention, "_weights", _attention_on_cpu),
    (compact, "_on_cpu", _compact_on_cpu),
    (checkpointing, "twice", _block_twice),
    (passes, "computed", _pass_on_cpu),
)
