"""Token rows as the training forward reads them. B responses, T response slots, S token positions, N counted tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.data.batches import pad_right

_WORTH_SHARING = 0.8  # of the positions of whole rows; more are not worth attention's longer way


class SharedPrompts(NamedTuple):
    """Rows of which several have one prompt: G prompts of up to P tokens, each once, and B responses of up to R."""

    prompts: mx.array  # [G, P] int32, padded on the right
    lengths: mx.array  # [G] int32, their tokens
    level: bool  # all of them have P tokens
    owners: mx.array  # [B] int32, each response's prompt
    responses: mx.array  # [B, R] int32, padded on the right
    kept: tuple[mx.array, mx.array] | None = None  # [G, P, D] and [B, R, D], as in `Sequences`


class Sequences(NamedTuple):
    """Prompts and responses as the training forward reads them: compact, right-padded, causal, no padding mask.

    Positions are in the flattened [B * S] or, where prompts are shared, in [G * P] and then [B * R].
    """

    tokens: mx.array  # [B, S] int32, prompt then response, then padding
    predicting: mx.array  # [N] int32, positions whose state predicts a counted token
    targets: mx.array  # [N] int32, those tokens, row by row
    slots: mx.array  # [B, T] int32, index into N of each response slot, 0 where not counted
    mask: mx.array  # [B, T] bool, response tokens that count, end-of-sequence included
    last: mx.array  # [B] int32, position of the last token
    lengths: mx.array  # [B] int32, prompt and response tokens
    kept: mx.array | None = None  # [B, S, D], the states that enter the trunk's `split` block
    shared: SharedPrompts | None = None
    support: mx.array | None = None  # [N, ceil(V / 32)] uint32, what each target was drawn from; None: all tokens

    def spread(self, counted: mx.array) -> mx.array:
        """Values of the N counted tokens at their slots: [N] -> [B, T], 0 where masked."""
        return mx.where(self.mask, counted[self.slots], mx.zeros((), counted.dtype))


def make_sequences(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    slots: int | None = None,
    sharing: bool = False,
) -> Sequences:
    """Arrange token rows for the training forward.

    Args:
        prompts: B rows.
        responses: B rows.
        slots: T, by default the longest response's length.
        sharing: prompts that several rows have may be read once, where that is worth it.
    Raises:
        ValueError: an empty prompt (its first response token would have nothing to be predicted from).
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no tokens")
    tokens, lengths = pad_right([(*prompt, *response) for prompt, response in zip(prompts, responses, strict=True)])
    starts = np.array([len(prompt) for prompt in prompts])
    counts = np.array([len(response) for response in responses])
    columns = np.arange(slots if slots is not None else max(1, int(counts.max())))
    mask = columns[None, :] < counts[:, None]
    rows = np.arange(len(prompts))[:, None]
    shared = _shared(prompts, responses, tokens.size) if sharing else None
    if shared is None:
        first = rows * tokens.shape[1] + starts[:, None]  # of the responses
        before = first - 1
    else:
        (many, wide), owners = shared.prompts.shape, np.asarray(shared.owners)[:, None]
        first = many * wide + rows * shared.responses.shape[1]
        before = owners * wide + starts[:, None] - 1
    predicting = np.where(columns == 0, before, first - 1 + columns)[mask]
    index = np.where(mask, np.cumsum(mask.reshape(-1)).reshape(mask.shape) - 1, 0)
    return Sequences(
        tokens=mx.array(tokens),
        predicting=mx.array(predicting.astype(np.int32)),
        targets=mx.array(tokens.reshape(-1)[(rows * tokens.shape[1] + starts[:, None] + columns)[mask]]),
        slots=mx.array(index.astype(np.int32)),
        mask=mx.array(mask),
        last=mx.array(np.where(counts, first[:, 0] + counts - 1, before[:, 0]).astype(np.int32)),
        lengths=mx.array(lengths),
        shared=shared,
    )


def _shared(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], whole: int) -> SharedPrompts | None:
    """Every distinct prompt once; None where that leaves nearly as many positions as the `whole` rows have."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    if len(places) == len(prompts):
        return None
    read, lengths = pad_right(list(places))
    answers, _ = pad_right(responses)
    if not answers.size or read.size + answers.size > _WORTH_SHARING * whole:
        return None
    owners = np.array([places[tuple(prompt)] for prompt in prompts], np.int32)
    level = bool((lengths == read.shape[1]).all())
    return SharedPrompts(mx.array(read), mx.array(lengths), level, mx.array(owners), mx.array(answers))
