"""Trials of what an architecture can do, as some of mlx-lm's can't: decode several rows, read shared prompts once."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_ppo.compute.engine import Body
from mlx_ppo.compute.kv_cache import FULL, join, keeps_all_tokens, new_caches
from mlx_ppo.compute.needs import tracing
from mlx_ppo.compute.sequences import Sequences, make_sequences

REFUSALS = (ValueError, AttributeError, TypeError)  # of an architecture that can't do what is tried
_ALIKE = {mx.float32: 0.02, mx.bfloat16: 0.2, mx.float16: 0.1}
_ROWS = ((1, 2, 3, 2), (3, 1, 2, 2, 1, 3), (2, 2, 1), (1, 3, 3, 2, 1, 1, 2, 3))  # see `_token`
_TOKENS = 6


def reads_batches(body: Body) -> bool:
    """Whether rows of different length, decoded together, get the states that they get alone.

    Some architectures of mlx-lm broadcast a batch's padding mask along the wrong axis; some of those raise, others
    are silently wrong.
    """
    return _decodes_alike(body, [(0, 1)]) and _decodes_alike(body, [(0, 1, 2)])


def takes_batches(body: Body) -> bool:
    """Whether an architecture takes several padded rows at all, by shapes alone, where the weights aren't there."""
    try:
        for rows in (3, 5):  # some refuse unless there are as many rows as groups of heads
            caches = new_caches(body.model, FULL, rows)
            with tracing():
                body.hidden(mx.zeros((rows, 2), mx.int32), caches)
    except REFUSALS:
        return False
    return True


def joins(body: Body) -> bool:
    """Whether the same holds for rows that join others which are being decoded."""
    return _decodes_alike(body, [(0, 1), (2, 3)])


def _decodes_alike(body: Body, turns: Sequence[Sequence[int]]) -> bool:
    """The same of rows, by their number in a list of four, whose prompts are read together, padded on the right.

    Those of each turn join those before, which have decoded a token meanwhile.
    """
    try:
        found = decoded(body, turns, lambda tokens, caches: body.hidden(tokens[:, None], caches)[:, -1])
    except REFUSALS:
        return False
    return alike(found, whole(body, turns))


def starts_from_kept(body: Body) -> bool:
    """Whether starting from the states that enter block `split` gives what the whole pass gives."""
    probe = mx.array([[_token(body, number) for number in (1, 2, 3, 1)]])
    try:
        wanted, started = body.hidden(probe), body.hidden(probe, kept=body.entering(probe))
    except (*REFUSALS, KeyError):
        return False
    return alike(started, wanted)


def whole(body: Body, turns: Sequence[Sequence[int]]) -> mx.array:
    """States [N, D] after the last tokens of rows that are read alone."""
    return mx.stack([body.hidden(_row(body, row)[None])[0, -1] for turn in turns for row in turn])


def _row(body: Body, number: int) -> mx.array:
    return mx.array([_token(body, token) for token in _ROWS[number]])


def _token(body: Body, number: int) -> int:
    """One of a few tokens from all over the vocabulary.

    Its first ones are special in most models, and rows of them nothing that a model was trained on: on SmolLM2's,
    bfloat16's rounding alone changes a state by 1.7, on others by 0.03 at most.
    """
    return number * body.vocab_size // _TOKENS


def decoded(
    body: Body, turns: Sequence[Sequence[int]], read_tokens: Callable[[mx.array, list[Any]], mx.array]
) -> mx.array:
    """States [N, D] after the last tokens, of which as many are decoded, one by one, as there are turns to come."""
    caches: list[Any] = []
    live: list[int] = []
    states = mx.zeros((0,))
    for number, turn in enumerate(turns):
        left = len(turns) - number
        read = [_row(body, row)[:-left] for row in turn]
        longest = max(map(len, read))
        padding = [longest - len(row) for row in read]
        added = new_caches(body.model, FULL, len(turn))
        for layer in added:
            layer.prepare(lengths=[len(row) for row in read], right_padding=padding)
        body.hidden(mx.stack([mx.pad(row, (0, pad)) for row, pad in zip(read, padding, strict=True)]), added)
        for layer in added:
            layer.finalize()
        if caches:
            join(caches, added, longest + left)
        caches, live = caches or added, [*live, *turn]
        states = read_tokens(mx.stack([_row(body, row)[-left] for row in live]), caches)
    return states


def shares_prompts(body: Body, read: Callable[[Sequences], mx.array] | None) -> bool:
    """Whether responses read on top of prompts that they share get the states that they get in whole rows.

    Never where a layer keeps something else than plain keys and values: a window, a recurrent state. `read`: gives the
    states of all positions; None: the weights aren't there to try it.
    """
    if not keeps_all_tokens(body.model):
        return False
    if read is None:
        return True
    prompts, responses = short_rows(body)
    try:
        rows, shared = (make_sequences(prompts, responses, sharing=sharing) for sharing in (False, True))
        assert shared.shared is not None
        return alike(read(shared)[shared.predicting], read(rows)[rows.predicting])
    except REFUSALS:
        return False


def short_rows(body: Body) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, some of them the same, and responses."""
    prompts = [[_token(body, token) for token in row] for row in ([1, 2, 3], [2, 1], [1, 2, 3], [2, 1], [1, 2, 3])]
    return prompts, [[_token(body, row + 1), _token(body, 3)] for row in range(len(prompts))]


def alike(states: mx.array, wanted: mx.array) -> bool:
    """Whether states [..., D] are the same but for rounding: no row's relative root mean square error is too large.

    Unrelated states differ by about 1.4; bfloat16 and 4-bit products that are rounded in another order by some 0.05,
    float32 ones in TF32 by some 0.005.
    """
    return difference(states, wanted) <= _ALIKE[states.dtype]


def difference(states: mx.array, wanted: mx.array) -> float:
    """The largest relative root mean square error of a row [D]."""
    error = (states.astype(mx.float32) - wanted.astype(mx.float32)).square().mean(axis=-1)
    found: Any = mx.sqrt(error / mx.maximum(wanted.astype(mx.float32).square().mean(axis=-1), 1e-12)).max().item()
    return float(found)
