"""Continuous batching: many requests, some at a time; the slot of one that has ended goes to one that waits.

Source: Yu et al. 2022, OSDI (Orca), section 3.1 (scheduling by iteration).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.truncation import Distribution
from mlx_ppo.compute.engine import Numbers, Reader
from mlx_ppo.compute.kv_cache import FULL, filled, join, keep_rows, new_caches, size_caches
from mlx_ppo.data.batches import pad_right
from mlx_ppo.errors import RunError
from mlx_ppo.models.trunk import Trunk

Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]
_LITTLE = 128  # prompt tokens that are read together however much is padding: fewer would take nearly as long
_PADDED = 1.1  # positions read for each token of longer prompts, at most
_REFILL = 4  # a refill is worth a prefill of its own where one in so many places is free


class Request(NamedTuple):
    """One response to be sampled."""

    prompt: tuple[int, ...]
    draws: Numbers  # [T] uniform numbers, one for each token: the response is a function of them, whatever the batch


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
        distribution: Distribution,
        cache_form: str,
    ) -> None:
        """Nothing is read yet.

        Args:
            trunk: the language model; a role's weights lie on it meanwhile.
            requests: those of similar prompt length are decoded together, and those of one prompt side by side.
            places: sequences decoded together.
            max_tokens: bound T on a response.
            distribution: what is drawn from; temperature 0 takes the most probable token.
            cache_form: see `compute.kv_cache`.
        """
        self.trunk, self.requests, self.places = trunk, requests, places
        self.max_tokens, self.distribution, self.cache_form = max_tokens, distribution, cache_form
        self.keeping = bool(trunk.split) and cache_form == FULL
        self.kept = Kept()
        self.supports = Supports(max_tokens) if distribution.truncates else None  # who needs none takes it away
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
        self._reader: Reader | None = None
        self._joins = count > 1 and trunk.capabilities.joins

    @property
    def unfinished(self) -> bool:
        """Whether there is anything left to sample."""
        return bool(len(self._live) or len(self._waiting))

    def refill(self) -> None:
        """Give free places to requests that wait, as far as there are any."""
        self._detach()
        free = self.places - len(self._live)
        added, self._waiting = self._waiting[:free], self._waiting[free:]
        if len(added) and len(self._live) and self._in_place:
            # what rows left behind is let go of before others are read
            keep_rows(self._cache, range(len(self._live)), self._room(self._live))
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
            RunError: the policy's logits are not finite.
        """
        if self._reader is None:
            self._reader = self.trunk.engine.reader(self.trunk, self.places, full=self.cache_form == FULL)
        while len(self._live) and not self._refill_due():
            self._step(self._reader, on_tokens)

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

    def _step(self, reader: Reader, on_tokens: Callable[[int], None]) -> None:
        live, slots = self._live, self._lengths[self._live]
        picked, logprobs, support = reader.sample(self._states, self._draws[live, slots], self.distribution)
        going = slots + 1 < self.max_tokens
        # nothing is predicted from a last token, but a reward model reads its state
        whole = self.keeping or (reader.ahead and bool(going.any()))
        if whole and reader.ahead:
            self._advance(reader, picked, slots)
            mx.async_eval(self._states, picked, logprobs, support)
        picked, logprobs = np.asarray(picked), np.asarray(logprobs)
        if not np.isfinite(logprobs).all():
            raise RunError("the policy's logits are not finite; nothing was sampled")
        self._tokens[live, slots], self._logprobs[live, slots] = picked, logprobs
        if self.supports is not None:
            self.supports.add(live, slots, np.asarray(support))
        self._lengths[live] += 1
        on_tokens(len(live))
        self._finished[live] = np.isin(picked, self._stops)
        going &= ~self._finished[live]
        if whole and not reader.ahead:
            self._advance(reader, picked, slots)
        kept = filled(np.flatnonzero(going))
        self._keep(kept)
        if not whole and len(kept):
            self._advance(reader, picked[kept], slots[kept])

    def _keep(self, places: Ints) -> None:
        """Free all other places; the requests have theirs in this order then."""
        if len(places) == len(self._live):
            return
        self._detach()
        self._live, self._states = self._live[places], self._states[mx.array(places)]
        if len(places):
            keep_rows(self._cache, places.tolist(), self._room(self._live), in_place=self._in_place)
        else:
            self._cache = []

    @property
    def _in_place(self) -> bool:
        return self._reader is not None and self._reader.in_place

    def _detach(self) -> None:
        if self._reader is not None:
            self._reader.detach()

    def _room(self, rows: Ints) -> int:
        """Tokens of the longest of some requests at most: no cache needs more, as its rows end at the same place."""
        return int(self._prompts[rows].max()) + self.max_tokens

    def _advance(self, reader: Reader, tokens: Any, slots: Ints) -> None:
        """Read one more token of each request that has a place; the tokens' numbers in their responses are `slots`."""
        self._states, entering = reader.read(tokens, self._cache)
        if self.keeping and entering is not None:
            mx.async_eval(entering)
            self.kept.add(self._live, self._prompts[self._live] + slots, entering)

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


class Supports:
    """Gathers the sets that tokens were drawn from, by request."""

    def __init__(self, max_tokens: int) -> None:
        """Nothing is gathered yet."""
        self._most = max_tokens
        self._sets: dict[int, Numbers] = {}

    def add(self, rows: Ints, slots: Ints, words: Numbers) -> None:
        """Sets [n, W] of one token of each of some requests; the tokens' numbers in their responses are `slots`."""
        for row, slot, own in zip(rows.tolist(), slots.tolist(), words, strict=True):
            if row not in self._sets:  # zeros take no memory before they are written to
                self._sets[row] = np.zeros((self._most, words.shape[-1]), np.uint32)
            self._sets[row][slot] = own

    def array(self, lengths: Sequence[int]) -> mx.array:
        """[N, W], the sets of all responses, one behind the other; they are let go of here."""
        parts = [mx.array(self._sets.pop(row)[:length]) for row, length in enumerate(lengths)]
        joined = mx.concatenate(parts)
        mx.eval(joined)
        return joined


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
