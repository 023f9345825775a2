"""Completions as a page shows them: bounded, harmless, with the words that changed."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_ppo.errors import harmless
from mlx_ppo.studio.logs import Samples

LONGEST = 1200  # characters of a text
PROMPTS = 8  # held-out prompts that are followed
EVALUATIONS = 8  # of the run
_HUGE = 1e300
_WORD = re.compile(r"\S+\s*|\s+")

Part = tuple[str, str]  # "=", "+" or "-", and the words


def shown(value: object, longest: int = LONGEST) -> str:
    """A text from a model or a file, with escapes for what would act or hide, cut where it is very long."""
    text = str(value)
    rest = len(text) - longest
    return harmless(text[:longest]) + (f" … ({rest:,} more characters)" if rest > 0 else "")


def changes(before: str, after: str) -> list[Part]:
    """A text as the words that stayed ("="), came ("+") or went ("-") since another one."""
    old, new = _WORD.findall(before), _WORD.findall(after)
    plain = [word.strip() for word in old], [word.strip() for word in new]
    parts: list[Part] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, *plain, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(("=", "".join(new[c:d])))
            continue
        parts += [("-", "".join(old[a:b]))] if b > a else []
        parts += [("+", "".join(new[c:d]))] if d > c else []
    return parts


def answers(samples: Samples, prompts: int = PROMPTS, longest: int = LONGEST) -> list[dict[str, Any]]:
    """The first held-out prompts, each with its answers over the run, every one compared with the one before it."""
    followed: list[dict[str, Any]] = []
    for step in spread(samples.evaluations, EVALUATIONS):
        for number, row in enumerate(samples.evaluation(step, prompts)):
            text, prompt = (shown(row.get(key, ""), longest) for key in ("completion", "prompt"))
            if number == len(followed):
                followed.append({"prompt": prompt, "answers": []})
            earlier = followed[number]["answers"]
            parts = changes(earlier[-1]["text"], text) if earlier else [("=", text)]
            earlier.append({"step": step, "score": _score(row), "text": text, "parts": parts})
    for prompt_of in followed:
        for answer in prompt_of["answers"]:
            del answer["text"]
    return followed


def completions(samples: Samples, step: int, longest: int = LONGEST) -> list[dict[str, Any]]:
    """The kept responses of an iteration: `kind` is best, worst, chance, or rollout (of the median score)."""
    return [_completion(row, longest) for row in samples.iteration(step)]


def _completion(row: Mapping[str, Any], longest: int) -> dict[str, Any]:
    texts = {key: shown(row.get(key, ""), longest) for key in ("kind", "prompt", "completion")}
    return {**texts, "score": _score(row)}


def _score(row: Mapping[str, Any]) -> float | None:
    score = row.get("score")
    return float(score) if isinstance(score, int | float) and abs(score) < _HUGE else None


def spread(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of the steps, evenly over them, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    if most < 2:
        return list(steps[-most:]) if most else []
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]
