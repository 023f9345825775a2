"""Answers of which people said that they are good or bad, each by itself: from labels, ratings or pairs."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_ppo.data.known_layouts import ULTRAFEEDBACK
from mlx_ppo.data.layouts import find
from mlx_ppo.data.preferences import Pair, load_pairs, load_rated
from mlx_ppo.data.random import philox
from mlx_ppo.data.sequences import Overlong, cut_said
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import DataError

_SAME = 1e-9  # ratings nearer to the threshold are at it: means are rounded


class Answer(NamedTuple):
    """Prompt, answer and EOS."""

    tokens: tuple[int, ...]
    start: int  # of the answer, at least 1
    prompt: str = ""  # the same for answers to the same prompt, however much of it was cut


class Judged(NamedTuple):
    """Answers that people found good or bad."""

    answers: tuple[Answer, ...]
    good: tuple[bool, ...]
    above: float | None  # ratings above it are good, those below bad; None where the data were pairs
    said: tuple[str, ...]  # how the file was read


def both_answers(pairs: Sequence[Pair]) -> list[Answer]:
    """Chosen and rejected answer of each pair, one after the other."""
    return [
        Answer(tokens, start, pair.prompt)
        for pair in pairs
        for tokens, start in zip((pair.chosen, pair.rejected), pair.starts, strict=True)
    ]


def load_judged(
    path: Path,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    overlong: Overlong,
    columns: Sequence[str] = (),
    above: float | None = None,
) -> Judged:
    """Ratings above a threshold are good, those below it bad; of pairs, answers that are preferred more often than not.

    Args:
        path: any layout with ratings, with labels (1 and 0 as ratings), or with pairs or rankings.
        tokenizer: the model's.
        max_tokens: bound of prompt and answer; truncation keeps the first token and the last ones.
        overlong: what happens to longer ones.
        columns: names of columns, see `layouts.find`.
        above: the threshold, which pairs don't need; None: halfway between the file's lowest and highest rating.

    Raises:
        DataError: the file can't be read, a row is wrong, or no answer is good or none bad.
    """
    if not _has_ratings(path, columns):
        pairs = load_pairs(path, tokenizer, max_tokens=max_tokens, overlong=overlong, columns=columns)
        judged, undecided = _of_pairs(pairs.pairs)
        good = tuple(judged.values())
        if not good:
            raise DataError(f"{path}: every answer is preferred as often as not, so that none is good or bad")
        left = f", as often as not: {undecided}, which are left out" if undecided else ""
        parted = f"{path.name}: preferred answers are good: {sum(good)}, others bad: {len(good) - sum(good)}{left}"
        said = (pairs.said, cut_said(path, pairs.dropped, pairs.truncated), parted)
        return Judged(tuple(judged), good, None, tuple(filter(None, said)))
    rated = load_rated(path, tokenizer, max_tokens=max_tokens, overlong=overlong, columns=columns)
    lowest, highest = min(one.bounds[0] for one in rated.rated), max(one.bounds[1] for one in rated.rated)
    if above is None:
        above = lowest / 2 + highest / 2
    kept = [one for one in rated.rated if not math.isclose(one.rating, above, rel_tol=_SAME, abs_tol=_SAME)]
    good = tuple(one.rating > above for one in kept)
    if not any(good) or all(good):
        raise DataError(
            f"{path}: ratings are from {lowest:g} to {highest:g}, so that with dpo.good_above at {above:g} no answer "
            f"is {'bad' if any(good) else 'good'}; both kinds are needed"
        )
    left = f", at it {len(rated.rated) - len(kept)}, which are left out" if len(kept) < len(rated.rated) else ""
    parted = f"{path.name}: ratings above {above:g} are good: {sum(good)}, below bad: {len(good) - sum(good)}{left}"
    said = (rated.said, cut_said(path, rated.dropped, rated.truncated), parted)
    answers = tuple(Answer(one.tokens, one.start, one.prompt) for one in kept)
    return Judged(answers, good, above, tuple(filter(None, said)))


def _has_ratings(path: Path, columns: Sequence[str]) -> bool:
    """Whether a file's rows are read as ratings: where they are, or may be taken, as numbers on one scale."""
    found = find(path, "pairs", "rated", columns=columns)
    return found.kind == "rated" or found.layout.startswith(ULTRAFEEDBACK)


def _of_pairs(pairs: Sequence[Pair]) -> tuple[dict[Answer, bool], int]:
    """Whether answers were preferred more often than not, and how many others were as often as not."""
    wins: Counter[Answer] = Counter()
    for pair in pairs:
        chosen, rejected = both_answers([pair])
        wins[chosen] += 1
        wins[rejected] -= 1
    judged = {answer: count > 0 for answer, count in wins.items() if count}
    return judged, len(wins) - len(judged)


def mismatched(answers: Sequence[Answer], max_tokens: int, seed: int) -> list[Answer]:
    """To each answer's prompt an answer to another prompt, drawn evenly from all of them.

    Such answers tell how far a policy has moved in general (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1).
    Where all prompts are the same, any other row's answer.
    """
    kinds = sorted(Counter(answer.prompt for answer in answers).items())
    first = dict(zip((prompt for prompt, _ in kinds), np.cumsum([0, *(count for _, count in kinds)]), strict=False))
    counts = dict(kinds)
    order = sorted(range(len(answers)), key=lambda at: answers[at].prompt)  # a prompt's answers side by side
    places = {at: place for place, at in enumerate(order)}
    generator = philox("mismatched", seed)
    found = []
    for at, answer in enumerate(answers):
        begin, count = (first[answer.prompt], counts[answer.prompt]) if len(kinds) > 1 else (places[at], 1)
        others = len(answers) - count
        drawn = int(generator.integers(others)) if others else places[at]
        other = answers[order[drawn + count if others and drawn >= begin else drawn]]
        tokens = answer.tokens[: answer.start] + other.tokens[other.start :]
        cut = max(0, len(tokens) - max_tokens)
        found.append(Answer((tokens[0], *tokens[1 + cut :]), max(1, answer.start - cut), answer.prompt))
    return found


def balance(good: Sequence[bool]) -> float:
    """The weight of a bad answer with which all bad ones weigh as much as all good ones."""
    return sum(good) / max(1, len(good) - sum(good))
