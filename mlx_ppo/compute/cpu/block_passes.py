"""One block's forward over N positions, and its gradient, on a CPU by numpy and BLAS; see `compute.cpu.passes`."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.cpu.activations import by_rows, swiglu_back, swiglu_into
from mlx_ppo.compute.cpu.common_blocks import Rotation, inverse_size, normed, rotated, rotated_back, view
from mlx_ppo.compute.cpu.pass_attention import Heads, Part, Vectors, attend, attend_back
from mlx_ppo.compute.cpu.products import Floats, multiply

_CHUNK = 1024  # positions of a feed-forward part at once
Workspace = dict[str, Floats]
Shapes = dict[str, tuple[int, int]]
Places = np.ndarray[Any, np.dtype[np.int64]]


class Positions(NamedTuple):
    """Where the N positions stand."""

    parts: Sequence[Part]
    rotation: Rotation  # [N, 1, D], for their places
    read: Places | None = None  # [M], rising: those whose states are read when they leave the block; None: all


def workspace_for(shapes: Shapes, room: Shapes) -> tuple[mx.array, Workspace]:
    """Memory of mlx, with room for arrays of larger shapes, and arrays of the given ones in it."""
    memory = mx.zeros((floats_of(room), 4), mx.uint8).view(mx.float32).reshape(-1)  # bytes are set three times as fast
    mx.eval(memory)
    return memory, workspace_in(memory, shapes)


def workspace_in(memory: mx.array, shapes: Shapes) -> Workspace:
    """Arrays of some shapes in memory that was made for them."""
    flat, found, at = np.asarray(memory), {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        found[name] = flat[at : at + size].reshape(shape)
        at += size
    return found


def floats_of(shapes: Shapes) -> int:
    """How many numbers arrays of some shapes hold."""
    return sum(rows * columns for rows, columns in shapes.values())


class BlockPass:
    """A block with the weights of a role on it, and what goes on in it."""

    def __init__(self, block: Any, name: str, given: Mapping[str, Floats], scales: Mapping[str, float]) -> None:
        """Look at the weights; none is copied.

        Args:
            block: of a kind that `common_blocks.understood` knows.
            name: its own, with which the names of its parameters begin.
            given: arrays that a role brings, by name: parameters in place of the block's own, or adapters.
            scales: of the adapters, by their layers' names.
        """
        attention, mlp = block.self_attn, block.mlp

        def linear(part: str, layer: Any) -> Linear:
            return Linear(layer, f"{name}.{part}", given, scales)

        def norm(part: str, layer: Any) -> Norm:
            return Norm(layer, f"{name}.{part}.weight", given)

        self.q, self.k, self.v, self.o = (
            linear(f"self_attn.{part}", attention[part]) for part in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.gate, self.up, self.down = (
            linear(f"mlp.{part}", mlp[part]) for part in ("gate_proj", "up_proj", "down_proj")
        )
        self.before, self.between = (
            norm(part, block[part]) for part in ("input_layernorm", "post_attention_layernorm")
        )
        self.q_norm, self.k_norm = (
            norm(f"self_attn.{part}", attention[part]) if part in attention else None for part in ("q_norm", "k_norm")
        )
        size = attention.q_proj.weight.shape[0] // attention.n_heads
        self.heads = Heads(attention.n_heads, attention.n_kv_heads, size, float(attention.scale))

    def kept(self, count: int) -> Shapes:
        """What a gradient reads, of so many positions."""
        states, wide = (count, self.o.outputs), (count, self.gate.outputs)
        raw: Shapes = {"raw q": (count, self.q.outputs), "raw k": (count, self.k.outputs)} if self.q_norm else {}
        return {"entering": states, "between": states, **self._attention(count), **raw, "gate": wide, "up": wide}

    def passing(self, count: int) -> Shapes:
        """What a forward needs beside what a gradient reads."""
        return {
            "normed": (count, self.q.inputs),
            "out": (count, self.o.outputs),
            "active": (min(count, _CHUNK), self.gate.outputs),
        }

    def reused(self, count: int) -> Shapes:
        """What a forward needs without a gradient: for all blocks one after the other."""
        wide = (min(count, _CHUNK), self.gate.outputs)
        return {**self._attention(count), "gate": wide, "up": wide, **self.passing(count)}

    def back_passing(self, count: int) -> Shapes:
        """What a gradient needs beside what it reads."""
        wide = (min(count, _CHUNK), self.gate.outputs)
        by = {f"by {name}": shape for name, shape in self._attention(count).items()}
        normed, out = (count, self.q.inputs), (count, self.q.inputs)
        return {"normed": normed, "out": out, **by, "active": wide, "by active": wide, "by gate": wide, "by up": wide}

    def _attention(self, count: int) -> Shapes:
        return {
            "q": (count, self.q.outputs),
            "k": (count, self.k.outputs),
            "v": (count, self.v.outputs),
            "mixed": (count, self.o.inputs),
        }

    def forward(self, workspace: Workspace, positions: Positions, out: Floats | None) -> None:
        """From workspace["entering"] [N, D] to `out` [N, D], which may be the same; fills in the rest of the workspace.

        With None the last product, which no gradient reads, is left out. Where only M positions are read, "mixed",
        "between", "gate" and "up" hold theirs, one after the other, and the others' states are 0.
        """
        states, normed = workspace["entering"], workspace["normed"]
        between = workspace["between"] if "between" in workspace or out is None else out
        self.before.forward(states, normed)
        for layer, norm, name in ((self.q, self.q_norm, "q"), (self.k, self.k_norm, "k")):
            raw = layer.forward(normed, workspace.get(f"raw {name}", workspace[name]))
            if norm is not None:
                raw = norm.forward(self._split(raw), self._split(workspace[name]))
            _turn(rotated, self._split(raw), positions.rotation, self._split(workspace[name]))
        self.v.forward(normed, workspace["v"])
        attend(positions.parts, Vectors(workspace["q"], workspace["k"], workspace["v"]), self.heads, workspace["mixed"])
        mixed = workspace["mixed"]
        if positions.read is not None:
            mixed, states = _gathered(mixed, positions.read, mixed), _gathered(states, positions.read, between)
        count = len(states)
        normed, between = normed[:count], between[:count]
        np.add(states, self.o.forward(mixed, workspace["out"][:count]), out=between)
        self.between.forward(between, normed)
        for rows, gate, up, active in _chunks(count, *(workspace[name] for name in ("gate", "up", "active"))):
            self.gate.forward(normed[rows], gate)
            self.up.forward(normed[rows], up)
            if out is None:
                continue
            swiglu_into(gate, up, active)
            np.add(between[rows], self.down.forward(active, workspace["out"][rows]), out=out[rows])
        if out is not None and positions.read is not None:
            _spread(out, positions.read)

    def back(
        self, workspace: Workspace, positions: Positions, gradient: Floats, learned: Workspace, *, further: bool
    ) -> None:
        """Turn gradients `gradient` [N, D] by what leaves the block into those by what enters; add those by weights.

        Args:
            workspace: what was kept, and what else is needed.
            positions: of the forward.
            gradient: changed where they are.
            learned: gradients by name, to be added to.
            further: those by what enters are needed.
        """
        after = gradient if positions.read is None else _gathered(gradient, positions.read, gradient)
        count = len(after)
        between, normed, out, mixed, by_mixed = (
            workspace[name][:count] for name in ("between", "normed", "out", "mixed", "by mixed")
        )
        self.between.forward(between, normed)
        wide = ("gate", "up", "active", "by active", "by gate", "by up")
        for rows, gate, up, active, by_active, by_gate, by_up in _chunks(count, *(workspace[name] for name in wide)):
            small = self.down.back(after[rows], by_active)
            swiglu_back(gate, up, by_active, by_gate, by_up)
            swiglu_into(gate, up, active)
            self.down.learn(active, after[rows], small, learned)
            for layer, by, add in ((self.gate, by_gate, False), (self.up, by_up, True)):
                layer.learn(normed[rows], by, layer.back(by, out[rows], add=add), learned)
        self.between.back(between, out, after, learned)
        self.o.learn(mixed, after, self.o.back(after, by_mixed), learned)
        if positions.read is not None:
            _spread(gradient, positions.read)
            _spread(workspace["by mixed"], positions.read)

        by_vectors = Vectors(workspace["by q"], workspace["by k"], workspace["by v"])
        for array in by_vectors:
            array.fill(0)
        attend_back(
            positions.parts,
            Vectors(workspace["q"], workspace["k"], workspace["v"]),
            self.heads,
            workspace["by mixed"],
            by_vectors,
        )
        normed, out = workspace["normed"], workspace["out"]
        self.before.forward(workspace["entering"], normed)
        for name, norm in (("q", self.q_norm), ("k", self.k_norm)):
            split = self._split(workspace[f"by {name}"])
            _turn(rotated_back, split, positions.rotation, split)
            if norm is not None:
                given, split[:] = split.copy(), 0
                norm.back(self._split(workspace[f"raw {name}"]), given, split, learned)
        add = False
        for layer, by in ((self.q, by_vectors.q), (self.k, by_vectors.k), (self.v, by_vectors.v)):
            layer.learn(normed, by, layer.back(by, out, add=add) if further else None, learned)
            add = True
        if further:
            self.before.back(workspace["entering"], out, gradient, learned)

    def _split(self, vectors: Floats) -> Floats:
        """By heads: [N, H, D]."""
        return vectors.reshape(len(vectors), -1, self.heads.size)


class Linear:
    """A linear layer with its bias and its adapter."""

    def __init__(self, layer: Any, name: str, given: Mapping[str, Floats], scales: Mapping[str, float]) -> None:
        """Take a role's arrays where it brings some."""
        self._layer, self._name, self._given = layer, name, given
        self._a, self._b = given.get(f"{name}.lora_a"), given.get(f"{name}.lora_b")
        self._scale = scales.get(name, 1.0)
        self.outputs, self.inputs = layer.weight.shape

    @functools.cached_property
    def _weight(self) -> Floats:
        own = self._given.get(f"{self._name}.weight")
        return view(self._layer.weight) if own is None else own

    @functools.cached_property
    def _bias(self) -> Floats | None:
        own = self._given.get(f"{self._name}.bias")
        return np.asarray(self._layer.bias) if own is None and "bias" in self._layer else own

    def forward(self, x: Floats, out: Floats) -> Floats:
        """Of x [N, inputs] to `out` [N, outputs]."""
        multiply(x, self._weight.T, out)
        if self._bias is not None:
            out += self._bias
        if self._a is not None and self._b is not None:
            multiply(self._small(x, self._a), self._b, out, factor=self._scale, add=True)
        return out

    def back(self, given: Floats, by_x: Floats, *, add: bool = False) -> Floats | None:
        """Set `by_x`, or add to it; returns the gradients [N, rank] inside the adapter, if there is one."""
        multiply(given, self._weight, by_x, add=add)
        if self._a is None:
            return None
        small = self._back_small(given)
        multiply(small, self._a.T, by_x, add=True)
        return small

    def learn(self, x: Floats, given: Floats, small: Floats | None, learned: Workspace) -> None:
        """Add the gradients by weights; `small` is what `back` returned, or None."""
        if self._a is not None and self._b is not None:
            small = self._back_small(given) if small is None else small
            multiply(x.T, small, learned[f"{self._name}.lora_a"], add=True)
            inside = self._small(x, self._a)
            multiply(inside.T, given, learned[f"{self._name}.lora_b"], factor=self._scale, add=True)
        weight, bias = learned.get(f"{self._name}.weight"), learned.get(f"{self._name}.bias")
        if weight is not None:
            multiply(given.T, x, weight, add=True)
        if bias is not None:
            bias += given.sum(axis=0)

    def _small(self, x: Floats, a: Floats) -> Floats:
        return multiply(x, a, np.empty((len(x), a.shape[1]), np.float32))

    def _back_small(self, given: Floats) -> Floats:
        assert self._b is not None
        return multiply(given, self._b.T, np.empty((len(given), len(self._b)), np.float32), factor=self._scale)


