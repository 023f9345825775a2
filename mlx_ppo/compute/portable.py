"""Everything that a GPU runs, in mlx only: Metal, CUDA, and, by a switch, a CPU for tests.

The model itself computes, with mlx-lm's own compiled parts in place. What this adds: whole rows with one attention for
scoring and updating, prompts that are read once for several responses, sampling where the logits are, and AdamW as one
compiled operation a weight.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ppo.algo.truncation import Distribution, packed, support
from mlx_ppo.compute.attention import attending_by, attention_with_gradient, kernel_attention, model_attention
from mlx_ppo.compute.checkpointing import checkpointed, twice_in_mlx
from mlx_ppo.compute.device import multiplies_coarsely
from mlx_ppo.compute.engine import Arrays, Body, Capabilities, Numbers, Reader, Sampled, Step
from mlx_ppo.compute.kv_cache import share_offsets
from mlx_ppo.compute.needs import in_gradient, is_traced
from mlx_ppo.compute.output_head import OutputHead
from mlx_ppo.compute.probes import joins, reads_batches, shares_prompts, takes_batches
from mlx_ppo.compute.sequences import Sequences
from mlx_ppo.compute.shared_prompts import LayerCache, Reading

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_BLOCK = 256  # entries of the vocabulary that are summed up by themselves, or float32 would not suffice
_SORTING = 8  # arrays of the logits' size that truncated sampling has at once, with those of a GPU's sort
_SMALL = 500_000_000  # parameters of a model whose log-probabilities bfloat16 would round too coarsely for PPO's ratios

_in_rows: ContextVar[bool] = ContextVar("in_rows", default=False)


class PortableEngine:
    """All in mlx."""

    name = "portable"
    runs_ahead = True
    head = OutputHead()

    def __init__(self, why: str = "", *, remark: str = "", fused: bool = False) -> None:
        """Choose it.

        Args:
            why: for people, this engine and not another.
            remark: a line to be said with every model.
            fused: plan for a device on which attention outside of gradients is one kernel, whatever device this is.
        """
        self.why, self._remark = why, remark
        self._fused = fused

    def prepare(self, model: nn.Module) -> None:
        """Nothing: what mlx-lm made stays."""

    def dtype(self, wanted: str, stored: mx.Dtype, parameters: int) -> mx.Dtype:
        """What is wanted; "auto" is float32 for small models, else bfloat16, which has float32's range."""
        return DTYPES.get(wanted, mx.float32 if parameters < _SMALL else mx.bfloat16)

    def unpacks(self, wanted: str) -> bool:
        """No: a GPU has quantised products."""
        return False

    def unpacked(self, model: nn.Module, wanted: str, *, compact: bool) -> tuple[nn.Module, str]:
        """As it is."""
        return model, ""

    def capabilities(self, body: Body, *, checked: bool) -> Capabilities:
        """By small trials with the model's own weights."""
        if not checked:
            batches = takes_batches(body)
            return Capabilities(batches, batches, shares_prompts(body, None))
        batches = reads_batches(body)
        found = Capabilities(batches, batches and joins(body), shares_prompts(body, lambda rows: read_rows(body, rows)))
        remarks = (
            self._remark,
            "" if found.batches else "rollouts decode one row at a time: rows of different length get other states",
            "" if found.joins or not found.batches else "places of responses that end stay empty until all have ended",
            "" if found.shares else "prompts that several responses have are read once for each of them",
        )
        return found._replace(remarks=tuple(filter(None, remarks)))

    def computing(self) -> AbstractContextManager[None]:
        """The model's own attention, over whole rows in float32 where its gradient is no kernel's.

        While a plan is made for a GPU, one that allocates what its kernels do.
        """
        planned = self._fused and is_traced()
        if _in_rows.get():
            return attending_by(functools.partial(attention_with_gradient, model_attention(), planned=planned))
        return attending_by(kernel_attention) if planned else nullcontext()

    def states(
        self, body: Body, sequences: Sequences, read: mx.array | None, *, learning: bool, saving: bool
    ) -> mx.array:
        """By the model, with the attention of a gradient also where none is taken.

        mlx attends by one kernel outside of gradients and by single operations within (Metal, up to 0.32.2 at least),
        whose half-precision results differ by far more than PPO's ratios bear. So scoring is traced like a gradient.
        """
        with _rows(body.model):
            if learning:
                return read_rows(body, sequences)
            traced = mx.value_and_grad(lambda unused: (unused, read_rows(body, sequences)))
            found: mx.array = traced(mx.zeros(()))[0][1]
            return found

    def shares_learning(self, body: Body, *, saving: bool) -> bool:
        """Not with a checkpointed block: gradients by the prompts' keys and values would not reach it."""
        return body.capabilities.shares and not saving

    def checkpointed(self, body: Body, block: nn.Module) -> Callable[..., mx.array]:
        """By `mx.checkpoint`."""
        return checkpointed(
            block, trained=bool(body.replaced), twice=twice_in_mlx, computing=lambda: self._again(block)
        )

    @contextmanager
    def _again(self, block: nn.Module) -> Iterator[None]:
        """Around a block that is computed again, after the whole rows have been."""
        with _rows(block), self.computing():
            yield

    def statistics(
        self,
        body: Body,
        states: mx.array,
        tokens: mx.array,
        *,
        temperature: float,
        support: mx.array | None = None,
        learning: bool,
    ) -> tuple[mx.array, mx.array]:
        """By chunks of positions."""
        return self.head.statistics(body, states, tokens, temperature=temperature, support=support, learning=learning)

    def reader(self, body: Body, rows: int, *, full: bool) -> Reader:
        """The model reads."""
        return ModelReader(body)

    def norm(self, arrays: Iterable[mx.array]) -> float:
        """The global norm."""
        found: Any = mx.sqrt(sum((mx.square(array).sum() for array in arrays), mx.zeros(()))).item()
        return float(found)

    def adamw(
        self, weights: Mapping[str, mx.array], gradients: Arrays, moments: dict[str, Arrays], step: Step
    ) -> Arrays:
        """New weights; one compiled operation for each."""
        numbers = [mx.array(value, mx.float32) for value in _factors(step)]
        found: Arrays = {}
        for name, weight in weights.items():
            own = moments[name]
            found[name], own["m"], own["v"] = _adamw()(weight, gradients[name], own["m"], own["v"], *numbers)
        mx.eval(found, moments)
        return found

    def exact(self, body: Body) -> bool:
        """Whether nothing is in half precision or quantised, and no product in TF32."""
        return not multiplies_coarsely() and all(array.dtype == mx.float32 for array in body.base.values())

    def truncation_needs(self, rows: int, vocabulary: int) -> dict[str, int]:
        """Sorted logits, their sums, and bits, each as large as the logits."""
        return {"logits in order": _SORTING * 4 * rows * vocabulary}

    def step_needs(self, own: int, others: int, largest: int, *, transposed: bool) -> dict[str, int]:
        """New weights and moments beside the old ones."""
        return {"new weights and optimizer states": 3 * max(own, others)}


