"""One more token of every row, read on a CPU by numpy and BLAS.

While few rows are decoded, mlx's CPU backend spends much of its time beside the large products: on starting
operations, on softmax and other elementwise functions, on waiting for what numpy computes. For the most common
architecture (RMS norms, rotary embeddings, grouped heads, a gated feed-forward part: Llama's and Qwen's) a step is
computed here, in float32, from the same weights, adapters and KV caches, which stay mlx's.

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; Ainslie et al. 2023, arXiv:2305.13245 (grouped heads).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ppo.networks.activations import GatedMLP, swiglu_into
from mlx_ppo.networks.adapters import AdaptedLinear
from mlx_ppo.networks.attention import softmax_in_place
from mlx_ppo.networks.device import on_cpu
from mlx_ppo.networks.kv_cache import keeps_all_tokens
from mlx_ppo.networks.rotary import factors_of
from mlx_ppo.runtime.products import Floats, Run, by_matrix, can_prepare, integers, prepare

if TYPE_CHECKING:
    from mlx_ppo.networks.trunk import Trunk

Norm = Callable[[Floats], Floats]
MOST_ROWS = 64  # with more, one usual product by a matrix is faster than many small ones
_LOWEST = np.float32(-1e30)  # added to the score of what doesn't count
_OF_BLOCK = {"self_attn", "input_layernorm", "mlp", "post_attention_layernorm"}
_OF_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "n_heads", "n_kv_heads", "scale", "rope", "offset", "reshape"}
_OF_ATTENTION |= {"scaled_dot_product_attention", "shape", "transpose", "update_and_fetch"}
_HEAD_NORMS = {"q_norm", "k_norm"}


def understood(trunk: "Trunk") -> bool:
    """Whether the architecture is of this kind, as far as its types and the names in its code tell."""
    embedding, norm, head = trunk.inner.get("embed_tokens"), trunk.inner.get("norm"), trunk.output_layer
    return (
        on_cpu()
        and can_prepare()
        and all(array.dtype == mx.float32 for array in trunk.base.values())
        and isinstance(embedding, nn.Embedding)
        and type(norm) is nn.RMSNorm
        and (head is None or type(head) is nn.Linear)
        and all(_is_common(block) for block in trunk.model.layers)
        and keeps_all_tokens(trunk.model)
    )


def _is_common(block: Any) -> bool:
    if _names(block) != _OF_BLOCK or _names(block.self_attn) - _HEAD_NORMS != _OF_ATTENTION:
        return False
    attention, mlp = block.self_attn, block.mlp
    linear = [attention[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    norms = [block.input_layernorm, block.post_attention_layernorm, *filter(None, map(attention.get, _HEAD_NORMS))]
    return (
        type(mlp) is GatedMLP
        and all(type(norm) is nn.RMSNorm for norm in norms)
        and all(type(layer) is AdaptedLinear for layer in (*linear, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    )


def _names(module: Any) -> set[str]:
    """Names of all attributes that a module's code reads."""
    code = getattr(type(module).__call__, "__code__", None)
    return set(code.co_names) if code else set()


