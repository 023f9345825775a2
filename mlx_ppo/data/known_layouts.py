"""Layouts of rows that other tools write: by what each is recognised, and what a row of it gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from mlx_ppo.data import exports, rankings
from mlx_ppo.data.dialogues import (
    Row,
    UnusableError,
    asked,
    hh_turns,
    is_hh,
    is_turns,
    pair_of_chats,
    strings,
    text,
    turn,
    turns,
)

ULTRAFEEDBACK = "ultrafeedback by "  # a score
Kind = Literal["pairs", "rated", "rankings", "examples", "prompts"]
NATIVE = ("prompt", "text", "messages", "completion", "chosen", "rating", "ratings")  # names that the readers take


@dataclass(frozen=True)
class Layout:
    """Rows as one tool writes them."""

    name: str
    fits: Callable[[Row], bool]
    rows: Mapping[Kind, Callable[[Row], list[Row]]]  # what a row gives; the first kind is what the layout is for
    merge: bool = False  # rows about the same text are one
    note: str = ""


def _hh(row: Row) -> list[Row]:
    return [pair_of_chats(hh_turns(text(row, "chosen")), hh_turns(text(row, "rejected")))]


def _chats(row: Row) -> list[Row]:
    scores = row.get("score_chosen"), row.get("score_rejected")
    if rankings.finite(scores[0]) and scores[0] == scores[1]:
        return []
    chosen, rejected = turns(row["chosen"], "chosen"), turns(row["rejected"], "rejected")
    prompt = row.get("prompt")
    if is_turns(prompt):
        begins = turns(prompt, "prompt")
        chosen, rejected = (one if one[: len(begins)] == begins else [*begins, *one] for one in (chosen, rejected))
    elif isinstance(prompt, str) and not any(prompt.strip() == one["content"].strip() for one in chosen):
        if len(chosen) == len(rejected) == 1:
            raise UnusableError("'prompt' is a text and the answers are messages; write it as messages as well")
        raise UnusableError("'prompt' isn't one of the messages of 'chosen'; remove the one that is wrong")
    return [pair_of_chats(chosen, rejected)]


def _are_chats(row: Row) -> bool:
    if not (is_turns(row.get("chosen")) and is_turns(row.get("rejected"))):
        return False
    ours = isinstance(row.get("prompt"), list) and all(
        len(row[name]) == 1 and "role" in row[name][0] for name in ("chosen", "rejected")
    )
    return not ours


def _sharegpt_pair(row: Row) -> list[Row]:
    begins = turns(row["conversations"], "conversations")
    sides = [[*begins, turn(row[name], f"'{name}'")] for name in ("chosen", "rejected")]
    return [pair_of_chats(sides[0], sides[1])]


def _openai_pair(row: Row) -> list[Row]:
    begins = turns(row["input"]["messages"], "input.messages")
    sides = [[*begins, *turns(row.get(name), name)] for name in ("preferred_output", "non_preferred_output")]
    return [pair_of_chats(sides[0], sides[1])]


def _sharegpt(row: Row) -> list[Row]:
    name = "conversations" if "conversations" in row else "messages"
    messages = [*asked(("system", row.get("system"))), *turns(row[name], name)]
    if messages[-1]["role"] != "assistant":
        raise UnusableError(f"'{name}' ends with a message of the {messages[-1]['role']}; remove it or the row")
    return [{"messages": messages}]


def _instructed(row: Row) -> list[dict[str, str]]:
    """Alpaca's or Dolly's prompt: the history, then instruction and input with a blank line between."""
    given = row.get("input", row.get("context"))
    asks = text(row, "instruction") + (f"\n\n{given}" if isinstance(given, str) and given.strip() else "")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(old, list) and len(old) == 2 for old in history):
        raise UnusableError("'history' must be a list of [question, answer]")
    earlier = [message for old in history for message in (("user", old[0]), ("assistant", old[1]))]
    return asked(("system", row.get("system")), *earlier, ("user", asks))


def _pair(prompt: Callable[[Row], Any], row: Row) -> list[Row]:
    return [{"prompt": prompt(row), "chosen": text(row, "chosen"), "rejected": text(row, "rejected")}]


def _example(prompt: Callable[[Row], Any], answer: str, row: Row) -> list[Row]:
    return [{"prompt": prompt(row), "completion": text(row, answer)}]


def _question(row: Row) -> list[dict[str, str]]:
    return asked(("system", row.get("system")), ("user", text(row, "question")))


def _kto(row: Row, *, only_good: bool) -> list[Row]:
    answered = {"prompt": row["prompt"], "completion": row["completion"]}
    if only_good:
        return [answered] if row["label"] else []
    return [answered | {"rating": 1 if row["label"] else 0}]


def _shp(row: Row) -> list[Row]:
    if row["labels"] not in (0, 1):
        raise UnusableError("'labels' must be 1, where A is better, or 0, where B is")
    better, worse = ("A", "B") if row["labels"] == 1 else ("B", "A")
    prompt = asked(("user", text(row, "history")))
    return [{"prompt": prompt, "chosen": text(row, f"human_ref_{better}"), "rejected": text(row, f"human_ref_{worse}")}]


def _ranked(read: Callable[[Row], rankings.Ranked]) -> dict[Kind, Callable[[Row], list[Row]]]:
    return {
        "pairs": lambda row: rankings.all_pairs(read(row)),
        "rated": lambda row: rankings.all_rated(read(row)),
        "rankings": lambda row: rankings.one_ranking(read(row)),
    }


def _rated(row: Row, names: Sequence[str]) -> list[Row]:
    ratings = [row[name] for name in names if row[name] not in (None, "")]
    if not all(rankings.finite(value) for value in ratings):
        raise UnusableError(f"{', '.join(map(repr, names))} must be numbers, or empty")
    kept = {name: row[name] for name in ("prompt", "completion", "text") if name in row}
    return [kept | {"ratings": ratings}] if ratings else []


def _helpsteer(row: Row) -> list[Row]:
    if not rankings.finite(row["helpfulness"]):
        raise UnusableError("'helpfulness' must be a number")
    return [{"prompt": rankings.prompt_of(row), "completion": text(row, "response"), "rating": row["helpfulness"]}]


def _shareable(row: Row) -> bool:
    messages = row.get("messages")
    return is_turns(row.get("conversations")) or (is_turns(messages) and any("from" in item for item in messages or ()))


def _without(row: Row, *names: str) -> bool:
    return not any(name in row for name in names)


def _has_options(row: Row) -> bool:
    return "prompt" in row and "completion" in row and isinstance(row.get("label"), bool)


def _is_openai_pair(row: Row) -> bool:
    given = row.get("input")
    return isinstance(given, dict) and is_turns(given.get("messages")) and "preferred_output" in row


def _is_rated_by(row: Row) -> bool:
    return exports.by_raters(row) or bool(exports.side_by_side(row))


def _by_people(row: Row) -> list[Row]:
    return _rated(row, exports.side_by_side(row) or ["rating"])


_SCORES = ("overall_score", "fine-grained_score", "rating", "score")

LAYOUTS: tuple[Layout, ...] = (  # the first that fits
    Layout(
        "argilla",
        exports.is_argilla,
        {
            "rated": exports.argilla_rated,
            "pairs": exports.argilla_pairs,
            "rankings": partial(exports.argilla_pairs, of_ranking=rankings.one_ranking),
        },
    ),
    Layout(
        "label studio",
        exports.is_label_studio,
        {"rated": exports.label_studio_rated, "pairs": exports.label_studio_pairs},
    ),
    *(
        Layout(
            f"{ULTRAFEEDBACK}{score}",
            partial(rankings.is_ultrafeedback, score=score),
            _ranked(rankings.ultrafeedback(score)),
            note="every two answers whose scores differ",
        )
        for score in _SCORES
    ),
    Layout("nectar", rankings.is_nectar, _ranked(rankings.nectar), note="every two answers whose ranks differ"),
    Layout(
        "answers in a list",
        lambda row: rankings.listed(row) is not None,
        _ranked(rankings.answers_in_lists),
        note="every two answers that aren't equally good",
    ),
    Layout("arena", rankings.is_arena, {"pairs": rankings.arena}, note="ties are left out"),
    Layout(
        "shp", lambda row: strings(row, "history", "human_ref_A", "human_ref_B") and "labels" in row, {"pairs": _shp}
    ),
    Layout("openai preferences", _is_openai_pair, {"pairs": _openai_pair}),
    Layout(
        "sharegpt preferences",
        lambda row: (
            is_turns(row.get("conversations")) and all(isinstance(row.get(n), dict) for n in ("chosen", "rejected"))
        ),
        {"pairs": _sharegpt_pair},
    ),
    Layout("sharegpt", lambda row: _shareable(row) and _without(row, "chosen"), {"examples": _sharegpt}),
    Layout(
        "ultrafeedback binarised",
        lambda row: _are_chats(row) and "score_chosen" in row,
        {"pairs": _chats},
        note="ties are left out",
    ),
    Layout("chats with a common beginning", _are_chats, {"pairs": _chats}),
    Layout(
        "hh dialogues",
        lambda row: is_hh(row.get("chosen")) and is_hh(row.get("rejected")) and _without(row, "prompt"),
        {"pairs": _hh},
    ),
    Layout(
        "kto",
        _has_options,
        {"rated": partial(_kto, only_good=False), "examples": partial(_kto, only_good=True)},
        note="label true is the rating 1, false 0; `sft` imitates only the true ones",
    ),
    Layout(
        "helpsteer by helpfulness",
        lambda row: "helpfulness" in row and strings(row, "prompt", "response"),
        {"rated": _helpsteer},
    ),
    Layout("ratings by several people", _is_rated_by, {"rated": _by_people}, merge=True),
    Layout(
        "alpaca preferences",
        lambda row: strings(row, "instruction", "chosen", "rejected") and _without(row, "prompt"),
        {"pairs": partial(_pair, _instructed)},
    ),
    Layout(
        "question with chosen and rejected",
        lambda row: strings(row, "question", "chosen", "rejected") and _without(row, "prompt"),
        {"pairs": partial(_pair, _question)},
    ),
    Layout(
        "alpaca",
        lambda row: strings(row, "instruction", "output") and _without(row, *NATIVE),
        {"examples": partial(_example, _instructed, "output")},
    ),
    Layout(
        "dolly",
        lambda row: strings(row, "instruction", "response") and _without(row, *NATIVE),
        {"examples": partial(_example, _instructed, "response")},
    ),
    Layout(
        "question and answer",
        lambda row: strings(row, "question", "answer") and _without(row, *NATIVE),
        {"examples": partial(_example, _question, "answer")},
    ),
)