def read_rows(body: Body, sequences: Sequences) -> mx.array:
    """States [n, D] of all positions by the model, prompts that several rows share once."""
    shared = sequences.shared
    if shared is None:
        states = body.hidden(sequences.tokens, kept=sequences.kept)
        return states.reshape(-1, states.shape[-1])
    reading = Reading(shared)
    caches = [LayerCache(reading) for _ in body.model.layers]
    of_prompts, of_responses = shared.kept or (None, None)
    before = body.hidden(shared.prompts, caches, kept=of_prompts)
    reading.answer()
    after = body.hidden(shared.responses, caches, kept=of_responses)
    width = before.shape[-1]
    return mx.concatenate([before.reshape(-1, width), after.reshape(-1, width)])


class ModelReader:
    """Decodes by the model, and samples where the logits are."""

    ahead = True
    in_place = False

    def __init__(self, body: Body) -> None:
        """With the weights that lie on the model."""
        self._body = body

    def sample(self, states: mx.array, draws: Numbers, how: Distribution) -> Sampled:
        """See `sampled`."""
        return sampled(self._body.logits(states), mx.array(draws), how)

    def read(self, tokens: mx.array, caches: Sequence[Any]) -> tuple[mx.array, mx.array | None]:
        """Not evaluated: the caller goes on while the device works."""
        share_offsets(caches)
        states, entering = self._body.hidden_and_entering(tokens[:, None], list(caches))
        return states[:, -1], None if entering is None else entering[:, -1]

    def detach(self) -> None:
        """Nothing is held."""


