"""Prompts into responses of the current policy, with the probability of every token as it was sampled."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.truncation import Distribution
from mlx_ppo.compute.kv_cache import FULL
from mlx_ppo.config.sections import RolloutSection
from mlx_ppo.data.random import philox
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.roles import Roles
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.runtime.phases import phase
from mlx_ppo.stages.decoding import Decoder, Request, Response
from mlx_ppo.stages.records import Rollout


class Asked(NamedTuple):
    """Prompts to answer."""

    prompts: Sequence[tuple[int, ...]]  # rows of tokens
    positions: Sequence[int]  # each prompt's number in the stream of prompts: its random draws derive from it
    records: Sequence[dict[str, Any]]  # each prompt's JSONL record, carried along


class Sampling(NamedTuple):
    """How responses are sampled."""

    seed_parts: tuple[int | str, ...]  # what the random draws derive from, beside the prompt and the sample's number
    max_tokens: int  # bound T on a response
    temperature: float = 1.0  # of the sampling distribution; 0 takes the most probable token
    samples_per_prompt: int = 1  # they share its prefill
    # Decoded together, 0: all; where some end, others take their places. Only speed and memory change by it.
    batch_size: int = 0
    # Of keys and values, see `compute.kv_cache`. With "8-bit" the sampling distribution is a slightly different one, in
    # which a batch's last digits may turn a rounding; and no states are kept for later passes, which shall be exact.
    cache_form: str = FULL
    top_k: int = 0  # the tokens that may be drawn, see `algo.truncation`; 0: no bound
    top_p: float = 1.0  # 1: no bound
    min_p: float = 0.0  # 0: no bound
    supports: bool = True  # keep what tokens were drawn from: without, log-probabilities can't be taken again

    @property
    def distribution(self) -> Distribution:
        """What tokens are drawn from, given logits."""
        return Distribution(self.temperature, self.top_k, self.top_p, self.min_p)


def distribution_of(section: RolloutSection) -> Distribution:
    """What a run draws tokens from."""
    return Distribution(section.temperature, section.top_k, section.top_p, section.min_p)


def sampling(section: RolloutSection, choices: Choices, *seed_parts: int | str) -> Sampling:
    """How a run samples, by its `[rollout]` section and what its plan has chosen."""
    return Sampling(
        seed_parts,
        section.max_tokens,
        section.temperature,
        section.samples_per_prompt,
        batch_size=choices.rollout_batch,
        cache_form=choices.kv_cache,
        top_k=section.top_k,
        top_p=section.top_p,
        min_p=section.min_p,
    )


def generate(
    trunk: Trunk, weights: Weights, asked: Asked, how: Sampling, on_tokens: Callable[[int], None] = lambda _: None
) -> Rollout:
    """Sample responses.

    Args:
        trunk: the language model.
        weights: the policy's weights on it.
        asked: the prompts.
        how: lengths, temperature, random draws, and what is in memory together.
        on_tokens: called with the number of tokens sampled at each step.
    Returns:
        B = len(asked.prompts) * how.samples_per_prompt responses, those of one prompt together.
    """
    trunk.within(max(map(len, asked.prompts), default=0) + how.max_tokens)
    requests: list[Request] = []
    for prompt, position in zip(asked.prompts, asked.positions, strict=True):
        for sample in range(how.samples_per_prompt):
            draws = philox(*how.seed_parts, position, sample).random(how.max_tokens, dtype=np.float32)
            requests.append(Request(prompt, draws))
    places = how.batch_size or len(requests)
    if places > 1 and not trunk.capabilities.batches:
        places = 1
    decoder = Decoder(
        trunk,
        requests,
        places=places,
        max_tokens=how.max_tokens,
        distribution=how.distribution,
        cache_form=how.cache_form,
    )
    if not how.supports:
        decoder.supports = None
    with trunk.using(weights):
        while decoder.unfinished:
            with phase("rollout"):
                decoder.refill()
                decoder.decode(on_tokens)
    count = len(requests)
    responses = [decoder.response(row) for row in range(count)]
    prompts = [request.prompt for request in requests]
    rollout = _joined(prompts, responses, how, asked.records, decoder.kept.array(count))
    if decoder.supports is None:
        return rollout
    return rollout._replace(support=decoder.supports.array([length for _, length in rollout.lengths]))


def generate_together(
    roles: Roles, weights: Weights, asked: Asked, how: Sampling, on_tokens: Callable[[int], None] = lambda _: None
) -> Rollout:
    """As `generate` on the shared trunk, by each process for its part of the prompts; all get all responses."""
    group, samples = roles.group, how.samples_per_prompt
    if group.size == 1:
        return generate(roles.trunk, weights, asked, how, on_tokens)
    own = group.part(len(asked.prompts))
    at = slice(own.start, own.stop)
    mine = Asked(asked.prompts[at], asked.positions[at], asked.records[at])
    rollout = generate(roles.trunk, weights, mine, how, on_tokens) if own else None
    given: list[np.ndarray[Any, Any]] = []
    if rollout is not None:
        logprobs, lengths = np.array(rollout.logprobs), [length for _, length in rollout.lengths]
        given = [
            np.array(lengths, np.int32),
            np.array([token for response in rollout.responses for token in response], np.int32),
            np.concatenate([row[:length] for row, length in zip(logprobs, lengths, strict=True)]),
            np.array(rollout.finished),
        ]
        given += [
            np.array([] if states is None else [*states.shape[1:]], np.int32)
            for states in (rollout.kept, rollout.support)
        ]
    gathered = group.gather(given)
    parts = [part for part in gathered if part]
    responses = [
        Response(tuple(tokens[end - length : end].tolist()), tuple(logprobs[end - length : end].tolist()), bool(done))
        for lengths, tokens, logprobs, finished, *_ in parts
        for length, end, done in zip(lengths.tolist(), np.cumsum(lengths).tolist(), finished, strict=True)
    ]
    shapes, words = ([part[at].tolist() for part in parts if len(part[at])] for at in (4, 5))
    kept = support = None
    if shapes:
        width = max(width for width, _ in shapes)
        own_kept = rollout.kept if rollout is not None else None
        if own_kept is None:
            own_kept = mx.zeros((0, width, shapes[0][1]), roles.trunk.dtype)
        counts = [samples * len(group.part(len(asked.prompts), rank=rank)) for rank in range(group.size)]
        kept = group.rows(mx.pad(own_kept, [(0, 0), (0, width - own_kept.shape[1]), (0, 0)]), counts)
    if words:
        own_support = rollout.support if rollout is not None else None
        if own_support is None:
            own_support = mx.zeros((0, words[0][0]), mx.uint32)
        support = group.rows(own_support, [int(part[0].sum()) if part else 0 for part in gathered])
    prompts = [prompt for prompt in asked.prompts for _ in range(samples)]
    return _joined(prompts, responses, how, asked.records, kept)._replace(support=support)


def _joined(
    prompts: Sequence[tuple[int, ...]],
    responses: Sequence[Response],
    how: Sampling,
    records: Sequence[dict[str, Any]],
    kept: mx.array | None,
) -> Rollout:
    lengths = np.array([len(response.tokens) for response in responses])
    width = max(1, int(lengths.max()))
    logprobs = np.zeros((len(prompts), width), np.float32)
    for row, response in enumerate(responses):
        logprobs[row, : len(response.logprobs)] = response.logprobs
    return Rollout(
        prompts=tuple(prompts),
        responses=tuple(response.tokens for response in responses),
        logprobs=mx.array(logprobs),
        mask=mx.array(np.arange(width)[None, :] < lengths[:, None]),
        finished=mx.array([response.finished for response in responses]),
        group=mx.array(np.repeat(np.arange(len(records), dtype=np.int32), how.samples_per_prompt)),
        records=tuple(record for record in records for _ in range(how.samples_per_prompt)),
        temperature=how.temperature,
        max_tokens=how.max_tokens,
        kept=kept,
    )
