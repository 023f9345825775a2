"""Human judgement for reward training: pairs of answers, rankings of several, and rated texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_ppo.data.jsonl import Record, kind, number, one_field, text_field
from mlx_ppo.data.layouts import SOURCE, records_as
from mlx_ppo.data.random import philox
from mlx_ppo.data.rankings import finite
from mlx_ppo.data.sequences import (
    LengthLimit,
    Overlong,
    answer_field,
    answered_tokens,
    prompt_field,
    prompt_tokens,
    text_tokens,
)
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import DataError


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, each as prompt, answer and EOS."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float  # by how much the chosen one should score higher, 0 if the file doesn't say
    where: str
    source: str = ""  # where the row is from, "" if the file doesn't say
    starts: tuple[int, int] = (1, 1)  # of the answer in each, at least 1
    prompt: str = ""  # the same for answers to the same prompt, however much of it was cut


@dataclass(frozen=True)
class PairSet:
    """The pairs of a file, and how many were too long."""

    pairs: tuple[Pair, ...]
    dropped: int
    truncated: int
    said: str | None = None  # how the file was read, where that isn't plain


@dataclass(frozen=True)
class Rated:
    """A text, or prompt and completion, with EOS and the ratings that people gave it."""

    tokens: tuple[int, ...]
    rating: float  # mean of the ratings
    spread: float  # their population standard deviation, 0 for a single one
    count: int  # how many there are
    where: str
    source: str = ""  # where the row is from, "" if the file doesn't say
    start: int = 1  # of the completion, at least 1
    prompt: str = ""  # the same for answers to the same prompt, however much of it was cut
    bounds: tuple[float, float] = (0.0, 0.0)  # the lowest and the highest of the ratings


@dataclass(frozen=True)
class RatedSet:
    """The rated texts of a file, and how many were too long."""

    rated: tuple[Rated, ...]
    dropped: int
    truncated: int
    said: str | None = None  # how the file was read, where that isn't plain


@dataclass(frozen=True)
class Ranking:
    """Two or more different answers to one prompt, each as prompt, answer and EOS; not all of them equally good."""

    answers: tuple[tuple[int, ...], ...]
    goodness: tuple[float, ...]  # of each answer; higher is better, equal numbers are a tie
    where: str
    source: str = ""  # where the row is from, "" if the file doesn't say

    @property
    def has_ties(self) -> bool:
        """Whether two answers are equally good."""
        return len(set(self.goodness)) < len(self.goodness)


@dataclass(frozen=True)
class RankingSet:
    """The rankings of a file, and how many answers were too long."""

    rankings: tuple[Ranking, ...]
    dropped: int  # answers, with those of rankings of which too few were left
    truncated: int
    said: str | None = None  # how the file was read, where that isn't plain


def load_pairs(
    path: Path, tokenizer: Tokenizer, *, max_tokens: int, overlong: Overlong, columns: Sequence[str] = ()
) -> PairSet:
    """Pairs from lines with "prompt", "chosen", "rejected" (strings or messages) and an optional "margin".

    An answer may be empty. Truncation keeps the first token (BOS) and the last `max_tokens` - 1 of either side, so
    that the score is read at EOS; a pair in which this leaves no difference is dropped instead.

    Raises:
        DataError: a line is wrong, chosen and rejected are the same, or every pair was dropped.
    """
    limit = LengthLimit(max_tokens, overlong)
    pairs = []
    records, said = records_as(path, "pairs", columns=columns)
    for record in records:
        sides = both_answered(record, tokenizer)
        margin = margin_of(record)
        chosen, rejected = (limit.keep_end(tokens) for tokens, _ in sides)
        starts = tuple(max(1, start - len(tokens) + len(limit.keep_end(tokens))) for tokens, start in sides)
        longest = max(len(tokens) for tokens, _ in sides)
        if limit.admits(longest, record.where, useless_when_cut=chosen == rejected):
            places = starts[0], starts[1]
            pairs.append(Pair(chosen, rejected, margin, record.where, source_of(record), places, _prompt_of(record)))
    limit.require_some(pairs, path)
    return PairSet(tuple(pairs), limit.dropped, limit.truncated, said)


def load_rated(
    path: Path, tokenizer: Tokenizer, *, max_tokens: int, overlong: Overlong, columns: Sequence[str] = ()
) -> RatedSet:
    """Rated texts from lines with "text" or "completion" (maybe after a "prompt"), and "rating" or "ratings".

    Truncation keeps the first token (BOS) and the last `max_tokens` - 1, so that the score is read at EOS.

    Raises:
        DataError: a line is wrong, or every text was dropped.
    """
    limit = LengthLimit(max_tokens, overlong)
    rated = []
    records, said = records_as(path, "rated", columns=columns)
    for record in records:
        ratings = ratings_of(record)
        tokens, start = rated_tokens(record, tokenizer)
        if not limit.admits(len(tokens), record.where):
            continue
        mean = math.fsum(ratings) / len(ratings)
        spread = math.sqrt(math.fsum((rating - mean) ** 2 for rating in ratings) / len(ratings))
        kept = limit.keep_end(tokens)
        start = max(1, start - len(tokens) + len(kept))
        source, asked, bounds = source_of(record), _prompt_of(record), (min(ratings), max(ratings))
        rated.append(Rated(kept, mean, spread, len(ratings), record.where, source, start, asked, bounds))
    limit.require_some(rated, path)
    return RatedSet(tuple(rated), limit.dropped, limit.truncated, said)


def load_rankings(
    path: Path, tokenizer: Tokenizer, *, max_tokens: int, overlong: Overlong, columns: Sequence[str] = ()
) -> RankingSet:
    """Rankings from any layout that has several answers to a prompt with ranks or scores; a pair is one of two.

    Truncation is that of `load_pairs`. What is dropped for its length is an answer, not its ranking: the others' order
    says as much without it. Answers that are the same to the tokenizer, or when cut, count once, at their best place.

    Raises:
        DataError: a line is wrong, or no ranking is left.
    """
    limit = LengthLimit(max_tokens, overlong)
    rankings = []
    records, said = records_as(path, "rankings", "pairs", columns=columns)
    for record in records:
        best: dict[tuple[int, ...], float] = {}
        for tokens, value in ranked_answers(record, tokenizer):
            if limit.admits(len(tokens), record.where):
                kept = limit.keep_end(tokens)
                best[kept] = max(value, best.get(kept, value))
        if len(set(best.values())) > 1:
            rankings.append(Ranking(tuple(best), tuple(best.values()), record.where, source_of(record)))
        else:
            limit.dropped += len(best)
    limit.require_some(rankings, path)
    return RankingSet(tuple(rankings), limit.dropped, limit.truncated, said)


def ranked_answers(record: Record, tokenizer: Tokenizer) -> list[tuple[list[int], float]]:
    """Tokens of a row's prompt with each answer, and how good the answer is; of a pair 1 and 0.

    Raises:
        DataError: the row is wrong.
    """
    answers, goodness = (record.fields.get(name) for name in ("answers", "scores"))
    if "chosen" in record.fields or not _is_ranking(answers, goodness):
        if record.fields.get("margin"):
            raise DataError(f"{record.where}: 'margin' is for pairs; rankings have none, remove it")
        chosen, rejected = both_sides(record, tokenizer)
        return [(chosen, 1.0), (rejected, 0.0)]
    prompt = prompt_field(record, "prompt")
    prefix = prompt_tokens(prompt, tokenizer, record.where)
    found = [answered_tokens(prompt, prefix, answer, tokenizer, record.where)[0] for answer in answers or ()]
    return list(zip(found, goodness or (), strict=True))


def _is_ranking(answers: object, goodness: object) -> bool:
    return (
        isinstance(answers, list)
        and isinstance(goodness, list)
        and len(answers) == len(goodness)
        and all(isinstance(answer, str) for answer in answers)
        and all(finite(value) for value in goodness)
    )


def source_of(record: Record) -> str:
    """Where a row says that it is from, "" if it doesn't."""
    value = record.fields.get(SOURCE)
    if isinstance(value, list):
        return ", ".join(str(item) for item in value if item is not None)
    return "" if value is None or isinstance(value, dict) else str(value)


