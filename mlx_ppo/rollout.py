"""Prompts into responses of the current policy, with the probability of every token as it was sampled."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import mlx.core as mx
import numpy as np

from mlx_ppo.config import RolloutSection
from mlx_ppo.data.batches import pad_right
from mlx_ppo.data.random import philox
from mlx_ppo.errors import RunError
from mlx_ppo.memory.meter import phase
from mlx_ppo.networks.adapters import Weights
from mlx_ppo.networks.trunk import Trunk
from mlx_ppo.records import Rollout

Floats = np.ndarray[Any, np.dtype[np.float32]]
Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]
_PIECE = 1 << 18  # elements


class Request(NamedTuple):
    """One response to be sampled."""

    prompt: tuple[int, ...]
    draws: Floats  # [T] uniform numbers, one for each token: the response is a function of them, whatever the batch


class Response(NamedTuple):
    """A sampled response."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


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
        batch_size: sequences decoded together, 0: all. Changes speed and memory only; 1 where the model needs it.
        seed_parts: what the random draws derive from, with the prompt's position and the sample's number.
        positions: each prompt's number in the stream of prompts.
        records: each prompt's JSONL record, carried along.
        cache_form: of keys and values, see `networks.kv_cache`. With "8-bit" the sampling distribution is a slightly
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
    responses: list[Response] = [Response((), (), False)] * len(requests)
    if batch_size != 1 and not trunk.decodes_batches:
        batch_size = 1
    kept = _Kept()
    with trunk.using(weights):
        for rows in _chunks(requests, batch_size or len(requests)):
            decoder = _Decoder(trunk, [requests[row] for row in rows], max_tokens, temperature, cache_form)
            with phase("rollout"):
                for row, response in zip(rows, decoder.run(on_tokens), strict=True):
                    responses[row] = response
            kept.join(decoder.kept, rows)
    return _joined(requests, responses, kept, samples_per_prompt, records)


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


def _joined(
    requests: Sequence[Request],
    responses: Sequence[Response],
    kept: "_Kept",
    samples_per_prompt: int,
    records: Sequence[dict[str, Any]],
) -> Rollout:
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
        kept=kept.array(len(requests)),
    )


def _chunks(requests: Sequence[Request], batch_size: int) -> Iterator[list[int]]:
    """Rows decoded together: of similar prompt length, samples of one prompt side by side."""
    order = sorted(range(len(requests)), key=lambda row: (len(requests[row].prompt), row))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


class _Kept:
    """Gathers the states that enter the trunk's `split` block, token by token."""

    def __init__(self) -> None:
        self.rows: list[Ints] = []
        self.columns: list[Ints] = []
        self.states: list[mx.array] = []

    def add(self, rows: Ints, columns: Ints, states: mx.array) -> None:
        """States [N, D] of N tokens, at their rows and columns."""
        self.rows.append(rows)
        self.columns.append(columns)
        self.states.append(states)

    def join(self, other: "_Kept", rows: Sequence[int]) -> None:
        """Take over another's states; `rows` says which row here each of its rows is."""
        self.rows.extend(np.array(rows)[own] for own in other.rows)
        self.columns.extend(other.columns)
        self.states.extend(other.states)

    def array(self, count: int) -> mx.array | None:
        """[count, S, D], 0 where no token is; None where nothing was gathered."""
        if not self.states:
            return None
        rows, columns = np.concatenate(self.rows), np.concatenate(self.columns)
        states = mx.concatenate(self.states)
        gathered = mx.zeros((count, int(columns.max()) + 1, states.shape[-1]), states.dtype)
        gathered[mx.array(rows.astype(np.int32)), mx.array(columns.astype(np.int32))] = states
        mx.eval(gathered)
        return gathered


