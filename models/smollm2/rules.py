"""A rule as a reward: answer in at most two sentences, and end with a question."""

import re

_SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"')\]]*\s*|[^.!?]+$")


def sentences(text: str) -> list[str]:
    """The sentences of a text, by their final marks; a rest without one counts as a sentence."""
    return [found.strip() for found in _SENTENCE.findall(text) if found.strip(" \n\"')]")]


def short_and_asking(prompts: list[str], completions: list[str]) -> list[float]:
    """One number for each completion: 1 for one or two sentences, less for every further one; 1 more for a question.

    A text that is only a question of a few words gets nothing for it: somebody who asks must have said something.
    """
    scores = []
    for text in completions:
        found = sentences(text)
        brief = 1.0 - 0.5 * max(0, len(found) - 2) if found else -1.0
        asks = text.rstrip(" \n\"')").endswith("?") and len(text.split()) >= 6
        scores.append(max(brief, -1.0) + (1.0 if asks else 0.0))
    return scores
