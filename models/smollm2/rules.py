"""A rule as a reward: answer in at most two sentences, and end with a question."""

import re

_FEWEST_WORDS = 8
_SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"')\]]*\s*|[^.!?]+$")


def sentences(text: str) -> list[str]:
    """The sentences of a text, by their final marks; a rest without one counts as a sentence."""
    return [found.strip() for found in _SENTENCE.findall(text) if found.strip(" \n\"')]")]


def short_and_asking(prompts: list[str], completions: list[str]) -> list[float]:
    """One number for each completion, from -1 to 2.

    -1 without a question. With one, 1 for one or two sentences, half a point less for every further one; and 1 more
    where the text ends with the question, half a point where it stands elsewhere.

    Brevity alone earns nothing: a model that seldom asks would learn to be brief and never find the question. Nor do
    fewer than eight words, which say nothing.
    """
    scores = []
    for text in completions:
        if "?" not in text or len(text.split()) < _FEWEST_WORDS:
            scores.append(-1.0)
            continue
        brief = max(-1.0, 1.0 - 0.5 * max(0, len(sentences(text)) - 2))
        scores.append(brief + (1.0 if text.rstrip(" \n\"')").endswith("?") else 0.5))
    return scores
