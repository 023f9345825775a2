"""The named arrays that pass between the stages. B responses, T response slots, S token positions, N counted tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.data.batches import pad_right


def number(scalar: mx.array) -> float:
    """A scalar array as a Python float (this evaluates it)."""
    value = scalar.item()
    assert not isinstance(value, complex)
    return float(value)


class Sequences(NamedTuple):
    """Prompts and responses as the training forward reads them: compact, right-padded, causal, no padding mask."""

    tokens: mx.array  # [B, S] int32, prompt then response, then padding
    predicting: mx.array  # [N] int32, positions in the flattened [B * S] whose state predicts a counted token
    targets: mx.array  # [N] int32, those tokens, row by row
    slots: mx.array  # [B, T] int32, index into N of each response slot, 0 where not counted
    mask: mx.array  # [B, T] bool, response tokens that count, end-of-sequence included
    last: mx.array  # [B] int32, position in the flattened [B * S] of the last token
    lengths: mx.array  # [B] int32, prompt and response tokens
    kept: mx.array | None = None  # [B, S, D], the states that enter the trunk's `split` block

    def spread(self, counted: mx.array) -> mx.array:
        """Values of the N counted tokens at their slots: [N] -> [B, T], 0 where masked."""
        return mx.where(self.mask, counted[self.slots], mx.zeros((), counted.dtype))


def make_sequences(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, slots: int | None = None
) -> Sequences:
    """Arrange token rows for the training forward; `slots` is T, by default the longest response's length.

    Raises:
        ValueError: an empty prompt (its first response token would have nothing to be predicted from).
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no tokens")
    tokens, lengths = pad_right([(*prompt, *response) for prompt, response in zip(prompts, responses, strict=True)])
    width = tokens.shape[1]
    starts = np.array([len(prompt) for prompt in prompts])
    counts = np.array([len(response) for response in responses])
    columns = np.arange(slots if slots is not None else max(1, int(counts.max())))
    mask = columns[None, :] < counts[:, None]
    rows = np.arange(len(prompts))[:, None]
    predicting = (rows * width + starts[:, None] - 1 + columns[None, :])[mask]
    index = np.where(mask, np.cumsum(mask.reshape(-1)).reshape(mask.shape) - 1, 0)
    return Sequences(
        tokens=mx.array(tokens),
        predicting=mx.array(predicting.astype(np.int32)),
        targets=mx.array(tokens.reshape(-1)[predicting + 1]),
        slots=mx.array(index.astype(np.int32)),
        mask=mx.array(mask),
        last=mx.array((rows[:, 0] * width + lengths - 1).astype(np.int32)),
        lengths=mx.array(lengths),
    )


class Rollout(NamedTuple):
    """Responses sampled from the policy."""

    prompts: tuple[tuple[int, ...], ...]  # B rows of prompt tokens
    responses: tuple[tuple[int, ...], ...]  # B rows of response tokens, end-of-sequence included where sampled
    logprobs: mx.array  # [B, T] float32, of each token when it was sampled, 0 where masked
    mask: mx.array  # [B, T] bool, response tokens that count
    finished: mx.array  # [B] bool, end-of-sequence was sampled before max_tokens ran out
    group: mx.array  # [B] int32, responses of one prompt share a number
    records: tuple[dict[str, Any], ...]  # B, each prompt's JSONL record
    kept: mx.array | None = None  # [B, P + T, D], the states that enter the trunk's `split` block; 0 where no token is

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of the prompt and of the response, of each row."""
        return [(len(p), len(r)) for p, r in zip(self.prompts, self.responses, strict=True)]

    def sequences(self, rows: Sequence[int] | None = None) -> Sequences:
        """Some rows (by default all) for the training forward, with all T slots."""
        chosen = list(range(len(self.prompts)) if rows is None else rows)
        made = make_sequences(
            [self.prompts[row] for row in chosen], [self.responses[row] for row in chosen], slots=self.mask.shape[1]
        )
        if self.kept is None:
            return made
        return made._replace(kept=self.kept[mx.array(chosen), : made.tokens.shape[1]])


class Scored(NamedTuple):
    """What is known of a rollout before the update."""

    scores: mx.array  # [B] float32, weighted sum over the sources, after penalties and clipping
    by_source: dict[str, mx.array]  # [B] float32 each, before weights
    old_logprobs: mx.array  # [B, T] float32, by the training forward of the sampling policy
    ref_logprobs: mx.array  # [B, T] float32
    entropy: mx.array  # [B, T] float32, of the policy's distribution at each token
    values: mx.array | None  # [B, T] float32, the critic's; None without one


class PPOBatch(NamedTuple):
    """What the update reads besides the rollout."""

    old_logprobs: mx.array  # [B, T] float32
    advantages: mx.array  # [B, T] float32
    old_values: mx.array | None  # [B, T] float32
    returns: mx.array | None  # [B, T] float32, the critic's targets
    full_returns: mx.array | None  # [B, T] float32, lambda = 1: what is left of the rewards