class Steps:
    """Reads one token of each of some rows, and makes logits; with the weights that lie on the trunk when it is made.

    Logits are overwritten by the next. `detach` before the caches' rows are changed.
    """

    def __init__(self, trunk: "Trunk", rows: int) -> None:
        """Prepare the products; no weight is copied but those of adapters.

        Args:
            trunk: one that `understood` says yes to.
            rows: at most this many, and at most `MOST_ROWS`.
        """
        assert rows <= MOST_ROWS
        self._rows = integers([0, 0])
        self._trunk, inner = trunk, trunk.inner
        self._embedding = _view(inner.embed_tokens.weight)
        head = trunk.output_layer
        self._output = self._embedding if head is None else _view(head.weight)
        self._output_bias = _view(head.bias) if head is not None and "bias" in head else None
        attention = trunk.model.layers[0].self_attn
        self._heads, self._groups, self._scale = attention.n_heads, attention.n_kv_heads, np.float32(attention.scale)
        self._states = np.empty((rows, self._embedding.shape[1]), np.float32)
        self._mixed = np.empty((rows, attention.o_proj.weight.shape[1]), np.float32)
        self._gated = np.empty((rows, trunk.model.layers[0].mlp.down_proj.weight.shape[1]), np.float32)
        self._ropes: dict[tuple[Any, ...], Any] = {}
        self._blocks = [self._block(block) for block in trunk.model.layers]
        self._norm = _norm(inner.norm)
        self._attached: list[_Attached] = []
        self._logits: tuple[Floats, Run] | None = None

    @np.errstate(over="ignore", invalid="ignore")  # what isn't finite is found, and said, further on
    def read(self, tokens: np.ndarray[Any, Any], caches: Sequence[Any]) -> tuple[mx.array, mx.array | None]:
        """Final hidden states [B, D] of tokens [B], which the caches then hold too.

        Args:
            tokens: integers.
            caches: `BatchKVCache`s with room for one more token of each of the B rows.
        Returns:
            with the states, those that enter block `split` of the trunk (None where it is 0).
        """
        count, at = len(tokens), caches[0]._idx
        if not self._attached:
            self._attach(caches)
        self._rows[:] = [count, count]
        offsets, padding = caches[0].offset, np.asarray(caches[0].left_padding)
        turns = {kind: _turns(rope, offsets, self._mixed.shape[1] // self._heads) for kind, rope in self._ropes.items()}
        counts = np.arange(at + 1)[None, :] >= padding[:, None]
        mask = None if counts.all() else np.where(counts, np.float32(0), _LOWEST)[:, None]
        states, entering = self._embedding[tokens], None
        for number, (block, attached) in enumerate(zip(self._blocks, self._attached, strict=True)):
            if number and number == self._trunk.split:
                entering = mx.array(states)
            self._states[:count] = block.into_attention(states)
            self._attend(block, attached, at, mask, turns[block.turns])
            states = states + block.out(count)
            self._states[:count] = block.into_mlp(states)
            swiglu_into(block.gate(count), block.up(count), self._gated[:count])
            states += block.down(count)
        further = mx.array(np.asarray(offsets) + 1)
        for cache in caches:
            cache._idx, cache.offset = at + 1, further
        return mx.array(self._norm(states)), entering

    def logits(self, states: mx.array) -> Floats:
        """Logits [B, V] of final hidden states [B, D]."""
        if self._logits is None:
            out = np.empty((len(states), len(self._output)), np.float32)
            self._logits = out, by_matrix(self._rows, self._states, self._output, out)
        out, run = self._logits
        self._rows[:] = [len(states)] * 2
        self._states[: len(states)] = np.asarray(states)
        run()
        if self._output_bias is not None:
            out += self._output_bias
        return out

    def detach(self) -> None:
        """Let go of the caches, and of the logits."""
        self._attached, self._logits = [], None

    def _block(self, block: Any) -> "_Block":
        attention, mlp = block.self_attn, block.mlp
        kind = _kind(attention.rope)
        self._ropes[kind] = attention.rope

        def layer(layer: Any, given: Floats) -> _Linear:
            return _Linear(layer, given, self._rows)

        return _Block(
            into_attention=_norm(block.input_layernorm),
            q=layer(attention.q_proj, self._states),
            k=layer(attention.k_proj, self._states),
            v=layer(attention.v_proj, self._states),
            q_norm=_norm(attention.q_norm) if "q_norm" in attention else None,
            k_norm=_norm(attention.k_norm) if "k_norm" in attention else None,
            turns=kind,
            out=layer(attention.o_proj, self._mixed),
            into_mlp=_norm(block.post_attention_layernorm),
            gate=layer(mlp.gate_proj, self._states),
            up=layer(mlp.up_proj, self._states),
            down=layer(mlp.down_proj, self._gated),
        )

    def _attach(self, caches: Sequence[Any]) -> None:
        """Prepare attention: products of a row's group of heads with the keys and values of all tokens so far.

        Raises:
            ValueError: the caches differ in shape.
        """
        rows, groups, room, size = shape = caches[0].keys.shape
        together, length, width = integers([self._heads // groups]), integers([0]), integers([size])
        asked = np.empty((rows, self._heads, size), np.float32)
        weights = np.empty((rows, self._heads, room), np.float32)
        each = range(rows * groups)
        of_asked, of_weights, of_mixed = (
            (array, [number * self._heads // groups * step for number in each], step)
            for array, step in ((asked, size), (weights, room), (self._mixed, size))
        )
        for cache in caches:
            keys, values = np.asarray(cache.keys), np.asarray(cache.values)
            if not keys.shape == values.shape == shape or not keys.flags.c_contiguous or not values.flags.c_contiguous:
                raise ValueError("the layers' caches differ")
            starts = [number * room * size for number in each]
            score = prepare((together, length, width), of_asked, (keys, starts, size), of_weights, transposed=True)
            mix = prepare((together, width, length), of_weights, (values, starts, size), of_mixed, transposed=False)
            self._attached.append(_Attached(keys, values, asked, weights, length, score, mix))

    def _attend(
        self, block: "_Block", attached: "_Attached", at: int, mask: Floats | None, turns: tuple[Floats, Floats]
    ) -> None:
        """Queries, keys and values of `_states` into `_mixed`, the sum of values by weight."""
        count, _, size = attached.asked.shape
        q = block.q(count).reshape(count, self._heads, size)
        k = block.k(count).reshape(count, self._groups, size)
        q, k = (block.q_norm(q) if block.q_norm else q), (block.k_norm(k) if block.k_norm else k)
        attached.keys[:, :, at] = _turned(k, turns)
        attached.values[:, :, at] = block.v(count).reshape(count, self._groups, size)
        np.multiply(_turned(q, turns), self._scale, out=attached.asked)
        attached.length[0] = at + 1
        attached.score()
        weights = attached.weights[..., : at + 1]
        if mask is not None:
            weights += mask
        softmax_in_place(weights)
        attached.mix()


class _Linear:
    """A linear layer, with its bias and its adapter, of what stands in an array when it is called."""

    def __init__(self, layer: Any, given: Floats, rows: Any) -> None:
        matrix = _view(layer.weight)
        self._out = np.empty((len(given), len(matrix)), np.float32)
        self._bias = _view(layer.bias) if "bias" in layer else None
        self._runs = [by_matrix(rows, given, matrix, self._out)]
        if layer.attached is not None:
            a, b, scale = layer.attached
            down, up = np.ascontiguousarray(np.asarray(a).T), np.ascontiguousarray(np.asarray(scale * b).T)
            small = np.empty((len(given), len(down)), np.float32)
            self._runs += [by_matrix(rows, given, down, small), by_matrix(rows, small, up, self._out, add=True)]

    def __call__(self, count: int) -> Floats:
        """The first rows [count, N] of the result."""
        for run in self._runs:
            run()
        if self._bias is not None:
            self._out[:count] += self._bias
        return self._out[:count]


class _Block(NamedTuple):
    """A block's parts."""

    into_attention: Norm
    q: _Linear
    k: _Linear
    v: _Linear
    q_norm: Norm | None
    k_norm: Norm | None
    turns: tuple[Any, ...]
    out: _Linear
    into_mlp: Norm
    gate: _Linear
    up: _Linear
    down: _Linear


class _Attached(NamedTuple):
    """A block's cache, and attention to it."""

    keys: Floats  # [B, G, room, D], the cache's own
    values: Floats
    asked: Floats  # [B, H, D], queries
    weights: Floats  # [B, H, room]
    length: Any
    score: Run
    mix: Run


def _view(array: mx.array) -> Floats:
    """The memory of an array, which must be contiguous in one of the two orders."""
    found = np.asarray(array)
    return found if found.flags.c_contiguous or found.flags.f_contiguous else np.ascontiguousarray(found)


def _norm(layer: Any) -> Norm:
    weight, eps = np.asarray(layer.weight), np.float32(layer.eps)

    def normed(states: Floats) -> Floats:
        squares = np.einsum("...d,...d->...", states, states)[..., None]
        squares /= states.shape[-1]
        squares += eps
        found: Floats = states / np.sqrt(squares, out=squares)
        found *= weight
        return found

    return normed


def _kind(rope: Any) -> tuple[Any, ...]:
    """What the angles of a rotary embedding depend on."""
    facts = sorted({**vars(rope), **rope}.items())
    return type(rope), *((name, _fact(value)) for name, value in facts if name not in ("turns", "_training"))


def _fact(value: Any) -> Any:
    return np.asarray(value).tobytes() if isinstance(value, mx.array) else repr(value)


def _turns(rope: Any, offsets: mx.array, size: int) -> tuple[Floats, Floats]:
    """Factors [B, 1, D] of a vector's own elements, and of its exchanged halves, at the rows' offsets [B]."""
    factors, exchanged = factors_of(lambda one: rope(one, offset=offsets), (len(offsets), 1, 1, size))
    return np.asarray(factors)[:, 0], np.asarray(exchanged)[:, 0]


def _turned(vectors: Floats, turns: tuple[Floats, Floats]) -> Floats:
    """Rotate [B, H, D]."""
    half = vectors.shape[-1] // 2
    factors, exchanged = turns
    found: Floats = vectors * factors
    found[..., :half] += vectors[..., half:] * exchanged[..., :half]
    found[..., half:] += vectors[..., :half] * exchanged[..., half:]
    return found
