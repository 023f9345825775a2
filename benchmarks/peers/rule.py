"""Rewards that every side computes alike."""

from functools import cache
from typing import Any


def score(prompts: list[str], completions: list[str]) -> list[float]:
    """Ten times the share of a completion's letters that are an "s"."""
    return [10.0 * _share(completion.lower()) for completion in completions]


def _share(text: str) -> float:
    letters = [character for character in text if character.isalpha()]
    return sum(character == "s" for character in letters) / max(1, len(letters))


def sentiment(prompts: list[str], completions: list[str]) -> list[float]:
    """Three times VADER's compound sentiment of a completion (Hutto and Gilbert 2014): from -3 to 3."""
    return [3.0 * _analyser().polarity_scores(completion)["compound"] for completion in completions]


@cache
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
