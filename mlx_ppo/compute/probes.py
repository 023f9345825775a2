"""Trials of what an architecture can do, as some of mlx-lm's can't: decode several rows, read shared prompts once."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.sequences import make_sequences

if TYPE_CHECKING:
    from mlx_ppo.models.trunk import Trunk

_ROWS = ((1, 2, 3, 2), (3, 1, 2, 2, 1, 3), (2, 2, 1), (1, 3, 3, 2, 1, 1, 2, 3))


def decode_alike(trunk: "Trunk", turns: Sequence[Sequence[int]]) -> bool:
    """Whether rows of different length get the states that they get alone.

    Args:
        trunk: its own weights.
        turns: rows, by their number in a list of four, whose prompts are read together, padded on the right. Those of
            each turn join those before, which have decoded a token meanwhile.
    """
    try:
        found = _decoded(trunk, turns, lambda tokens, caches: trunk.hidden(tokens[:, None], caches)[:, -1])
    except (ValueError, AttributeError, TypeError):
        return False
    return _alike(found, _whole(trunk, turns))


def steps_alike(trunk: "Trunk") -> bool:
    """Whether `networks.steps` gives the states and the logits that the model gives."""
    from mlx_ppo.compute.cpu.common_blocks import understood
    from mlx_ppo.compute.cpu.steps import Steps

    def read(tokens: mx.array, caches: list[Any]) -> mx.array:
        return Steps(trunk, len(tokens)).read(np.array(tokens), caches)[0]

    if not understood(trunk):
        return False
    turns = [(0, 1, 2), (3,)]
    try:
        found, wanted = _decoded(trunk, turns, read), _whole(trunk, turns)
        logits = mx.array(Steps(trunk, len(wanted)).logits(wanted))
    except (ValueError, AttributeError, TypeError):
        return False
    return _alike(found, wanted, tolerance=1e-3) and _alike(logits, trunk.logits(wanted), tolerance=1e-3)


def starts_from_kept(trunk: "Trunk") -> bool:
    """Whether starting from the states that enter block `split` gives what the whole pass gives."""
    probe = mx.array([[1, 2, 3, 1]]) % trunk.tokenizer.vocab_size
    try:
        whole, started = trunk.hidden(probe), trunk.hidden(probe, kept=trunk.entering(probe))
    except (RuntimeError, ValueError, AttributeError, TypeError, KeyError):
        return False
    return _alike(started, whole, tolerance=1e-3)


def passes_alike(trunk: "Trunk") -> bool:
    """Whether `networks.passes` gives the states that the model gives, of whole rows and where prompts are shared."""
    from mlx_ppo.compute.cpu.passes import states_of

    size = trunk.tokenizer.vocab_size
    prompts = [[token % size for token in row] for row in ([1, 2, 3], [2, 1], [1, 2, 3], [2, 1])]
    responses = [[row % size, 3 % size, 1 % size] for row in range(len(prompts))]
    whole, shared = (make_sequences(prompts, responses, sharing=sharing) for sharing in (False, True))
    wanted = trunk.hidden(whole.tokens).reshape(whole.tokens.size, -1)[whole.predicting]
    try:
        found = [
            states_of(trunk, one, one.predicting, learning=False, saving=False)[one.predicting]
            for one in (whole, shared)
        ]
        return all(_alike(states, wanted, tolerance=1e-3) for states in found)
    except (ValueError, AttributeError, TypeError):
        return False


def _whole(trunk: "Trunk", turns: Sequence[Sequence[int]]) -> mx.array:
    """States [N, D] after the last tokens of rows that are read alone."""
    return mx.stack([trunk.hidden(_row(trunk, row)[None])[0, -1] for turn in turns for row in turn])


def _row(trunk: "Trunk", number: int) -> mx.array:
    return mx.array(_ROWS[number]) % trunk.tokenizer.vocab_size


def _decoded(
    trunk: "Trunk", turns: Sequence[Sequence[int]], read_tokens: Callable[[mx.array, list[Any]], mx.array]
) -> mx.array:
    """States [N, D] after the last tokens, of which as many are decoded, one by one, as there are turns to come."""
    from mlx_ppo.compute.kv_cache import FULL, join, new_caches

    caches: list[Any] = []
    live: list[int] = []
    states = mx.zeros((0,))
    for number, turn in enumerate(turns):
        left = len(turns) - number
        read = [_row(trunk, row)[:-left] for row in turn]
        longest = max(map(len, read))
        padding = [longest - len(row) for row in read]
        added = new_caches(trunk.model, FULL, len(turn))
        for layer in added:
            layer.prepare(lengths=[len(row) for row in read], right_padding=padding)
        trunk.hidden(mx.stack([mx.pad(row, (0, pad)) for row, pad in zip(read, padding, strict=True)]), added)
        for layer in added:
            layer.finalize()
        if caches:
            join(caches, added, longest + left)
        caches, live = caches or added, [*live, *turn]
        states = read_tokens(mx.stack([_row(trunk, row)[-left] for row in live]), caches)
    return states


def shares_prompts(trunk: "Trunk", *, computing: bool = True) -> bool:
    """Whether responses read on top of prompts that they share get the states that they get in whole rows.

    Never where a layer keeps something else than plain keys and values: a window, a recurrent state. `computing`: the
    weights are there to try it.
    """
    from mlx_ppo.compute.kv_cache import keeps_all_tokens

    if not keeps_all_tokens(trunk.model):
        return False
    if not computing:
        return True
    size = trunk.tokenizer.vocab_size
    prompts = [[token % size for token in row] for row in ([1, 2, 3], [2, 1], [1, 2, 3], [2, 1], [1, 2, 3])]
    responses = [[row % size, 3 % size] for row in range(len(prompts))]
    try:
        whole, shared = (make_sequences(prompts, responses, sharing=sharing) for sharing in (False, True))
        assert shared.shared is not None
        return _alike(trunk.response_states(shared), trunk.response_states(whole))
    except (ValueError, AttributeError, TypeError):
        return False


def _alike(states: mx.array, wanted: mx.array, tolerance: float = 0.05) -> bool:
    pair = states.astype(mx.float32), wanted.astype(mx.float32)
    return bool(mx.allclose(*pair, rtol=tolerance, atol=tolerance).item())