class _Decoder:
    """Decodes one chunk: shared prefill, then a token a step for the rows that are not finished."""

    def __init__(
        self, trunk: Trunk, requests: Sequence[Request], max_tokens: int, temperature: float, cache_form: str
    ) -> None:
        self.trunk = trunk
        self.requests = requests
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.cache_form = cache_form
        self.keeping = bool(trunk.split) and cache_form == "full"
        self.stops = np.array(sorted(trunk.tokenizer.eos_ids))
        self.kept = _Kept()

    def run(self, on_tokens: Callable[[int], None]) -> list[Response]:
        cache, states = self._prefill()
        count = len(self.requests)
        draws = np.stack([request.draws for request in self.requests])
        tokens = np.zeros((count, self.max_tokens), np.int32)
        logprobs = np.zeros((count, self.max_tokens), np.float32)
        lengths = np.zeros(count, np.int32)
        finished = np.zeros(count, bool)
        live = np.arange(count)
        prompts = np.array([len(request.prompt) for request in self.requests])
        for step in range(self.max_tokens):
            logits = np.asarray(self.trunk.logits(states).astype(mx.float32))
            picked, logprob = sample(logits, draws[live, step], self.temperature)
            del logits  # it would stay in memory beside the next token's
            tokens[live, step], logprobs[live, step] = picked, logprob
            lengths[live] = step + 1
            on_tokens(len(live))
            going = ~np.isin(picked, self.stops)
            finished[live[~going]] = True
            over = step + 1 == self.max_tokens or not going.any()
            if self.keeping:  # nothing is predicted from a last token, but a reward model reads its state
                states = self._advance(picked, cache, live, prompts[live] + step)
            if over:
                break
            if not going.all():
                keep = mx.array(np.flatnonzero(going).astype(np.int32))
                for layer in cache:
                    layer.filter(keep)
                live, picked, states = live[going], picked[going], states[keep]
            if not self.keeping:
                states = self._advance(picked, cache, live, prompts[live] + step)
        return [
            Response(tuple(tokens[row, :n].tolist()), tuple(logprobs[row, :n].tolist()), bool(finished[row]))
            for row, n in enumerate(lengths)
        ]

    def _advance(self, tokens: Ints, cache: list[Any], rows: Ints, columns: Ints) -> mx.array:
        """Read one more token of each row; returns the states [rows, D] after it."""
        from mlx_ppo.networks.kv_cache import share_offsets

        share_offsets(cache)
        states, entering = self._read(mx.array(tokens[:, None]), cache)
        if entering is not None:
            mx.eval(entering)
            self.kept.add(rows, columns, entering[:, -1])
        return states[:, -1]

    def _read(self, tokens: mx.array, cache: list[Any]) -> tuple[mx.array, mx.array | None]:
        """States [rows, S, D] of tokens [rows, S], and what is to be kept of them."""
        if self.keeping:
            return self.trunk.hidden_and_entering(tokens, cache)
        return self.trunk.hidden(tokens, cache), None

    def _prefill(self) -> tuple[list[Any], mx.array]:
        """Read each distinct prompt once; returns the cache of all rows and the states [rows, D] after the prompts."""
        from mlx_ppo.networks.kv_cache import new_caches

        distinct = list(dict.fromkeys(request.prompt for request in self.requests))
        rows, lengths = pad_right(distinct)
        cache = new_caches(self.trunk.model, self.cache_form, len(distinct))
        padding = (rows.shape[1] - lengths).tolist()
        size_caches(cache, rows.shape[1] + self.max_tokens)
        for layer in cache:
            if any(padding):
                layer.prepare(lengths=lengths.tolist(), right_padding=padding)
        states, entering = self._read(mx.array(rows), cache)
        last = states[mx.arange(len(distinct)), mx.array(lengths) - 1]
        index = {prompt: row for row, prompt in enumerate(distinct)}
        owners = np.array([index[request.prompt] for request in self.requests])
        if entering is not None:
            counted = np.arange(rows.shape[1])[None, :] < lengths[owners][:, None]
            row, column = np.nonzero(counted)
            mx.eval(entering, last)
            self.kept.add(row, column, entering[mx.array(owners[row]), mx.array(column)])
        owner = mx.array(owners)
        for layer in cache:
            if any(padding):
                layer.finalize()
            if len(distinct) < len(self.requests):
                layer.filter(owner)
        return cache, last[owner]


def size_caches(caches: Sequence[Any], length: int) -> None:
    """Let plain KV caches take the room of `length` tokens at once, instead of 256 at a time."""
    for cache in caches:
        if getattr(cache, "step", None) == 256 and not hasattr(cache, "max_size"):
            cache.step = length


def sample(logits: Floats, draws: Floats, temperature: float) -> tuple[np.ndarray[Any, Any], Floats]:
    """Pick a token for each row by the inverse of its cumulative distribution.

    Args:
        logits: [B, V] float32.
        draws: [B] uniform in [0, 1).
        temperature: 0 takes the most probable token.
    Returns:
        tokens [B] and their log-probabilities [B] under softmax(logits / temperature) (temperature 1 where it is 0).
    Raises:
        RunError: a logit is NaN or positive infinity.
    """
    tokens, logprobs = np.empty(len(logits), np.int64), np.empty(len(logits), np.float32)
    count = max(1, _PIECE // logits.shape[-1])  # rows at once, so that what lies between stays small
    for start in range(0, len(logits), count):
        rows = slice(start, start + count)
        tokens[rows], logprobs[rows] = _sample_rows(logits[rows], draws[rows], temperature)
    return tokens, logprobs


def _sample_rows(logits: Floats, draws: Floats, temperature: float) -> tuple[np.ndarray[Any, Any], Floats]:
    scaled = logits / temperature if temperature > 0 else logits
    top = scaled.max(axis=-1, keepdims=True)
    if not np.isfinite(top).all():
        raise RunError("the policy's logits are not finite; nothing was sampled")
    scaled = scaled - top
    masses = np.exp(scaled)
    rows = np.arange(len(scaled))
    if temperature > 0:
        cumulative = np.cumsum(masses, axis=-1, dtype=np.float64)
        wanted = draws.astype(np.float64) * cumulative[:, -1]
        tokens = np.array([np.searchsorted(c, w, side="right") for c, w in zip(cumulative, wanted, strict=True)])
        total = cumulative[:, -1]
    else:
        tokens = scaled.argmax(axis=-1)
        total = masses.sum(axis=-1, dtype=np.float64)
    return tokens, (scaled[rows, tokens] - np.log(total)).astype(np.float32)