class Norm:
    """A root-mean-square norm over the last axis."""

    def __init__(self, layer: Any, name: str, given: Mapping[str, Floats]) -> None:
        """Take a role's weight where it brings one."""
        self._layer, self._name, self._given, self._eps = layer, name, given, np.float32(layer.eps)

    @functools.cached_property
    def _weight(self) -> Floats:
        return np.asarray(self._layer.weight) if self._name not in self._given else self._given[self._name]

    def forward(self, states: Floats, out: Floats) -> Floats:
        """Of states [N, ..., D] to `out` of the same shape, which may be the same."""

        def some(states: Floats, out: Floats) -> None:
            out[:] = normed(states, self._weight, self._eps)

        by_rows(some, states, out)
        return out

    def back(self, states: Floats, given: Floats, by_states: Floats, learned: Workspace) -> None:
        """Add the gradients by states, for gradients by what `forward` gave, and the one by the weight."""
        by_weight = learned.get(self._name)

        def some(states: Floats, given: Floats, by_states: Floats) -> None:
            inverse = inverse_size(states, self._eps)
            sizes = states * inverse
            if by_weight is not None:
                by_weight[:] += (given * sizes).reshape(-1, len(by_weight)).sum(axis=0)
            gradient = given * self._weight
            sizes *= np.einsum("...d,...d->...", gradient, sizes)[..., None] / np.float32(states.shape[-1])
            gradient -= sizes
            gradient *= inverse
            by_states += gradient

        by_rows(some, states, given, by_states)


