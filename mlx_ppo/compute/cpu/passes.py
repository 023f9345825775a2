"""The training forward over whole rows, and its gradient, on a CPU by numpy and BLAS.

mlx keeps every array that it evaluates while it traces a gradient, computes elementwise functions on one core and
unvectorised, and starts each operation on its own. For the kind that `compute.cpu.common_blocks` knows, the blocks are
computed here, both ways: the products by BLAS, what lies between in numpy. Of a block, a gradient keeps what enters it,
queries, keys, values, what attention gives, and the two sides of the gate; or, where memory is to be saved, only what
enters. Positions of prompts that several rows share are computed once, in the same products.

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; Zhang and Sennrich 2019, arXiv:1910.07467 (RMS norm).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.adapted import layer_of
from mlx_ppo.compute.cpu.attention import silent
from mlx_ppo.compute.cpu.block_passes import (
    BlockPass,
    Norm,
    Positions,
    Shapes,
    floats_of,
    workspace_for,
    workspace_in,
)
from mlx_ppo.compute.cpu.common_blocks import Rotation, angles_of, rotation_at, view
from mlx_ppo.compute.cpu.layout import Layout
from mlx_ppo.compute.cpu.pass_attention import scores_at_once
from mlx_ppo.compute.cpu.products import Floats
from mlx_ppo.compute.engine import Body
from mlx_ppo.compute.needs import Work, is_traced, made_outside
from mlx_ppo.compute.sequences import Sequences


def states_of(body: Body, sequences: Sequences, read: mx.array | None, *, learning: bool, saving: bool) -> mx.array:
    """Final hidden states [N, D] of all positions, with the weights that lie on the body; see `Trunk.states`.

    Args:
        body: one that reads passes.
        sequences: from kept states, or from tokens.
        read: positions, in any order; those that nobody reads are left out of the last block's feed-forward part.
        learning: a gradient will be taken.
        saving: it is to keep little; costs about a third more time.
    """
    kept = (sequences.kept if sequences.shared is None else sequences.shared.kept) if body.split else None
    layout = Layout(sequences, read)
    if not is_traced():
        layout.leave_out_padding(body.inner.norm.weight.size)
    if kept is None:
        entering: mx.array = body.inner.embed_tokens(layout.of(layout.tokens))
    else:
        parts = (kept,) if isinstance(kept, mx.array) else kept
        entering = layout.of(mx.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]))
    one = Pass(body, layout, 0 if kept is None else body.split, saving=saving)
    compute = _planned if is_traced() else computed
    return compute(one, entering, *one.learned.values(), learning=learning)


def computed(one: "Pass", entering: mx.array, *arrays: mx.array, learning: bool) -> mx.array:
    """Final states [whole, D] of those [N, D] that enter the first block; a function with a gradient if `learning`."""

    @mx.custom_function
    def function(entering: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        return one.forward(entering, arrays, keeping=learning)

    @function.vjp
    def _(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> tuple[mx.array, ...]:
        if not learning:
            raise RuntimeError("a gradient of a pass that was not to have one")
        return one.back(primals[1:], cotangents[0], outputs[1:])

    found: Sequence[mx.array] = function(entering, *arrays)  # type: ignore[assignment]
    return found[0]


class Needs(NamedTuple):
    """Bytes of a pass."""

    kept: int  # from its forward to its gradient
    forward: int  # while it goes forward, beside what is kept
    back: int  # while its gradient is computed, beside the same and what that gives
    scores: int  # of numpy, twice for the gradient


class Pass:
    """One pass of some rows through a body's blocks, and back."""

    def __init__(self, body: Body, layout: Layout, start: int, *, saving: bool) -> None:
        """Look at a body with a role's weights on it; nothing is computed.

        Args:
            body: one that reads passes.
            layout: the positions.
            start: the first block.
            saving: keep only what enters a block for the gradient.
        """
        number, part = layer_of(name := next(iter(body.adapted)))
        self._prefix = name.removesuffix(f"{number}.{part}")
        self._norm_name = self._prefix.removesuffix("layers.") + "norm.weight"
        self.learned: dict[str, mx.array] = {}  # what the role brings, but for what lies before and after
        self._scales: dict[str, float] = {}
        for name, layer in body.adapted.items():
            if layer.attached is not None:
                self.learned[f"{name}.lora_a"], self.learned[f"{name}.lora_b"], self._scales[name] = layer.attached
        for name, array in body.replaced.items():
            if name.startswith(self._prefix) or name == self._norm_name:
                self.learned[name] = array
        self._body, self._layout, self._start, self._saving = body, layout, start, saving
        self._through = bool(body.replaced)  # what enters is to have a gradient, too
        numbers = [layer_of(name)[0] for name in self.learned if name != self._norm_name]
        self._lowest = max(start, 0 if self._through else min(numbers, default=body.blocks))

    @silent
    def forward(self, entering: mx.array, arrays: Sequence[mx.array], *, keeping: bool) -> tuple[mx.array, ...]:
        """Final states [whole, D] of those [N, D] that enter; and, `keeping`, what of each block the gradient reads."""
        layout, (blocks, norm, positions) = self._layout, self._prepared(arrays)
        result, states = _copied(entering)
        kept: list[mx.array] = []
        working = [self._working(blocks[0], count, keeping=keeping) for count in (layout.size, layout.room)]
        reused = workspace_for(*working)[1]
        for number, block in enumerate(blocks, self._start):
            workspace = {**reused, "entering": states}
            if keeping and number >= self._lowest and not self._saving:
                own, of_own = workspace_for(block.kept(layout.size), block.kept(layout.room))
                kept.append(own)
                workspace = {**reused, **of_own}
                workspace["entering"][:] = states
            elif keeping and number >= self._lowest:
                kept.append(mx.array(states))
            block.forward(workspace, positions[number - self._start], states)
        if keeping:
            kept.append(mx.array(states))
        norm.forward(states, states)
        del reused, workspace, states
        return layout.spread(result), *kept

    @silent
    def back(self, arrays: Sequence[mx.array], gradient: mx.array, kept: Sequence[mx.array]) -> tuple[mx.array, ...]:
        """Gradients by what enters (0 where nobody needs them) and by arrays, for those [whole, D] by the states."""
        layout, (blocks, norm, positions) = self._layout, self._prepared(arrays)
        learned = [mx.zeros(array.shape) for array in arrays]
        result = mx.zeros((layout.size, gradient.shape[-1]))
        mx.eval(learned, result)
        by_name = dict(zip(self.learned, map(np.asarray, learned), strict=True))
        by_states = np.asarray(result)
        norm.back(np.asarray(kept[-1]), layout.taken(np.asarray(gradient)), by_states, by_name)
        working = [self._working_back(blocks[0], count) for count in (layout.size, layout.room)]
        passing = workspace_for(*working)[1]
        for number in reversed(range(self._lowest, self._body.blocks)):
            block, own, there = (
                blocks[number - self._start],
                kept[number - self._lowest],
                positions[number - self._start],
            )
            if self._saving:
                passing["entering"][:] = np.asarray(own)
                block.forward(passing, there, None)
            else:
                passing.update(workspace_in(own, block.kept(len(by_states))))
            block.back(passing, there, by_states, by_name, further=number > self._lowest or self._through)
        return result if self._through else mx.zeros(result.shape), *learned

    def needs(self, *, learning: bool) -> Needs:
        """In bytes, without looking at any weight's values."""
        blocks, count = self._blocks({}), self._layout.size
        states = count * blocks[0].o.outputs
        upper = blocks[self._lowest - self._start :]
        kept = sum(states if self._saving else floats_of(block.kept(count)) for block in upper) + states
        return Needs(
            kept=4 * kept if learning else 0,
            forward=4 * floats_of(self._working(blocks[0], count, keeping=learning)),
            back=4 * floats_of(self._working_back(blocks[0], count)),
            scores=scores_at_once(self._layout.parts, blocks[0].heads.number),
        )

    def _working(self, block: BlockPass, count: int, *, keeping: bool) -> Shapes:
        """What a forward of so many positions needs beside what the gradient reads."""
        all_kept = keeping and self._lowest == self._start and not self._saving
        return block.passing(count) if all_kept else block.reused(count)

    def _working_back(self, block: BlockPass, count: int) -> Shapes:
        """What the gradient of so many positions needs beside what it reads."""
        again = {**block.kept(count), **block.passing(count)} if self._saving else {}
        return {**again, **block.back_passing(count)}

    def _prepared(self, arrays: Sequence[mx.array]) -> tuple[list[BlockPass], Norm, list[Positions]]:
        """The blocks from the first on, the final norm, and where the positions stand for each of these blocks."""
        body, (parts, places) = self._body, self._layout.positions()
        given = dict(zip(self.learned, map(view, arrays), strict=True))
        blocks = self._blocks(given)
        all_places = mx.arange(int(places.max()) + 1)
        rotation: dict[tuple[Any, ...], Rotation] = {}
        positions = []
        for block, layer in zip(blocks, body.model.layers[self._start :], strict=True):
            rope = layer.self_attn.rope
            if (kind := angles_of(rope)) not in rotation:
                factors, exchanged = rotation_at(rope, all_places, block.heads.size)
                rotation[kind] = factors[places], exchanged[places]
            positions.append(Positions(parts, rotation[kind]))
        positions[-1] = positions[-1]._replace(read=self._layout.read_last())
        return blocks, Norm(body.inner.norm, self._norm_name, given), positions

    def _blocks(self, given: Mapping[str, Floats]) -> list[BlockPass]:
        layers = list(enumerate(self._body.model.layers))[self._start :]
        return [BlockPass(layer, f"{self._prefix}{number}", given, self._scales) for number, layer in layers]


def _copied(array: mx.array) -> tuple[mx.array, Floats]:
    """A copy, and its memory."""
    copy = mx.array(np.asarray(array))
    return copy, np.asarray(copy)


def _planned(one: Pass, entering: mx.array, *arrays: mx.array, learning: bool) -> mx.array:
    """For `computed`: new states, and what is kept for a gradient, which has an array for each given one."""
    needs = one.needs(learning=learning)
    work = Work(needs.scores, 2 * needs.scores, needs.forward, needs.back + sum(array.nbytes for array in arrays))
    if not learning:
        return made_outside(entering, entering.shape[-1], [entering, *arrays], work)
    # The sums are two arrays that there are not in truth, in place of as much of what is kept.
    read = sum((made_outside(array, 1, [array], Work(0, 0)).sum() for array in arrays), mx.zeros(()))
    given = entering + read
    found = made_outside(given, entering.shape[-1], [given, *arrays], work)
    width = (needs.kept - 2 * entering.nbytes) // (4 * len(entering))
    kept = made_outside(mx.stop_gradient(entering), width, [mx.stop_gradient(entering)], Work(0, 0))
    return found + kept @ mx.broadcast_to(read, (width, 1))
