"""Decoding of many requests, some at a time: the place of one that has ended goes to one that waits."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.cpu.steps import MOST_ROWS, Steps
from mlx_ppo.compute.kv_cache import FULL, join, keep_rows, new_caches, share_offsets, size_caches
from mlx_ppo.data.batches import pad_right
from mlx_ppo.errors import RunError
from mlx_ppo.models.trunk import Trunk

Floats = np.ndarray[Any, np.dtype[np.float32]]
Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]
_PIECE = 1 << 18  # elements
_LITTLE = 128  # prompt tokens that are read together however much is padding: fewer would take nearly as long
_PADDED = 1.1  # positions read for each token of longer prompts, at most
_REFILL = 4  # a refill is worth a prefill of its own where one in so many places is free


class Request(NamedTuple):
    """One response to be sampled."""

    prompt: tuple[int, ...]
    draws: Floats  # [T] uniform numbers, one for each token: the response is a function of them, whatever the batch


class Response(NamedTuple):
    """A sampled response."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


class Decoder:
    """Requests, the places in which they are decoded, and what has been sampled so far.

    `refill` and `decode` in turn, until nothing is `unfinished`.
    """

    def __init__(
        self,
        trunk: Trunk,
        requests: Sequence[Request],
        *,
        places: int,
        max_tokens: int,
        temperature: float,
        cache_form: str,
    ) -> None:
        """Nothing is read yet.

        Args:
            trunk: the language model; a role's weights lie on it meanwhile.
            requests: those of similar prompt length are decoded together, and those of one prompt side by side.
            places: sequences decoded together.
            max_tokens: bound T on a response.
            temperature: see `sample`.
            cache_form: see `networks.kv_cache`.
        """
        self.trunk, self.requests, self.places = trunk, requests, places
        self.max_tokens, self.temperature, self.cache_form = max_tokens, temperature, cache_form
        self.keeping = bool(trunk.split) and cache_form == FULL
        self.kept = Kept()
        self._stops = np.array(sorted(trunk.tokenizer.eos_ids))
        count = len(requests)
        self._prompts = np.array([len(request.prompt) for request in requests])  # their lengths
        self._draws = np.stack([request.draws for request in requests])
        self._tokens = np.zeros((count, max_tokens), np.int32)
        self._logprobs = np.zeros((count, max_tokens), np.float32)
        self._lengths = np.zeros(count, np.int32)
        self._finished = np.zeros(count, bool)
        self._waiting: Ints = np.argsort(self._prompts, kind="stable")
        self._live: Ints = self._waiting[:0]  # requests that have places, in the caches' order
        self._cache: list[Any] = []
        self._states = mx.zeros((0,))  # [live, D], after the last token of each
        self._steps: Steps | None = None  # where few rows are read one token at a time on a CPU
        self._joins = count > 1 and trunk.joins_batches

    @property
    def unfinished(self) -> bool:
        """Whether there is anything left to sample."""
        return bool(len(self._live) or len(self._waiting))

    def refill(self) -> None:
        """Give free places to requests that wait, as far as there are any."""
        self._detach()
        free = self.places - len(self._live)
        added, self._waiting = self._waiting[:free], self._waiting[free:]
        for rows in self._of_like_length(added):
            cache, states = self._prefill(rows)
            self._states = mx.concatenate([self._states, states]) if len(self._live) else states
            self._live = np.concatenate([self._live, rows])
            if self._cache:
                join(self._cache, cache, self._room(self._live))
            else:
                self._cache = cache

    def decode(self, on_tokens: Callable[[int], None]) -> None:
        """Sample a token a step for every request that has a place, until a refill is due, or there are none.

        Args:
            on_tokens: called with the number of tokens sampled at each step.
        Raises:
            RunError: see `sample`.
        """
        if self._steps is None and self.places <= MOST_ROWS and self.cache_form == FULL and self.trunk.reads_steps:
            self._steps = Steps(self.trunk, self.places)
        while len(self._live) and not self._refill_due():
            self._step(on_tokens)

    def response(self, row: int) -> Response:
        """What was sampled for a request."""
        length = int(self._lengths[row])
        tokens, logprobs = self._tokens[row, :length].tolist(), self._logprobs[row, :length].tolist()
        return Response(tuple(tokens), tuple(logprobs), bool(self._finished[row]))

    def _of_like_length(self, rows: Ints) -> list[Ints]:
        """Requests in order of prompt length, in groups whose prompts are read together with little padding."""
        groups: list[list[int]] = [[]]
        read: set[tuple[int, ...]] = set()
        tokens = longest = 0
        for row in rows[::-1]:
            prompt = self.requests[row].prompt
            if prompt not in read:
                padded = (len(read) + 1) * longest
                if self._joins and tokens >= _LITTLE and padded > _PADDED * (tokens + len(prompt)):
                    groups.append([])
                    read, tokens = set(), 0
                longest = longest if read else len(prompt)
                read.add(prompt)
                tokens += len(prompt)
            groups[-1].append(row)
        return [np.array(group) for group in groups]

    def _refill_due(self) -> bool:
        """Whether enough places are free, or as many as there are requests that wait."""
        free, wanted = self.places - len(self._live), min(len(self._waiting), -(-self.places // _REFILL))
        return self._joins and 0 < wanted <= free

    def _step(self, on_tokens: Callable[[int], None]) -> None:
        live, slots = self._live, self._lengths[self._live]
        if self._steps:
            logits = self._steps.logits(self._states)
        else:
            logits = np.asarray(self.trunk.logits(self._states).astype(mx.float32))
        picked, logprobs = sample(logits, self._draws[live, slots], self.temperature)
        del logits  # it would stay in memory beside the next token's
        self._tokens[live, slots], self._logprobs[live, slots] = picked, logprobs
        self._lengths[live] += 1
        on_tokens(len(live))
        self._finished[live] = np.isin(picked, self._stops)
        going = ~self._finished[live] & (slots + 1 < self.max_tokens)
        if self.keeping:  # nothing is predicted from a last token, but a reward model reads its state
            self._advance(picked)
        self._keep(np.flatnonzero(going))
        if not self.keeping and going.any():
            self._advance(picked[going])

    def _keep(self, places: Ints) -> None:
        """Free all other places."""
        if len(places) == len(self._live):
            return
        self._detach()
        self._live, self._states = self._live[places], self._states[mx.array(places)]
        if len(places):
            keep_rows(self._cache, places.tolist(), self._room(self._live))
        else:
            self._cache = []

    def _detach(self) -> None:
        if self._steps:
            self._steps.detach()

    def _room(self, rows: Ints) -> int:
        """Tokens of the longest of some requests at most: no cache needs more, as its rows end at the same place."""
        return int(self._prompts[rows].max()) + self.max_tokens

    def _advance(self, tokens: Ints) -> None:
        """Read one more token of each request that has a place."""
        if self._steps:
            self._states, entering = self._steps.read(tokens, self._cache)
        else:
            share_offsets(self._cache)
            states, of_all = self._read(mx.array(tokens[:, None]), self._cache)
            self._states, entering = states[:, -1], None if of_all is None else of_all[:, -1]
        if self.keeping and entering is not None:
            mx.eval(entering)
            columns = self._prompts[self._live] + self._lengths[self._live] - 1
            self.kept.add(self._live, columns, entering)

    def _read(self, tokens: mx.array, cache: list[Any]) -> tuple[mx.array, mx.array | None]:
        """States [rows, S, D] of tokens [rows, S], and what is to be kept of them."""
        if self.keeping:
            return self.trunk.hidden_and_entering(tokens, cache)
        return self.trunk.hidden(tokens, cache), None

    def _prefill(self, rows: Ints) -> tuple[list[Any], mx.array]:
        """Read each distinct prompt of some requests once; the caches of all, and the states [rows, D] after them."""
        prompts = [self.requests[row].prompt for row in rows]
        distinct = list(dict.fromkeys(prompts))
        tokens, lengths = pad_right(distinct)
        padding = tokens.shape[1] - lengths
        cache = new_caches(self.trunk.model, self.cache_form, len(distinct))
        size_caches(cache, self._room(rows))
        if padding.any():
            for layer in cache:
                layer.prepare(lengths=lengths.tolist(), right_padding=padding.tolist())
        states, entering = self._read(mx.array(tokens), cache)
        index = {prompt: number for number, prompt in enumerate(distinct)}
        owners = np.array([index[prompt] for prompt in prompts])
        last = states[mx.array(owners), mx.array(lengths[owners] - 1)]
        mx.eval(last, entering, [layer.state for layer in cache])
        if entering is not None:
            place, column = np.nonzero(np.arange(tokens.shape[1])[None, :] < lengths[owners][:, None])
            self.kept.add(rows[place], column, entering[mx.array(owners[place]), mx.array(column)])
        for layer in cache:
            layer.finalize()
            mx.eval(layer.state)  # one layer is there twice, not all
        if len(distinct) < len(rows):
            keep_rows(cache, owners.tolist(), self._room(rows))
        return cache, last


class Kept:
    """Gathers the states that enter the trunk's `split` block, token by token."""

    def __init__(self) -> None:
        """Nothing is gathered yet."""
        self.rows: list[Ints] = []
        self.columns: list[Ints] = []
        self.states: list[mx.array] = []

    def add(self, rows: Ints, columns: Ints, states: mx.array) -> None:
        """States [N, D] of N tokens, at their rows and columns."""
        self.rows.append(rows)
        self.columns.append(columns)
        self.states.append(states)

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
