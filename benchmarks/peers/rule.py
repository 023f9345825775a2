"""Rewards that every side computes alike."""

import functools
from typing import Any


def score(prompts: list[str], completions: list[str]) -> list[float]:
    """Ten times the share of a completion's letters that are an "s"."""
    return [10.0 * _share(completion.lower()) for completion in completions]


def sentiment(prompts: list[str], completions: list[str]) -> list[float]:
    """Four times VADER's compound score, which is from -1 to 1."""
    return [4.0 * _vader().polarity_scores(completion)["compound"] for completion in completions]


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def _share(text: str) -> float:
    letters = [character for character in text if character.isalpha()]
    return sum(character == "s" for character in letters) / max(1, len(letters))
