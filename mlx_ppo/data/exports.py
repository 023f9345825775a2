"""What people said in Argilla and in Label Studio, as rows of ratings, of pairs or of rankings."""

from collections.abc import Callable, Iterable
from typing import Any

from mlx_ppo.data.chat import Messages
from mlx_ppo.data.dialogues import Row, UnusableError
from mlx_ppo.data.rankings import Ranked, all_pairs, finite, prompt_of

_PROMPTS = ("prompt", "instruction", "question")
_ANSWERS = ("completion", "response", "answer", "output", "text")
_TWO = [
    (f"{name}{first}", f"{name}{second}")
    for name in ("answer", "response", "completion", "text")
    for first, second in (("1", "2"), ("_1", "_2"), ("-1", "-2"), ("_a", "_b"), ("A", "B"))
]
_LEFT_RIGHT = {"left": 0, "right": 1}


def is_argilla(row: Row) -> bool:
    """Whether a row is a record of Argilla's export, nested or flat."""
    nested = isinstance(row.get("fields"), dict) and isinstance(row.get("responses"), dict)
    return nested or any(name.endswith(".responses") for name in row)


def _argilla(row: Row) -> tuple[Row, dict[str, list[Any]]]:
    """The shown fields, and for each question what was submitted."""
    if isinstance(row.get("fields"), dict) and isinstance(row.get("responses"), dict):
        questions = {
            name: [item.get("value") for item in said if item.get("status") in (None, "submitted")]
            for name, said in row["responses"].items()
            if isinstance(said, list) and all(isinstance(item, dict) for item in said)
        }
        return {**row["fields"], **{name: row[name] for name in (*_PROMPTS, *_ANSWERS) if name in row}}, questions
    questions = {}
    for name, said in row.items():
        if name.endswith(".responses") and isinstance(said, list):
            status = row.get(f"{name}.status")
            states = status if isinstance(status, list) and len(status) == len(said) else ["submitted"] * len(said)
            questions[name.removesuffix(".responses")] = [
                value for value, state in zip(said, states, strict=True) if state == "submitted"
            ]
    return {name: value for name, value in row.items() if isinstance(value, str)}, questions


def argilla_rated(row: Row) -> list[Row]:
    """A row with the ratings of all who answered; none where nobody rated."""
    fields, questions = _argilla(row)
    rated = {name: said for name, said in questions.items() if said and all(finite(value) for value in said)}
    if len(rated) > 1:
        names = " and ".join(repr(name) for name in rated)
        raise UnusableError(f"{names} are ratings; leave only one of them in the export")
    return [_answered(fields) | {"ratings": said} for said in rated.values()]


def argilla_pairs(row: Row, of_ranking: Callable[[Ranked], list[Row]] = all_pairs) -> list[Row]:
    """A pair for each who preferred one of two fields; for each who ranked them all pairs, or what `of_ranking` gives.

    Beside rankings, a preference is a ranking of two.
    """
    fields, questions = _argilla(row)
    texts = {name: value for name, value in fields.items() if isinstance(value, str) and name not in _PROMPTS}
    found: list[Row] = []
    for said in questions.values():
        for value in said:
            if isinstance(value, str) and value in texts and len(texts) == 2:
                other = next(name for name in texts if name != value)
                found.append({"prompt": _prompt(fields), "chosen": texts[value], "rejected": texts[other]})
            elif _is_ranking(value, texts):
                answers, ranks = [texts[item["value"]] for item in value], [-float(item["rank"]) for item in value]
                found += of_ranking((_prompt(fields), answers, ranks))
    return found


def _is_ranking(value: Any, texts: Row) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(item, dict) and finite(item.get("rank")) for item in value)
        and all(isinstance(item.get("value"), str) and item["value"] in texts for item in value)
    )


def _prompt(fields: Row) -> str | Messages:
    name = next((name for name in _PROMPTS if name in fields), None)
    if name is None:
        raise UnusableError("there is no field 'prompt', 'instruction' or 'question'; map one to 'prompt'")
    return prompt_of({"prompt": fields[name]})


def _answered(fields: Row) -> Row:
    """The rated text, after its prompt where there is one."""
    names = [name for name in _ANSWERS if isinstance(fields.get(name), str)]
    names = ["completion"] if "completion" in names else names
    if len(names) != 1:
        seen = " and ".join(repr(name) for name in names) or "none"
        raise UnusableError(
            f"one field must be the rated text ({', '.join(_ANSWERS)}), here {seen}; map one to 'completion'"
        )
    if any(name in fields for name in _PROMPTS):
        return {"prompt": _prompt(fields), "completion": fields[names[0]]}
    return {"text": fields[names[0]]}


def is_label_studio(row: Row) -> bool:
    """Whether a row is a task of Label Studio's JSON export."""
    return isinstance(row.get("data"), dict) and isinstance(row.get("annotations"), list)


def _results(row: Row) -> Iterable[tuple[str, Row, Row]]:
    """Type, value and whole of each result that wasn't cancelled."""
    for annotation in row["annotations"]:
        if not isinstance(annotation, dict) or annotation.get("was_cancelled") is True:
            continue
        results = annotation.get("result")
        for result in results if isinstance(results, list) else ():
            if isinstance(result, dict) and isinstance(result.get("value"), dict):
                yield str(result.get("type", "")), result["value"], result


def label_studio_rated(row: Row) -> list[Row]:
    """A row with the ratings of all annotators; none where nobody rated."""
    found: dict[str, list[float]] = {}
    for kind, value, result in _results(row):
        if kind in ("rating", "number") and finite(value.get(kind)):
            found.setdefault(str(result.get("from_name", kind)), []).append(value[kind])
    if len(found) > 1:
        raise UnusableError(f"{' and '.join(map(repr, found))} are ratings; leave only one of them in the export")
    return [_answered(_shown(row)) | {"ratings": said} for said in found.values()]


def label_studio_pairs(row: Row) -> list[Row]:
    """A pair for each annotator who chose the left or the right text."""
    found = []
    for kind, value, result in _results(row):
        side = _LEFT_RIGHT.get(str(value.get("selected")))
        if kind == "pairwise" and side is not None:
            data = _shown(row)
            both = _two(data, str(result.get("to_name", "")))
            found.append({"prompt": _prompt(data), "chosen": data[both[side]], "rejected": data[both[1 - side]]})
    return found


def _shown(row: Row) -> Row:
    return {**row["data"], **{name: row[name] for name in (*_PROMPTS, *_ANSWERS) if name in row}}


def _two(data: Row, to_name: str) -> tuple[str, str]:
    """Names of the left and the right text."""
    named = tuple(name.strip() for name in to_name.split(","))
    candidates = [(named[0], named[1])] if len(named) == 2 else []
    texts = {name for name, value in data.items() if isinstance(value, str)}
    for both in (*candidates, *_TWO, ("left", "right")):
        if texts.issuperset(both):
            return both
    raise UnusableError("which texts were left and right isn't said; name them 'answer1' and 'answer2' in the data")


def by_raters(row: Row) -> bool:
    """Whether a rated row says who rated it: several rows then are one text with several ratings."""
    return "rating" in row and ("text" in row or "completion" in row) and any(name in row for name in RATERS)


RATERS = ("rater", "rater_id", "annotator", "annotator_id", "worker_id")


def side_by_side(row: Row) -> list[str]:
    """Names of columns rating_1, rating_2 and so on of a rated row."""
    names = [name for name in row if name.startswith("rating_") and name[7:].isascii() and name[7:].isdigit()]
    return names if len(names) > 1 and ("text" in row or "completion" in row) else []
