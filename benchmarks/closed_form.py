"""A closed-form predictor of memory: the same phases as `Accountant`'s, without tracing what they compute.

An experiment, compared with the planner's simulator by `benchmarks/predictors.py`. For passes of the CPU engine's own
kernels, what these say they allocate; for what a model of mlx-lm computes, formulas in the sizes of its layers, with
attention in rows of scores (N = positions, D hidden, F feed-forward, r rank, e bytes an element, S bytes of scores).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlx_ppo.compute.cpu.passes import Layout, Pass
from mlx_ppo.compute.sequences import Sequences
from mlx_ppo.memory import starting
from mlx_ppo.memory.choices import Choices, Shapes
from mlx_ppo.memory.phases import Accountant, Cost
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.trunk import Trunk

_TOGETHER = 64_000_000  # as `compute.output_head` has it
_PIECE = 1 << 18  # as `compute.cpu.vocabulary` has it


@dataclass(frozen=True)
class Sizes:
    """What matters of an architecture."""

    blocks: int
    width: int  # D
    wide: int  # F
    gated: bool  # the feed-forward part has two arrays of F, whose product goes on
    queries: int  # Dq
    keys: int  # Dk
    heads: int  # H
    largest: int  # bytes of the largest matrix of a block as it is computed with, where that is written out; else 0


def sizes_of(trunk: Trunk) -> Sizes:
    """By the names and shapes of the weights of the first block."""
    args = trunk.model.args
    prefix = next(re.match(r"(.*?layers\.|.*?h\.)\d+\.", name) for name in trunk.adapted).group(1)  # type: ignore[union-attr]
    linear = {name: _shape(trunk, name) for name in trunk.adapted if re.match(re.escape(prefix) + r"0\.", name)}
    attention = {name: shape for name, shape in linear.items() if "attn" in name or "attention" in name}
    others = [shape for name, shape in linear.items() if name not in attention]
    last = [shape for name, shape in attention.items() if re.search(r"(o_proj|c_proj|out_proj|wo|dense)$", name)]
    queries = last[0][1] if last else trunk.width
    keys = (sum(out for out, _ in attention.values()) - sum(out for out, _ in last) - queries) // 2
    mixtures = [array.shape for name, array in trunk.base.items() if name.startswith(f"{prefix}0.") and array.ndim == 3]
    top = int(getattr(args, "num_experts_per_tok", 1) or 1)
    wide = max([max(shape) for shape in others if max(shape) != trunk.width], default=trunk.width)
    wide = max([wide, *(top * shape[1] for shape in mixtures)])
    heads = next(int(getattr(args, name)) for name in ("num_attention_heads", "n_head") if hasattr(args, name))
    gated = bool(mixtures) or sum(out == wide for out, _ in others) > 1
    compact = any("CompactLinear" in type(layer).__name__ for layer in trunk.adapted.values())
    largest = max(out * into * 4 for out, into in linear.values()) if compact else 0
    return Sizes(trunk.blocks, trunk.width, wide, gated, queries, max(0, keys), heads, largest)


def _shape(trunk: Trunk, name: str) -> tuple[int, int]:
    weight = trunk.base[f"{name}.weight"]
    out, into = weight.shape
    scales = trunk.base.get(f"{name}.scales")
    if scales is not None:
        into = into * 32 // int(trunk.adapted[name].bits)
    return out, into


class ClosedForm(Accountant):
    """Formulas in place of traces."""

    def with_shapes(self, shapes: Shapes) -> "ClosedForm":
        """The same for other shapes."""
        other = self._compact
        compact = None if other is None else lambda: other().with_shapes(shapes)
        return ClosedForm(self.config, self.roles, self.policy, self.critic, shapes, compact=compact)

    def _predict(self, key: tuple[object, ...], function: Callable[..., Any], *arrays: Any) -> Cost:
        if key not in self._seen:
            kind, positions = str(key[0]), self.roles.trunk.positions
            if kind in ("prefill", "step"):
                found = self._reading(arrays[0].shape, bool(kind == "prefill"))
            elif kind in ("policy", "critic"):
                found = self._learning(kind, int(str(key[1])), bool(key[4]), positions, str(key[3]))
            else:
                found = self._scoring(kind, int(str(key[1])), arrays[0], positions)
            self._seen[key] = found
        return self._seen[key]

    def _reading(self, shape: tuple[int, ...], prefill: bool) -> Cost:
        """Prompts, or a token of each row; the caches come on top where they are made."""
        trunk, (rows, length) = self.roles.trunk, shape
        element, count = self._dtype.size, rows * length
        sizes = sizes_of(trunk)
        logits = rows * self._vocabulary * element
        layer = self._forward_layer(trunk, self.policy, count, self._scores_of([(rows, length, length)], sizes))
        kept = count * sizes.width * element if trunk.split else 0
        cache = 2 * sizes.blocks * count * sizes.keys * element
        steps = not prefill and trunk.capabilities.rows
        passing = {"activations": (0 if steps else layer) + kept, "logits": 0 if steps else logits}
        return Cost(
            {"activations": max(passing["activations"], 0), "logits": passing["logits"]}
            if not prefill
            else {"activations": max(layer, logits) + kept, "keys and values": cache},
            0,
        )

    def _scoring(self, name: str, at: int, sequences: Sequences, positions: int) -> Cost:
        roles = self.roles
        rewards = self._rewards()
        trunk, weights = roles.trunk, self.policy
        if name == "score critic":
            assert roles.critic is not None and self.critic is not None
            trunk, weights = roles.critic.trunk, self.critic
        elif name == "score reward":
            before = 1 + (roles.critic is not None and self.critic is not None and roles.critic.kind != "head")
            model = rewards[at - before]
            trunk, weights = model.trunk, model.weights
        elif name == "score reference":
            weights = roles.reference
        heads = name in ("score policy", "score reference")
        positions_read = sequences.mask.size if name != "score reward" else len(sequences.mask)
        count, squares = _counted(sequences)
        element = self._dtype.size
        states, read = count * trunk.width * element, positions_read * trunk.width * element
        if trunk.capabilities.rows:
            needs, entering = self._pass(trunk, weights, sequences, learning=False, saving=False)
            body, outside = states + entering + needs.forward, needs.scores
        else:
            sizes = sizes_of(trunk)
            scores = self._scores_of(squares, sizes)
            body = self._forward_layer(trunk, weights, count, scores)
            outside = 0 if trunk.engine.name == "portable" else scores
        head = head_outside = 0
        if heads:
            chunk = self._chunk(positions_read, positions)
            logits = chunk * self._vocabulary * 4
            if trunk.engine.name == "cpu":
                head, head_outside = logits, 3 * min(logits, max(self._vocabulary, _PIECE) * 4)
            else:
                head = 2 * logits
        after = states + read + head + (chunk * trunk.width * element if heads else 0)
        return Cost(
            {"activations": max(body, after) - (head if after > body else 0), "logits": head if after > body else 0},
            max(outside, head_outside),
        )

    def _learning(self, role: str, rows: int, saving: bool, positions: int, kv_cache: str) -> Cost:
        choices_rows = self.shapes
        critic = self.roles.critic
        weights = self.policy if role == "policy" else self.critic
        trunk = self.roles.trunk if role == "policy" else critic.trunk  # type: ignore[union-attr]
        assert weights is not None
        element = self._dtype.size
        gradients = sum(array.nbytes for array in weights.arrays.values())
        read_count = rows * choices_rows.response
        read = read_count * trunk.width * element
        if role == "critic" and critic is not None and critic.kind == "head":
            return Cost({"activations": 2 * read, "gradients": gradients})
        sequences = self._rows_of(rows, saving, kv_cache)
        count, squares = _counted(sequences)
        states = count * trunk.width * element
        chunk = self._chunk(read_count, positions) if role == "policy" else 0
        logits = chunk * self._vocabulary * 4
        full = bool(set(weights.arrays) & set(trunk.base))
        cpu = trunk.engine.name == "cpu"
        tied = self._embedding(trunk) if full else 0
        if trunk.capabilities.rows:
            needs, entering = self._pass(trunk, weights, sequences, learning=True, saving=saving)
            there = needs.kept + states + entering
            if not full or role == "critic":
                at_head = there + 2 * read + (2 * logits + chunk * trunk.width * element if role == "policy" else 0)
            else:
                at_head = there + 2 * read + 2 * logits + 2 * tied
            back = there + needs.back + 2 * states + gradients
            pieces = 3 * min(logits, max(self._vocabulary, _PIECE) * 4) if role == "policy" else 0
            forward = there + needs.forward
            peak = max(forward, at_head, back)
            return Cost({"activations": peak - gradients, "gradients": gradients}, max(2 * needs.scores, pieces))
        sizes = sizes_of(trunk)
        scores = self._scores_of(squares, sizes)
        start = trunk.split if sequences.kept is not None or (sequences.shared and sequences.shared.kept) else 0
        learned = sizes.blocks - start
        kept = self._kept_layer(weights, count, scores, sizes, full)
        vjp = self._vjp_layer(weights, count, scores, sizes, full)
        block = (gradients - tied) // max(1, learned)
        if role == "critic":
            head = 2 * read
        elif cpu or read_count > chunk or full:
            head = 2 * logits + 2 * read + (2 * tied if cpu else tied)
        else:
            head = 3 * logits
        if saving:
            through = (learned + 1) * states
            peak = max(through + head, 2 * states + vjp + gradients, through + vjp + block + tied)
        else:
            peak = max(learned * kept + head + 2 * states, gradients + kept + vjp, learned * kept + tied + vjp - kept)
        outside = 2 * scores if cpu else 0
        pieces = logits + 3 * min(logits, max(self._vocabulary, _PIECE) * 4) if role == "policy" and cpu else 0
        return Cost({"activations": max(0, peak - gradients), "gradients": gradients}, max(outside, pieces))

    def _rows_of(self, rows: int, saving: bool, kv_cache: str) -> Sequences:
        return self._updated(rows, Choices(1, 1, rows, checkpointing=saving, kv_cache=kv_cache))

    def _embedding(self, trunk: Trunk) -> int:
        return max(array.nbytes for name, array in trunk.base.items() if array.shape[0] == self._vocabulary)

    def _pass(self, trunk: Trunk, weights: Weights, sequences: Sequences, *, learning: bool, saving: bool) -> Any:
        """What the kernels' pass needs, and bytes of what enters."""
        split = trunk.split if (sequences.shared or sequences).kept is not None else 0
        with trunk.using(weights):
            layout = Layout(sequences, sequences.predicting)
            one = Pass(trunk, layout, split, saving=saving)
            return one.needs(learning=learning), layout.size * trunk.width * 4

    def _chunk(self, count: int, positions: int) -> int:
        parts = -(-count // (positions or max(1, _TOGETHER // (4 * self._vocabulary))))
        return -(-count // max(1, parts))

    def _scores_of(self, squares: list[tuple[int, int, int]], sizes: Sizes) -> int:
        """Bytes of the scores of rows, each of so many positions that attend to so many."""
        return max(rows * sizes.heads * length * to * self._dtype.size for rows, length, to in squares)

    def _forward_layer(self, trunk: Trunk, weights: Weights, count: int, scores: int) -> int:
        """A block without a gradient."""
        sizes, element = sizes_of(trunk), self._dtype.size
        lora = any(name.endswith(".lora_a") for name in weights.arrays)
        wide = (2 + lora if sizes.gated else 2) * sizes.wide
        return max(
            count * element * (wide + 2 * sizes.width) + sizes.largest,
            scores + count * element * (2 * sizes.queries + 2 * sizes.keys + sizes.width),
            count * element * sizes.width * 3,
        )

    def _kept_layer(self, weights: Weights, count: int, scores: int, sizes: Sizes, full: bool) -> int:
        rank = _rank(weights)
        wide = 5 if sizes.gated else 3
        columns = (6 if full else 4) * sizes.width + 2 * sizes.queries + 2 * sizes.keys + wide * sizes.wide + 7 * rank
        return count * self._dtype.size * columns + scores

    def _vjp_layer(self, weights: Weights, count: int, scores: int, sizes: Sizes, full: bool) -> int:
        rank, element = _rank(weights), self._dtype.size
        wide = 7 if sizes.gated else 5
        first = wide * sizes.wide + (5 if full else 4) * sizes.width + 2 * sizes.queries + 2 * sizes.keys + 7 * rank
        second = 4 * sizes.wide + (7 if full else 6) * sizes.width + 2 * sizes.queries + sizes.keys
        return max(count * element * first + scores, 3 * scores + count * element * second)


def _rank(weights: Weights) -> int:
    return next((array.shape[1] for name, array in weights.arrays.items() if name.endswith(".lora_a")), 0)


def _counted(sequences: Sequences) -> tuple[int, list[tuple[int, int, int]]]:
    """Positions, and rows of (number, positions, attended to)."""
    shared = sequences.shared
    if shared is None:
        rows, length = sequences.tokens.shape
        return rows * length, [(rows, length, length)]
    (many, width), (rows, count) = shared.prompts.shape, shared.responses.shape
    return many * width + rows * count, [(many, width, width), (rows, count, width + count)]


@contextmanager
def installed() -> Iterator[None]:
    """Let plans be made by formulas for the length of a `with` block."""
    before = starting.Accountant
    starting.Accountant = ClosedForm  # type: ignore[misc]
    try:
        yield
    finally:
        starting.Accountant = before  # type: ignore[misc]
