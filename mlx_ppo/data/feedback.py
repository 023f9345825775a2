"""Human judgement of texts as a reward model learns from it: ratings, pairs, or rankings, by numbers of texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_ppo.config.supervised import FeedbackDataSection
from mlx_ppo.data.layouts import PLAIN, find
from mlx_ppo.data.preferences import Pair, Ranking, Rated, load_pairs, load_rankings, load_rated
from mlx_ppo.data.sequences import cut_said
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ConfigError

RATINGS = ("rating", "ratings")
Tokens = tuple[int, ...]
Floats = np.ndarray[Any, np.dtype[np.float32]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Ranks(NamedTuple):
    """Texts that answer one prompt, and how good each is; equal numbers are a tie."""

    texts: tuple[int, ...]
    goodness: tuple[float, ...]


@dataclass(frozen=True)
class Feedback:
    """Human judgement of texts: their ratings, or which are better than which."""

    texts: tuple[Tokens, ...]
    ratings: Floats | None  # [n], mean rating of each text
    pairs: Numbers  # [p, 2] indices (chosen, rejected), of rankings all that they say; empty for ratings
    margins: Floats  # [p]
    sources: tuple[str, ...]  # [n], where the data say that each text is from; "" where they don't
    rankings: tuple[Ranks, ...] = ()  # where they are learned from as such


def load_feedback(
    path: Path, tokenizer: Tokenizer, section: FeedbackDataSection, *, rankings: bool = False
) -> tuple[Feedback, list[str]]:
    """Read pairs or ratings, whichever the file's first row has, or rankings; and what is to be said of the file.

    Raises:
        ConfigError: rankings are wanted, and the file has ratings.
        DataError: the file can't be read, or a row is wrong.
    """
    limits: Mapping[str, Any] = {
        "max_tokens": section.max_tokens, "overlong": section.overlong, "columns": section.columns,
    }  # fmt: skip
    wanted = ("rankings", "pairs", "rated") if rankings else ("pairs", "rated")
    kind = (there := find(path, *wanted, columns=section.columns)).kind
    has_ratings = there.layout != PLAIN or any(name in row.fields for row in there.records[:1] for name in RATINGS)
    if kind == "rated" and rankings and has_ratings:
        raise ConfigError(
            f"reward_training.rankings: {path} has ratings of texts, no rankings or pairs of answers; use 'pairs'"
        )
    if kind == "rated" and not rankings:
        rated = load_rated(path, tokenizer, **limits)
        return _from_ratings(rated.rated), _said(path, rated.said, rated.dropped, rated.truncated)
    if not rankings:
        found = load_pairs(path, tokenizer, **limits)
        return _from_pairs(found.pairs), _said(path, found.said, found.dropped, found.truncated)
    ranked = load_rankings(path, tokenizer, **limits)
    return _from_rankings(ranked.rankings), [
        *_said(path, ranked.said, ranked.dropped, ranked.truncated, "overlong answers"),
        _sizes(path, ranked.rankings),
    ]


def _said(path: Path, read: str | None, dropped: int, truncated: int, what: str = "overlong") -> list[str]:
    return [line for line in (read, cut_said(path, dropped, truncated, what)) if line is not None]


def _sizes(path: Path, rankings: Sequence[Ranking]) -> str:
    sizes = [len(ranking.answers) for ranking in rankings]
    of = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else str(sizes[0])
    ties = sum(ranking.has_ties for ranking in rankings)
    tied = f"; {ties} have ties, and answers that are equally good aren't compared" if ties else ""
    return f"{path.name}: {len(sizes)} rankings of {of} answers{tied}"


def _from_ratings(rated: Sequence[Rated]) -> Feedback:
    ratings = np.array([item.rating for item in rated], np.float32)
    sources = tuple(item.source for item in rated)
    texts = tuple(item.tokens for item in rated)
    return Feedback(texts, ratings, np.zeros((0, 2), np.int64), np.zeros(0, np.float32), sources)


def _from_pairs(pairs: Sequence[Pair]) -> Feedback:
    texts = tuple(text for pair in pairs for text in (pair.chosen, pair.rejected))
    margins = np.array([pair.margin for pair in pairs], np.float32)
    sources = tuple(pair.source for pair in pairs for _ in range(2))
    return Feedback(texts, None, np.arange(len(texts)).reshape(-1, 2), margins, sources)


def _from_rankings(rankings: Sequence[Ranking]) -> Feedback:
    ranks, pairs, start = [], [], 0
    for ranking in rankings:
        numbers = range(start, start + len(ranking.answers))
        ranks.append(Ranks(tuple(numbers), ranking.goodness))
        for a, b in combinations(range(len(numbers)), 2):
            if ranking.goodness[a] != ranking.goodness[b]:
                better, worse = (a, b) if ranking.goodness[a] > ranking.goodness[b] else (b, a)
                pairs.append((start + better, start + worse))
        start += len(numbers)
    texts = tuple(answer for ranking in rankings for answer in ranking.answers)
    sources = tuple(ranking.source for ranking in rankings for _ in ranking.answers)
    margins = np.zeros(len(pairs), np.float32)
    return Feedback(texts, None, np.array(pairs, np.int64), margins, sources, tuple(ranks))