def _prompt_of(record: Record) -> str:
    return repr(record.fields["prompt"]) if "prompt" in record.fields and "text" not in record.fields else ""


def derive_pairs(ratings: Sequence[float], *, min_difference: float, per_item: int, seed: int) -> npt.NDArray[np.int64]:
    """Pairs of items whose ratings differ clearly.

    For each item, `per_item` partners are drawn evenly (with replacement) from all items whose rating is at least
    `min_difference` away; an item without such partners draws none. A pair that was drawn more than once is kept once.

    Args:
        ratings: one finite number per item.
        min_difference: above 0.
        per_item: at least 1.
        seed: the same seed gives the same pairs.

    Returns:
        [N, 2] int64 indices, (higher, lower), sorted.

    Raises:
        DataError: no two ratings differ by `min_difference`.
    """
    if min_difference <= 0 or per_item < 1:
        raise ValueError(f"min_difference {min_difference} must be above 0 and per_item {per_item} at least 1")
    values = np.asarray(ratings, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    below = np.searchsorted(ascending, values - min_difference, side="right")
    above = len(values) - np.searchsorted(ascending, values + min_difference, side="left")
    items = np.flatnonzero(below + above)
    below, partners = below[items, None], (below + above)[items, None]
    # partner k is the k-th lowest of those below or, past these, counts back from the highest: -1, -2, ...
    drawn = philox("derived pairs", seed).integers(0, partners, size=(len(items), per_item))
    partner = order[np.where(drawn < below, drawn, below - 1 - drawn)]
    item = np.broadcast_to(items[:, None], partner.shape)
    higher = np.where(values[item] > values[partner], item, partner)
    pairs = np.stack([higher, item + partner - higher], axis=-1).reshape(-1, 2)
    # the search compared with a rounded rating - min_difference
    clear = values[pairs[:, 0]] - values[pairs[:, 1]] >= min_difference
    if not clear.any():
        raise DataError(
            f"no two of the {len(values)} ratings differ by min_difference = {min_difference:g}; lower it, or rate more"
        )
    return np.unique(pairs[clear], axis=0).astype(np.int64)


def both_sides(record: Record, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of a row's prompt with the chosen answer, and with the rejected one.

    Raises:
        DataError: the row is wrong, or there is no difference.
    """
    (chosen, _), (rejected, _) = both_answered(record, tokenizer)
    return chosen, rejected


def both_answered(record: Record, tokenizer: Tokenizer) -> tuple[tuple[list[int], int], tuple[list[int], int]]:
    """As `both_sides`, each with the number of its tokens that are before the answer.

    Raises:
        DataError: the row is wrong, or there is no difference.
    """
    prompt = prompt_field(record, "prompt")
    chosen, rejected = (answer_field(record, name, prompt, allow_empty=True) for name in ("chosen", "rejected"))
    prefix = prompt_tokens(prompt, tokenizer, record.where)
    first, second = (answered_tokens(prompt, prefix, answer, tokenizer, record.where) for answer in (chosen, rejected))
    if first[0] == second[0]:
        what = "the same" if chosen == rejected else "the same to this tokenizer"
        raise DataError(f"{record.where}: 'chosen' and 'rejected' are {what}; remove the line")
    return first, second


def margin_of(record: Record) -> float:
    """By how much the chosen answer should score higher, 0 where the row doesn't say; DataError where it is wrong."""
    margin = number(record.fields.get("margin", 0), "margin", record.where)
    if margin < 0:
        raise DataError(f"{record.where}: 'margin' is {margin:g}, below 0; swap 'chosen' and 'rejected' instead")
    return margin


def rated_tokens(record: Record, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Tokens of a row's rated text, and how many of them are before what was rated; DataError where it is wrong."""
    name = one_field(record, "text", "completion")
    if name == "text" or "prompt" not in record.fields:
        return [*text_tokens(text_field(record, name), tokenizer, record.where), tokenizer.eos_id], 1
    prompt = prompt_field(record, "prompt")
    answer = answer_field(record, name, prompt, allow_empty=True)
    prefix = prompt_tokens(prompt, tokenizer, record.where)
    return answered_tokens(prompt, prefix, answer, tokenizer, record.where)


def ratings_of(record: Record) -> list[float]:
    """A row's ratings, one or more; DataError where they are wrong."""
    name = one_field(record, "rating", "ratings")
    value = record.fields[name]
    if name == "rating":
        return [number(value, name, record.where)]
    if not isinstance(value, list):
        raise DataError(f"{record.where}: 'ratings' must be a list, not {kind(value)}; use 'rating' for a single one")
    if not value:
        raise DataError(f"{record.where}: 'ratings' is empty; add one or remove the line")
    return [number(item, f"ratings[{index}]", record.where) for index, item in enumerate(value)]