def sampled(logits: mx.array, draws: mx.array, how: Distribution) -> Sampled:
    """Pick a token for each row by the inverse of its cumulative distribution.

    Args:
        logits: [B, V].
        draws: [B] uniform in [0, 1).
        how: what is drawn from; temperature 0 takes the most probable token.
    Returns:
        tokens [B] and their log-probabilities [B] under what was drawn from (all of softmax(logits) where the
        temperature is 0), NaN where a row has a NaN or positive infinity; the sets that tokens were drawn from, if
        they weren't all.
    """
    scaled = logits.astype(mx.float32) / (how.temperature if how.temperature > 0 else 1.0)
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    masses, words = mx.exp(scaled), None
    if how.truncates:
        drawn = support(scaled, how)
        masses, words = mx.where(drawn, masses, 0.0), packed(drawn)
    masses = mx.pad(masses, [(0, 0), (0, -scaled.shape[-1] % _BLOCK)]).reshape(len(scaled), -1, _BLOCK)
    by_block = masses.sum(axis=-1)
    up_to = mx.cumsum(by_block, axis=-1)
    total = up_to[:, -1:]
    picked = scaled.argmax(axis=-1)
    if how.temperature > 0:
        wanted = draws[:, None] * total
        block = _first_beyond(up_to, wanted)[:, None]
        left = wanted - mx.take_along_axis(up_to - by_block, block, axis=-1)
        inside = mx.cumsum(mx.take_along_axis(masses, block[..., None], axis=1)[:, 0], axis=-1)
        picked = block[:, 0] * _BLOCK + _first_beyond(inside, left)
    logprobs = mx.take_along_axis(scaled, picked[:, None], axis=-1)[:, 0] - mx.log(total[:, 0])
    return Sampled(picked.astype(mx.int32), logprobs, words)


def _first_beyond(sums: mx.array, wanted: mx.array) -> mx.array:
    """Of rising sums [B, N], the first above what is wanted [B, 1]; where rounding leaves none, the first largest."""
    beyond = sums > wanted
    return mx.where(beyond.any(axis=-1), beyond.argmax(axis=-1), sums.argmax(axis=-1))


def _factors(step: Step) -> tuple[float, ...]:
    """What `_adamw` multiplies by, worked out in double precision."""
    root = (1 - step.beta2**step.number) ** 0.5
    scale = step.rate * root / (1 - step.beta1**step.number)
    return step.factor, step.beta1, step.beta2, step.eps * root, scale, 1 - step.rate * step.weight_decay


@functools.cache
def _adamw() -> Callable[..., tuple[mx.array, mx.array, mx.array]]:
    """One weight's step, compiled: a kernel instead of a dozen. The numbers are arrays, so that none is baked in."""

    def step(
        weight: mx.array, gradient: mx.array, m: mx.array, v: mx.array, *numbers: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        factor, beta1, beta2, eps, scale, decay = numbers
        gradient = gradient * factor
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * mx.square(gradient)
        return weight * decay - scale * m / (mx.sqrt(v) + eps), m, v

    compiled: Callable[..., tuple[mx.array, mx.array, mx.array]] = mx.compile(step, shapeless=True)
    return compiled


@contextmanager
def _rows(part: nn.Module) -> Iterator[None]:
    """Around passes over whole rows: the operations that have a gradient, where mlx-lm has others for decoding."""
    before, mode = _in_rows.set(True), part.training
    in_gradient()
    part.train()
    try:
        yield
    finally:
        part.train(mode)
        _in_rows.reset(before)
