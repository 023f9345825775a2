"""Answers of which people said that they are good or bad, each by itself: from labels, ratings or pairs."""

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from mlx_ppo.data.layouts import find
from mlx_ppo.data.preferences import load_pairs, load_rated
from mlx_ppo.data.sequences import Overlong
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import DataError


class Answer(NamedTuple):
    """Prompt, answer and EOS."""

    tokens: tuple[int, ...]
    start: int  # of the answer, at least 1


class Judged(NamedTuple):
    """Answers that people found good or bad."""

    answers: tuple[Answer, ...]
    good: tuple[bool, ...]
    above: float | None  # ratings above it are good, those below bad; None where the data were pairs
    said: tuple[str, ...]  # how the file was read


def load_judged(
    path: Path,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    overlong: Overlong,
    columns: Sequence[str] = (),
    above: float | None = None,
) -> Judged:
    """Ratings above a threshold are good, those below it bad; of a pair the chosen answer is good, the other one bad.

    Args:
        path: any layout with ratings, with labels (1 and 0 as ratings), or with pairs.
        tokenizer: the model's.
        max_tokens: bound of prompt and answer; truncation keeps the first token and the last ones.
        overlong: what happens to longer ones.
        columns: names of columns, see `layouts.find`.
        above: the threshold; None: halfway between the lowest and the highest rating of the file.

    Raises:
        DataError: the file can't be read, a row is wrong, or no answer is good or none bad.
    """
    if find(path, "pairs", "rated", columns=columns).kind == "pairs":
        pairs = load_pairs(path, tokenizer, max_tokens=max_tokens, overlong=overlong, columns=columns)
        answers = [
            Answer(tokens, start)
            for pair in pairs.pairs
            for tokens, start in zip((pair.chosen, pair.rejected), pair.starts, strict=True)
        ]
        said = _said(path, pairs.said, pairs.dropped, pairs.truncated)
        return Judged(tuple(answers), (True, False) * len(pairs.pairs), None, said)
    rated = load_rated(path, tokenizer, max_tokens=max_tokens, overlong=overlong, columns=columns)
    ratings = [one.rating for one in rated.rated]
    if above is None:
        above = min(ratings) / 2 + max(ratings) / 2
    kept = [one for one in rated.rated if one.rating != above]
    good = tuple(one.rating > above for one in kept)
    if not (any(good) and not all(good)):
        raise DataError(
            f"{path}: ratings are from {min(ratings):g} to {max(ratings):g}, so that with dpo.good_above at {above:g} "
            f"no answer is {'bad' if any(good) else 'good'}; both kinds are needed"
        )
    left = f", at it {len(ratings) - len(kept)}, which are left out" if len(kept) < len(ratings) else ""
    parted = f"{path.name}: ratings above {above:g} are good: {sum(good)}, below bad: {len(good) - sum(good)}{left}"
    said = (*_said(path, rated.said, rated.dropped, rated.truncated), parted)
    return Judged(tuple(Answer(one.tokens, one.start) for one in kept), good, above, said)


def mismatched(answers: Sequence[Answer], max_tokens: int) -> list[Answer]:
    """To each answer's prompt the nearest earlier row's answer to another prompt; the first ones take the last rows'.

    Where all prompts are the same, the row before. Such answers tell how far a policy has moved in general
    (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1).
    """
    prompts = [answer.tokens[: answer.start] for answer in answers]
    other: list[int] = [at - 1 for at in range(len(answers))]
    for at in chain(range(len(answers)), range(len(answers))):  # twice: the first rows look at the last ones
        if prompts[at] == prompts[at - 1]:
            other[at] = other[at - 1] if prompts[other[at - 1]] != prompts[at] else at - 1
    found = []
    for prompt, at in zip(prompts, other, strict=True):
        tokens = prompt + answers[at].tokens[answers[at].start :]
        cut = max(0, len(tokens) - max_tokens)
        found.append(Answer((tokens[0], *tokens[1 + cut :]), max(1, len(prompt) - cut)))
    return found


def balance(good: Sequence[bool]) -> float:
    """The weight of a bad answer with which all bad ones weigh as much as all good ones."""
    return math.fsum(good) / max(1, len(good) - sum(good))


def _said(path: Path, read: str | None, dropped: int, truncated: int) -> tuple[str, ...]:
    cut = f"{path.name}: {dropped} overlong dropped, {truncated} truncated" if dropped or truncated else None
    return tuple(line for line in (read, cut) if line is not None)
