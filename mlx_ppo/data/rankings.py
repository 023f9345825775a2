"""Several answers to a prompt, rated or ranked, as rows of pairs, of ratings or of rankings."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from mlx_ppo.data.chat import Messages
from mlx_ppo.data.dialogues import (
    Row,
    UnusableError,
    asked,
    hh_turns,
    is_hh,
    is_turns,
    pair_of_chats,
    text,
    turns,
    without_answer,
)

Ranked = tuple[str | Messages, list[str], list[float]]  # prompt, answers, and of each how good it is
_LARGEST = 1e30
_TIES = {"tie", "both", "neither", "none", "tie (bothbad)", "equal", "same"}
_SIDES = {"a": 0, "model_a": 0, "response_a": 0, "left": 0, "b": 1, "model_b": 1, "response_b": 1, "right": 1}


def finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def all_pairs(ranked: Ranked) -> list[Row]:
    """Every two answers of which one is better; those that are equally good make none."""
    prompt, answers, goodness = ranked
    found = []
    for a, b in combinations(range(len(answers)), 2):
        better, worse = (a, b) if goodness[a] > goodness[b] else (b, a)
        if goodness[better] > goodness[worse] and answers[better] != answers[worse]:
            found.append({"prompt": prompt, "chosen": answers[better], "rejected": answers[worse]})
    return found


def one_ranking(ranked: Ranked) -> list[Row]:
    """All answers with how good each is, in a row as `answers_in_lists` reads it; none where none is better."""
    prompt, answers, goodness = ranked
    best: dict[str, float] = {}  # an answer that is there twice counts once, by its better place
    for answer, value in zip(answers, goodness, strict=True):
        best[answer] = max(value, best.get(answer, value))
    if len(set(best.values())) < 2:
        return []
    return [{"prompt": prompt, "answers": list(best), "scores": list(best.values())}]


def all_rated(ranked: Ranked) -> list[Row]:
    """Each answer with how good it is as its rating."""
    prompt, answers, goodness = ranked
    return [
        {"prompt": prompt, "completion": answer, "rating": value}
        for answer, value in zip(answers, goodness, strict=True)
    ]


def ultrafeedback(score: str) -> Callable[[Row], Ranked]:
    """Reads UltraFeedback's rows by one of the scores that their completions have."""

    def read(row: Row) -> Ranked:
        items = row["completions"]
        bad = next((at for at, item in enumerate(items, start=1) if not _scored(item, "response", score)), None)
        if bad is not None:
            raise UnusableError(f"completion {bad} must have a text 'response' and a number '{score}'")
        prompt = asked(("user", text(row, "instruction")))
        return prompt, [item["response"] for item in items], [float(item[score]) for item in items]

    return read


def is_ultrafeedback(row: Row, score: str) -> bool:
    """Whether a row has an instruction and completions with this score."""
    items = row.get("completions")
    return (
        isinstance(row.get("instruction"), str)
        and isinstance(items, list)
        and any(isinstance(item, dict) and "response" in item and score in item for item in items)
    )


def is_nectar(row: Row) -> bool:
    """Whether a row has a prompt and answers with ranks."""
    items = row.get("answers")
    return (
        "prompt" in row
        and isinstance(items, list)
        and any(isinstance(item, dict) and "answer" in item and "rank" in item for item in items)
    )


def nectar(row: Row) -> Ranked:
    """Answers with ranks, of which 1 is the best."""
    items = row["answers"]
    bad = next((at for at, item in enumerate(items, start=1) if not _scored(item, "answer", "rank")), None)
    if bad is not None:
        raise UnusableError(f"answer {bad} must have a text 'answer' and a number 'rank'")
    return prompt_of(row), [item["answer"] for item in items], [-float(item["rank"]) for item in items]


def _scored(item: object, answer: str, score: str) -> bool:
    return isinstance(item, dict) and isinstance(item.get(answer), str) and finite(item.get(score))


def prompt_of(row: Row) -> str | Messages:
    """The row's prompt: a text, messages, or a dialogue as HH writes it."""
    value = row.get("prompt")
    if is_hh(value):
        return without_answer(hh_turns(text(row, "prompt")))
    return turns(value, "prompt") if is_turns(value) else text(row, "prompt")


def listed(row: Row) -> tuple[str, str] | None:
    """Names of a list of answers and of the list of their ranks or ratings, if a row with a prompt has both."""
    answers = [name for name in ("completions", "responses", "answers") if isinstance(row.get(name), list)]
    marks = [name for name in ("ranks", "ranking", "ratings", "scores") if isinstance(row.get(name), list)]
    return (answers[0], marks[0]) if "prompt" in row and len(answers) == len(marks) == 1 else None


def answers_in_lists(row: Row) -> Ranked:
    """Answers in one list, their ranks (1 is the best) or ratings (more is better) in another."""
    names = listed(row)
    if names is None:
        raise UnusableError("there must be one list of answers and one of their ranks or ratings")
    answers, marks = row[names[0]], row[names[1]]
    if len(answers) != len(marks):
        raise UnusableError(
            f"'{names[0]}' has {len(answers)} items and '{names[1]}' {len(marks)}; they must be as many"
        )
    if not all(isinstance(answer, str) for answer in answers) or not all(finite(mark) for mark in marks):
        raise UnusableError(f"'{names[0]}' must have texts and '{names[1]}' numbers")
    sign = -1.0 if names[1] in ("ranks", "ranking") else 1.0
    return prompt_of(row), answers, [sign * mark for mark in marks]


def is_arena(row: Row) -> bool:
    """Whether a row has two answers or conversations, a and b, and which of them won."""
    return "winner" in row and (
        ("prompt" in row and "response_a" in row and "response_b" in row)
        or (is_turns(row.get("conversation_a")) and is_turns(row.get("conversation_b")))
    )


def arena(row: Row) -> list[Row]:
    """The winner before the other; nothing for a tie."""
    winner = row["winner"].lower() if isinstance(row["winner"], str) else ""
    if winner in _TIES:
        return []
    if winner not in _SIDES:
        raise UnusableError(
            f"'winner' is {str(row['winner'])[:40]!r}; it must be 'a', 'b', 'model_a', 'model_b' or 'tie'"
        )
    if "conversation_a" in row:
        sides: Sequence[Any] = [turns(row[name], name) for name in ("conversation_a", "conversation_b")]
        return [pair_of_chats(sides[_SIDES[winner]], sides[1 - _SIDES[winner]])]
    sides = [text(row, name) for name in ("response_a", "response_b")]
    return [{"prompt": prompt_of(row), "chosen": sides[_SIDES[winner]], "rejected": sides[1 - _SIDES[winner]]}]