def _turn(function: Callable[[Floats, Rotation], Floats], vectors: Floats, rotation: Rotation, out: Floats) -> None:
    def some(vectors: Floats, factors: Floats, exchanged: Floats, out: Floats) -> None:
        out[:] = function(vectors, (factors, exchanged))

    by_rows(some, vectors, *rotation, out)


def _gathered(vectors: Floats, read: Places, into: Floats) -> Floats:
    """Move rows `read` [M], rising, of vectors [N, D] to the first of `into`, which may be the same: [M, D]."""
    for start in range(0, len(read), _CHUNK):
        some = read[start : start + _CHUNK]
        into[start : start + len(some)] = vectors[some]
    return into[: len(read)]


def _spread(vectors: Floats, read: Places) -> None:
    """The way back, in place: the first M rows of vectors [N, D] to rows `read`; the others get 0."""
    for start in reversed(range(0, len(read), _CHUNK)):
        some = read[start : start + _CHUNK]
        vectors[some] = vectors[start : start + len(some)].copy()
    vectors[np.isin(np.arange(len(vectors)), read, invert=True)] = 0


def _chunks(count: int, *arrays: Floats) -> Iterator[Any]:
    """Slices of M positions, and these rows of arrays; of arrays of fewer rows, as many as the slice has."""
    for start in range(0, count, _CHUNK):
        rows = slice(start, min(count, start + _CHUNK))
        size = rows.stop - start
        yield rows, *(array[rows] if len(array) >= count else array[:size] for array in arrays)
