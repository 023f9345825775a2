"""The trunk: one mlx-lm model whose weights never change, on which roles lay their own weights for a while."""

import functools
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_ppo.compute.adapted import Among, make_adaptable, make_noisy, parameters_of, plain
from mlx_ppo.compute.engine import Capabilities, Engine
from mlx_ppo.compute.probes import starts_from_kept
from mlx_ppo.compute.sequences import Sequences
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import HEAD, Weights, lowest_block
from mlx_ppo.models.parts import Context, Entered, InPlace, NotReached, States, placeholder

_INNER_NAMES = ("model", "backbone", "transformer")


class Trunk:
    """A frozen language model: hidden states, logits from them, and scoped weights of a role.

    Where every role's weights lie in the upper blocks, what comes out of the blocks below is the same for all of them
    and in every epoch. `split` is then the lowest block that a role changes (see `share_below`), and the states that
    enter it can be kept and given to `hidden`, which starts from them.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, name: str, engine: Engine, *, checked: bool = True
    ) -> None:
        """Prepare a loaded model.

        Args:
            model: of mlx-lm; its linear layers are replaced by ones to which adapters can be attached.
            tokenizer: its own.
            name: its folder, for messages.
            engine: computes with it.
            checked: compute a little to see that the architecture is supported; False where weights aren't there.
        Raises:
            ModelError: the architecture isn't supported.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.engine = engine
        self.context: Context | None = None  # None: unknown
        self.reload: Callable[[], Mapping[str, mx.array]] | None = None  # reads the frozen weights again
        self.present = True  # the frozen weights are in memory
        self._owner, self._inner_name = _find_inner(model, name)
        first = model.layers[0]  # `model.layers` itself may be a copy
        inner = self._owner[self._inner_name]
        lists = [part for part in inner.values() if isinstance(part, list) and part and part[0] is first]
        self._layers: list[Any] = lists[0] if lists else []
        self.adapted, left_out = make_adaptable(model)
        self.base = parameters_of(model)
        self._noisy = make_noisy(self.inner, self.adapted)
        self._in_use = False
        self.replaced: Mapping[str, mx.array] = {}  # what a role that trains all weights has put on the model just now
        self.positions = 0  # positions whose logits are computed together; 0: as many as `output_head` thinks fit
        self.split = 0  # states that enter this block may be kept; 0: none
        self._checked = checked
        self._saving = False  # a gradient that is taken is to keep little
        model.eval()
        if checked:
            self._check_split()
        self.capabilities: Capabilities = engine.capabilities(self, checked=checked)
        self.remarks = [*filter(None, [left_out]), *self.capabilities.remarks]  # what a person should know, a line each
        self.width = self._find_width()  # the size D of a hidden state

    @property
    def dtype(self) -> mx.Dtype:
        """Of its states."""
        return next(array.dtype for array in self.base.values() if mx.issubdtype(array.dtype, mx.floating))

    def shares_learning(self, *, saving: bool) -> bool:
        """Whether a pass with a gradient may share prompts; `saving`: with gradient checkpointing."""
        return self.engine.shares_learning(self, saving=saving)

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return self.tokenizer.vocab_size

    @property
    def is_noisy(self) -> bool:
        """Whether dropout acts just now."""
        return any(layer.noise for layer in self._noisy)

    @property
    def inner(self) -> nn.Module:
        """The part of the model that gives hidden states."""
        part: nn.Module = self._owner[self._inner_name]
        return part

    @property
    def output_layer(self) -> nn.Module | None:
        """The layer that makes logits of states, where it isn't the embedding's transpose."""
        layer: nn.Module | None = self._owner.get("lm_head")
        return layer

    def within(self, tokens: int) -> list[str]:
        """What a person should know of texts of so many tokens.

        Raises:
            ModelError: the model has no such positions.
        """
        if self.context is None or tokens <= self.context.tokens:
            return []
        said = f"{self.name}: texts may take {tokens} tokens, and the model "
        if self.context.learned:
            raise ModelError(f"{said}has {self.context.tokens} positions; lower the prompts' bound or max_tokens")
        return [f"warning: {said}was trained on at most {self.context.tokens} (max_position_embeddings)"]

    def evict(self) -> None:
        """Free the frozen weights until `restore`; meanwhile only a role that brings all weights itself can use this.

        Where there is nothing to read them from again, they stay evicted.
        """
        if self.present:
            self._hold({name: placeholder(array) for name, array in self.base.items()})
            gc.collect()
            mx.clear_cache()
        self.present = False

    def restore(self) -> None:
        """Bring the frozen weights back.

        Raises:
            ModelError: the folder can't be read any more, or has changed.
        """
        if not self.present and self.reload is not None:
            self._hold(self.reload())
            self.present = True

    def _hold(self, arrays: Mapping[str, mx.array]) -> None:
        mx.eval(dict(arrays))
        self.base = dict(arrays)
        self._put(arrays)

    @property
    def blocks(self) -> int:
        """The number of transformer blocks."""
        return len(self.model.layers)

    def share_below(self, roles: Iterable[Weights]) -> None:
        """Set `split` to the lowest block that any of these roles changes, if this architecture can start there."""
        lowest = [lowest_block(weights) for weights in roles]
        self.split = min((block for block in lowest if block is not None), default=0)
        if self._checked and self.split and not (self._layers and starts_from_kept(self)):
            self.split = 0

    def hidden(self, tokens: mx.array, cache: list[Any] | None = None, *, kept: mx.array | None = None) -> mx.array:
        """Final hidden states [B, S, D] of tokens [B, S], the final norm included.

        Args:
            tokens: token numbers.
            cache: the architecture's KV caches, which are extended.
            kept: the states [B, S, D] that enter block `split`, from an earlier pass over the same tokens: the blocks
                below are left out. Not read where `split` is 0.
        """
        inner = self.inner
        below = {} if kept is None else {block: functools.partial(_given, kept) for block in range(self.split)}
        with self._instead(below), self.engine.computing():
            states: mx.array = inner(tokens) if cache is None else inner(tokens, cache=cache)
        return states

    def hidden_and_entering(self, tokens: mx.array, cache: list[Any]) -> tuple[mx.array, mx.array | None]:
        """Final hidden states [B, S, D], and the states [B, S, D] that enter block `split` (None where it is 0)."""
        if not self.split:
            return self.hidden(tokens, cache), None
        entering: list[mx.array] = []
        block = self._layers[self.split]

        def note(states: mx.array, *given: Any, **named: Any) -> mx.array:
            entering.append(states)
            after: mx.array = block(states, *given, **named)
            return after

        with self._instead({self.split: note}):
            return self.hidden(tokens, cache), entering[0]

    def entering(self, tokens: mx.array) -> mx.array:
        """The states [B, S, D] that enter block `split`; no block from there on is computed."""

        def stop(states: mx.array, *_: Any, **__: Any) -> mx.array:
            raise Entered(states)

        try:
            with self._instead({self.split: stop}):
                self.hidden(tokens)
        except Entered as reached:
            return reached.states
        raise NotReached("the split block was not reached")

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [..., V] of hidden states [..., D], by whatever the architecture does after its inner part."""
        inner = self.inner
        states = hidden if hidden.ndim == 3 else hidden[None]
        dict.__setitem__(self._owner, self._inner_name, States(inner, states))
        try:
            logits: mx.array = self._owner(mx.zeros(states.shape[:2], mx.int32))
        finally:
            dict.__setitem__(self._owner, self._inner_name, inner)
        return logits if hidden.ndim == 3 else logits.squeeze(0)  # an index would copy

    def states(self, sequences: Sequences, *, read: mx.array | None = None, learning: bool = False) -> mx.array:
        """Hidden states [n, D] of all positions, in the order that `Sequences` tells.

        `read`: positions; the others' may be 0. `learning`: a gradient will be taken; there may be none without.
        """
        return self.engine.states(self, sequences, read, learning=learning, saving=self._saving)

    def response_states(self, sequences: Sequences, *, learning: bool = False) -> mx.array:
        """Hidden states [N, D] from which each of the N counted response tokens is predicted; see `states`."""
        return self.states(sequences, read=sequences.predicting, learning=learning)[sequences.predicting]

    @contextmanager
    def using(self, weights: Weights) -> Iterator[None]:
        """Lay a role's weights on the trunk for the length of a `with` block; nothing stays behind.

        Raises:
            RuntimeError: another role's weights are on the trunk, or these would change what is kept.
        """
        if self._in_use:
            raise RuntimeError("another role's weights are on the trunk; roles don't nest")
        lowest = lowest_block(weights)
        if lowest is not None and lowest < self.split:
            raise RuntimeError(f"weights in block {lowest}, but the states that enter block {self.split} are kept")
        replaced: dict[str, mx.array] = {}
        attached: list[nn.Module] = []
        self._in_use = True
        try:
            for name, array in weights.arrays.items():
                if name.endswith(".lora_a"):
                    layer = self.adapted[name.removesuffix(".lora_a")]
                    other = weights.arrays[name.removesuffix("a") + "b"]
                    object.__setattr__(layer, "attached", (array, other, weights.scale))
                    attached.append(layer)
                elif not name.endswith(".lora_b") and not name.startswith(HEAD):
                    replaced[name] = array.astype(self.base[name].dtype)
            self._put(replaced)
            self.replaced = replaced
            yield
        finally:
            for layer in attached:
                plain(layer)
            self._put({name: self.base[name] for name in replaced})
            self.replaced = {}
            self._in_use = False

    @contextmanager
    def bearing(self, arrays: Mapping[str, mx.array]) -> Iterator[None]:
        """Put other arrays in place of some of the model's parameters for the length of a `with` block.

        Those of blocks that something else stands in for, as while checkpointing, stay as they are.
        """
        there = parameters_of(self.model) if arrays else {}
        before = {name: array for name, array in there.items() if name in arrays}
        try:
            self._put({name: arrays[name] for name in before})
            yield
        finally:
            self._put(before)

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Keep only what enters each block for a gradient that is taken within; costs about a third more time."""
        self._saving, numbers = True, range(self.split, self.blocks)
        try:
            with self._instead({n: self.engine.checkpointed(self, self._layers[n]) for n in numbers}):
                yield
        finally:
            self._saving = False

    @contextmanager
    def noise(self, share: float, key: mx.array, among: Among | None = None) -> Iterator[None]:
        """Dropout on embeddings and on the outputs of attention and feed-forward, within a `using` block.

        `among`: what is read is a part of a batch, and gets its part of the whole batch's noise.
        """
        keys = list(mx.random.split(key, len(self._noisy))) if share else []
        try:
            for layer, own in zip(self._noisy, keys, strict=bool(share)):
                object.__setattr__(layer, "noise", (share, own, among))
            yield
        finally:
            for layer in self._noisy:
                object.__setattr__(layer, "noise", None)

    @contextmanager
    def _instead(self, calls: Mapping[int, Callable[..., mx.array]]) -> Iterator[None]:
        """Put other functions in the place of some blocks for the length of a `with` block."""
        layers = self._layers
        blocks = {number: layers[number] for number in calls}
        try:
            for number, call in calls.items():
                layers[number] = InPlace(blocks[number], call)
            yield
        finally:
            for number, block in blocks.items():
                layers[number] = block

    def _put(self, arrays: Mapping[str, mx.array]) -> None:
        if arrays:
            self.model.update(tree_unflatten(list(arrays.items())))

    def _find_width(self) -> int:
        """That of the final norm or, where it has no such name, by a small pass."""
        norms = [name for name in self.base if name.endswith("norm.weight") and ".layers." not in name]
        if norms:
            return int(self.base[norms[-1]].shape[0])
        return int(self.hidden(mx.zeros((1, 1), mx.int32)).shape[-1])

    def _check_split(self) -> None:
        """Logits of split and whole model must agree, or the architecture isn't supported."""
        probe = mx.array([[1, 2, 3]]) % self.tokenizer.vocab_size
        whole = self.model(probe)
        split = self.logits(self.hidden(probe))
        if not mx.allclose(whole.astype(mx.float32), split.astype(mx.float32), rtol=1e-3, atol=1e-3).item():
            raise ModelError(f"{self.name}: this architecture's logits don't follow from its final hidden states")


def _given(states: mx.array, *_: Any, **__: Any) -> mx.array:
    return states


def _find_inner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner = model.get("language_model", model)
    for inner in _INNER_NAMES:
        if isinstance(owner.get(inner), nn.Module):
            return owner, inner
    raise ModelError(f"{name}: this architecture has no part that gives hidden states ({', '.join(_INNER_NAMES)})")
