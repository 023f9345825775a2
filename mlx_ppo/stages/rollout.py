"""Prompts into responses of the current policy, with the probability of every token as it was sampled."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import mlx.core as mx
import numpy as np

from mlx_ppo.config.sections import RolloutSection
from mlx_ppo.data.random import philox
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.runtime.phases import phase
from mlx_ppo.stages.decoding import Decoder, Request
from mlx_ppo.stages.records import Rollout


def generate(
    trunk: Trunk,
    weights: Weights,
    prompts: Sequence[tuple[int, ...]],
    *,
    samples_per_prompt: int,
    max_tokens: int,
    temperature: float,
    batch_size: int,
    seed_parts: tuple[int | str, ...],
    positions: Sequence[int],
    records: Sequence[dict[str, Any]],
    cache_form: str = "full",
    on_tokens: Callable[[int], None] = lambda _: None,
) -> Rollout:
    """Sample responses.

    Args:
        trunk: the language model.
        weights: the policy's weights on it.
        prompts: rows of prompt tokens.
        samples_per_prompt: responses of each; they share its prefill.
        max_tokens: bound T on a response.
        temperature: of the sampling distribution; 0 takes the most probable token.
        batch_size: sequences decoded together, 0: all; where some end, others take their places. Changes speed and
            memory only; 1 where the model needs it.
        seed_parts: what the random draws derive from, with the prompt's position and the sample's number.
        positions: each prompt's number in the stream of prompts.
        records: each prompt's JSONL record, carried along.
        cache_form: of keys and values, see `compute.kv_cache`. With "8-bit" the sampling distribution is a slightly
            different one, in which a batch's last digits may turn a rounding; and no states are kept for later passes,
            whose numbers shall be exact.
        on_tokens: called with the number of tokens sampled at each step.
    Returns:
        B = len(prompts) * samples_per_prompt responses, those of one prompt together.
    """
    requests: list[Request] = []
    for prompt, position in zip(prompts, positions, strict=True):
        for sample in range(samples_per_prompt):
            draws = philox(*seed_parts, position, sample).random(max_tokens, dtype=np.float32)
            requests.append(Request(prompt, draws))
    places = batch_size or len(requests)
    if places > 1 and not trunk.capabilities.batches:
        places = 1
    decoder = Decoder(
        trunk, requests, places=places, max_tokens=max_tokens, temperature=temperature, cache_form=cache_form
    )
    with trunk.using(weights):
        while decoder.unfinished:
            with phase("rollout"):
                decoder.refill()
                decoder.decode(on_tokens)
    return _joined(decoder, samples_per_prompt, records)


class Sampling(TypedDict):
    """What every rollout of a run has in common, as arguments of `generate`."""

    max_tokens: int
    temperature: float
    batch_size: int
    cache_form: str


def sampling(section: RolloutSection) -> Sampling:
    """The `[rollout]` section as arguments of `generate`."""
    return {
        "max_tokens": section.max_tokens,
        "temperature": section.temperature,
        "batch_size": section.batch_size,
        "cache_form": "8-bit" if section.kv_cache == "8-bit" else "full",
    }


def _joined(decoder: Decoder, samples_per_prompt: int, records: Sequence[dict[str, Any]]) -> Rollout:
    requests = decoder.requests
    responses = [decoder.response(row) for row in range(len(requests))]
    lengths = np.array([len(response.tokens) for response in responses])
    width = max(1, int(lengths.max()))
    logprobs = np.zeros((len(requests), width), np.float32)
    for row, response in enumerate(responses):
        logprobs[row, : len(response.logprobs)] = response.logprobs
    return Rollout(
        prompts=tuple(request.prompt for request in requests),
        responses=tuple(response.tokens for response in responses),
        logprobs=mx.array(logprobs),
        mask=mx.array(np.arange(width)[None, :] < lengths[:, None]),
        finished=mx.array([response.finished for response in responses]),
        group=mx.array(np.repeat(np.arange(len(records), dtype=np.int32), samples_per_prompt)),
        records=tuple(record for record in records for _ in range(samples_per_prompt)),
        kept=decoder.kept.array(len(requests)),
    )
