"""One more token of every row, read on a CPU by numpy and BLAS.

While few rows are decoded, mlx's CPU backend spends much of its time beside the large products: on starting
operations, on softmax and other elementwise functions, on waiting for what numpy computes. For the most common
kind of block a step is computed here, from the same weights, adapters and KV caches, which stay mlx's.

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; Ainslie et al. 2023, arXiv:2305.13245 (grouped heads).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.cpu.activations import swiglu_into
from mlx_ppo.compute.cpu.attention import silent, softmax_in_place
from mlx_ppo.compute.cpu.common_blocks import LOWEST, Rotation, angles_of, normed, output_of, rotated, rotation_at, view
from mlx_ppo.compute.cpu.products import Floats, Run, by_matrix, integers, prepare
from mlx_ppo.compute.engine import Body

Normalise = Callable[[Floats], Floats]
_TURNS = 64  # tokens for which rotations are computed at once
MOST_ROWS = 64  # with more, one usual product by a matrix is faster than many small ones


class Steps:
    """Reads one token of each of some rows, and makes logits; with the weights that lie on the body when it is made.

    Logits are overwritten by the next. `detach` before the caches' rows are changed.
    """

    def __init__(self, body: Body, rows: int) -> None:
        """Prepare the products; no weight is copied but those of adapters.

        Args:
            body: one that `common_blocks.understood` says yes to.
            rows: at most this many, and at most `MOST_ROWS`.
        """
        assert rows <= MOST_ROWS
        self._rows = integers([0, 0])
        self._body, inner = body, body.inner
        self._embedding = view(inner.embed_tokens.weight)
        head = output_of(body)
        self._output = view(head.weight)
        self._output_bias = view(head.bias) if "bias" in head else None
        attention = body.model.layers[0].self_attn
        self._heads, self._groups, self._scale = attention.n_heads, attention.n_kv_heads, np.float32(attention.scale)
        self._states = np.empty((rows, self._embedding.shape[1]), np.float32)
        self._mixed = np.empty((rows, attention.o_proj.weight.shape[1]), np.float32)
        self._gated = np.empty((rows, body.model.layers[0].mlp.down_proj.weight.shape[1]), np.float32)
        self._ropes: dict[tuple[Any, ...], Any] = {}
        self._known, self._turns = range(0), dict[tuple[Any, ...], Rotation]()
        self._blocks = [self._block(block) for block in body.model.layers]
        self._norm = _norm(inner.norm)
        self._attached: list[_Attached] = []
        self._logits: tuple[Floats, Run] | None = None

    @silent
    def read(self, tokens: np.ndarray[Any, Any], caches: Sequence[Any]) -> tuple[mx.array, mx.array | None]:
        """Final hidden states [B, D] of tokens [B], which the caches then hold too.

        Args:
            tokens: integers.
            caches: `BatchKVCache`s with room for one more token of each of the B rows.
        Returns:
            with the states, those that enter block `split` of the body (None where it is 0).
        """
        count, at = len(tokens), caches[0]._idx
        if not self._attached:
            self._attach(caches)
        self._rows[:] = [count, count]
        offsets, padding = caches[0].offset, np.asarray(caches[0].left_padding)
        rotation = self._rotations(np.asarray(offsets))
        counts = np.arange(at + 1)[None, :] >= padding[:, None]
        mask = None if counts.all() else np.where(counts, np.float32(0), LOWEST)[:, None]
        states, entering = self._embedding[tokens], None
        for number, (block, attached) in enumerate(zip(self._blocks, self._attached, strict=True)):
            if number and number == self._body.split:
                entering = mx.array(states)
            self._states[:count] = block.into_attention(states)
            self._attend(block, attached, at, mask, rotation[block.rotation])
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

    def _rotations(self, offsets: np.ndarray[Any, Any]) -> dict[tuple[Any, ...], Rotation]:
        """What turns queries and keys at the rows' offsets, by kind; computed for many tokens to come at once."""
        least, most = int(offsets.min()), int(offsets.max())
        if not self._known.start <= least <= most < self._known.stop:
            self._known = range(least, most + _TURNS)
            at, size = mx.arange(least, most + _TURNS), self._mixed.shape[1] // self._heads
            self._turns = {kind: rotation_at(rope, at, size) for kind, rope in self._ropes.items()}
        rows = offsets - self._known.start
        return {kind: (factors[rows], exchanged[rows]) for kind, (factors, exchanged) in self._turns.items()}

    def _block(self, block: Any) -> "_Block":
        attention, mlp = block.self_attn, block.mlp
        kind = angles_of(attention.rope)
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
            rotation=kind,
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
        each = np.arange(rows * groups)
        of_asked, of_weights, of_mixed = (
            (array, each * (self._heads // groups * step), step)
            for array, step in ((asked, size), (weights, room), (self._mixed, size))
        )
        for cache in caches:
            keys, values = np.asarray(cache.keys), np.asarray(cache.values)
            if not keys.shape == values.shape == shape or not keys.flags.c_contiguous or not values.flags.c_contiguous:
                raise ValueError("the layers' caches differ")
            starts = each * (room * size)
            score = prepare((together, length, width), of_asked, (keys, starts, size), of_weights, transposed=True)
            mix = prepare((together, width, length), of_weights, (values, starts, size), of_mixed, transposed=False)
            self._attached.append(_Attached(keys, values, asked, weights, length, score, mix))

    def _attend(self, block: "_Block", attached: "_Attached", at: int, mask: Floats | None, rotation: Rotation) -> None:
        """Queries, keys and values of `_states` into `_mixed`, the sum of values by weight."""
        count, _, size = attached.asked.shape
        q = block.q(count).reshape(count, self._heads, size)
        k = block.k(count).reshape(count, self._groups, size)
        q, k = (block.q_norm(q) if block.q_norm else q), (block.k_norm(k) if block.k_norm else k)
        attached.keys[:, :, at] = rotated(k, rotation)
        attached.values[:, :, at] = block.v(count).reshape(count, self._groups, size)
        np.multiply(rotated(q, rotation), self._scale, out=attached.asked)
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
        matrix = view(layer.weight)
        self._out = np.empty((len(given), len(matrix)), np.float32)
        self._bias = view(layer.bias) if "bias" in layer else None
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

    into_attention: Normalise
    q: _Linear
    k: _Linear
    v: _Linear
    q_norm: Normalise | None
    k_norm: Normalise | None
    rotation: tuple[Any, ...]
    out: _Linear
    into_mlp: Normalise
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


def _norm(layer: Any) -> Normalise:
    weight, eps = np.asarray(layer.weight), np.float32(layer.eps)
    return lambda states: normed(states, weight, eps)
