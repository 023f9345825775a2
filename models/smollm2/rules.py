"""A rule as a reward: answer in at most two sentences, and end with a question."""

import re

_FEWEST_WORDS = 8
_SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"')\]]*\s*|[^.!?]+$")


def sentences(text: str) -> list[str]:
    """The sentences of a text, by their final marks; a rest without one counts as a sentence."""
    return [found.strip() for found in _SENTENCE.findall(text) if found.strip(" \n\"')]")]


def short_and_asking(prompts: list[str], completions: list[str]) -> list[float]:
    """One number for each completion, at most 2.5.

    1 for one or two sentences, half a point less for every further one. For a question 0.5, and 1 more where the text
    ends with it: without the first step there is nothing to learn from, since the model hardly ever does the second.
    A text of fewer than eight words gets -1, because saying nothing is the easiest way to be brief.
    """
    scores = []
    for text in completions:
        if len(text.split()) < _FEWEST_WORDS:
            scores.append(-1.0)
            continue
        brief = max(-1.0, 1.0 - 0.5 * max(0, len(sentences(text)) - 2))
        asks = 1.5 if text.rstrip(" \n\"')").endswith("?") else 0.5 if "?" in text else 0.0
        scores.append(brief + asks)
    return scores
