"""The named arrays that pass between the stages. B responses, T response slots, S token positions, N counted tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.sequences import Sequences, make_sequences


def number(scalar: mx.array) -> float:
    """A scalar array as a Python float (this evaluates it)."""
    value = scalar.item()
    assert not isinstance(value, complex)
    return float(value)


class Rollout(NamedTuple):
    """Responses sampled from the policy."""

    prompts: tuple[tuple[int, ...], ...]  # B rows of prompt tokens
    responses: tuple[tuple[int, ...], ...]  # B rows of response tokens, end-of-sequence included where sampled
    logprobs: mx.array  # [B, T] float32, of each token when it was sampled, 0 where masked
    mask: mx.array  # [B, T] bool, response tokens that count
    finished: mx.array  # [B] bool, end-of-sequence was sampled before max_tokens ran out
    group: mx.array  # [B] int32, responses of one prompt share a number
    records: tuple[dict[str, Any], ...]  # B, each prompt's JSONL record
    temperature: float  # of the sampling distribution
    max_tokens: int  # bound on a response
    kept: mx.array | None = None  # [B, P + T, D], the states that enter the trunk's `split` block; 0 where no token is
    support: mx.array | None = (
        None  # [N, ceil(V / 32)] uint32, what each counted token was drawn from; None: all tokens
    )

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of the prompt and of the response, of each row."""
        return [(len(p), len(r)) for p, r in zip(self.prompts, self.responses, strict=True)]

    def sequences(self, rows: Sequence[int] | None = None, *, sharing: bool = False) -> Sequences:
        """Some rows (by default all) for the training forward, with all T slots; see `make_sequences`."""
        chosen = list(range(len(self.prompts)) if rows is None else rows)
        made = make_sequences(
            [self.prompts[row] for row in chosen],
            [self.responses[row] for row in chosen],
            slots=self.mask.shape[1],
            sharing=sharing,
        )
        if self.support is not None:
            counts = np.array([len(response) for response in self.responses])
            starts = np.cumsum(counts) - counts
            places = [np.arange(starts[row], starts[row] + counts[row], dtype=np.int32) for row in chosen]
            made = made._replace(support=self.support[mx.array(np.concatenate(places))])
        if self.kept is None:
            return made
        if made.shared is None:
            return made._replace(kept=self.kept[mx.array(chosen), : made.tokens.shape[1]])
        shared, index = made.shared, np.array(chosen)
        owners, (_, count) = np.asarray(shared.owners), shared.responses.shape
        starts = np.asarray(shared.lengths)[owners, None]
        columns = np.minimum(starts + np.arange(count)[None, :], self.kept.shape[1] - 1)
        firsts = index[np.unique(owners, return_index=True)[1]]
        kept = (
            self.kept[mx.array(firsts), : shared.prompts.shape[1]],
            self.kept[mx.array(index[:, None]), mx.array(columns)],
        )
        return made._replace(shared=shared._replace(kept=kept))


class Scored(NamedTuple):
    """What is known of a rollout before the update."""

    scores: mx.array  # [B] float32, weighted sum over the sources, after penalties and clipping
    by_source: dict[str, mx.array]  # [B] float32 each, before weights
    old_logprobs: mx.array  # [B, T] float32, by the training forward of the sampling policy
    ref_logprobs: mx.array  # [B, T] float32
    entropy: mx.array  # [B, T] float32, of the policy's distribution at each token
    values: mx.array | None  # [B, T] float32, the critic's; None without one
    points: Mapping[str, mx.array] = MappingProxyType({})  # [B] float32 each: predicted ratings, by source
    disagreement: Mapping[str, mx.array] = MappingProxyType({})  # [B] float32 each: deviation of an ensemble's members


class PPOBatch(NamedTuple):
    """What the update reads besides the rollout."""

    old_logprobs: mx.array  # [B, T] float32
    advantages: mx.array  # [B, T] float32
    old_values: mx.array | None  # [B, T] float32
    returns: mx.array | None  # [B, T] float32, the critic's targets
    full_returns: mx.array | None  # [B, T] float32, lambda = 1: what is left of the rewards


@dataclass
class UpdateStats:
    """What was seen during the update; every list has one number a minibatch unless said otherwise."""

    policy_loss: list[float] = field(default_factory=list)
    value_loss: list[float] = field(default_factory=list)
    clip_low: list[float] = field(default_factory=list)
    clip_high: list[float] = field(default_factory=list)
    kl_to_old: list[float] = field(default_factory=list)  # k3, nats a token
    effective_samples: list[float] = field(default_factory=list)
    policy_norm: list[float] = field(default_factory=list)
    critic_norm: list[float] = field(default_factory=list)
    first_ratio_error: float = 0.0  # largest |ratio - 1| in the first minibatch
    stopped_early: bool = False  # stop_at_kl ended the passes
