"""What is asked next, and what the answers become."""

import json
from pathlib import Path

from mlx_ppo.data.jsonl import read_records
from mlx_ppo.studio.feedback import feedback, write_rows
from mlx_ppo.studio.labels import Answers
from mlx_ppo.studio.questions import AGAIN, REPEAT_EVERY, Question, Set, agreement, pace, verdict_on


def a_set(folder: Path, count: int, name: str = "round-1", by: tuple[str, str] = ("m", "m")) -> Set:
    rows = [
        {"id": f"{n:06}", "prompt": f"p{n}", "shown": f"p{n}", "a": f" a{n}", "b": f" b{n}",
         "cut": {"a": False, "b": True}, "by": dict(zip("ab", by, strict=True))}
        for n in range(count)
    ]  # fmt: skip
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Set(folder / f"{name}.jsonl")


def answered(
    asked: Set, answers: Answers, count: int, verdict: str = "left", mode: str = "pair", **values
) -> list[str]:
    names = []
    for _ in range(count):
        question = asked.next(mode, answers.standing(), "t", 7, None)
        assert question is not None
        given = values or {"verdict": verdict}
        answers.add({**question.kept(), "tab": "t", "seconds": 2.0, **given})
        names.append(question.id)
    return names


def test_the_order_and_the_sides_are_random_and_the_seed_repeats_them(tmp_path: Path) -> None:
    asked = a_set(tmp_path, 40)
    first = [asked.next("pair", {}, f"tab {n}", 7, None) for n in range(40)]
    again = [a_set(tmp_path, 40).next("pair", {}, "t", 7, None)]
    assert first[0] == again[0]
    assert sorted(q.id for q in first) != [q.id for q in first] and len({q.id for q in first}) == 40
    assert 10 <= sum(q.swapped for q in first) <= 30
    other = [a_set(tmp_path, 40).next("pair", {}, "t", seed, None).id for seed in range(10)]
    assert len(set(other)) > 3


def test_nothing_shown_says_which_model_wrote_it(tmp_path: Path) -> None:
    question = a_set(tmp_path, 1, by=("old", "new")).next("pair", {}, "t", 7, None)
    assert "old" not in json.dumps(question.shown()) and "new" not in json.dumps(question.shown())
    kept = question.kept()
    assert {kept["left"].strip()[0]: kept["left_by"], kept["right"].strip()[0]: kept["right_by"]} == {
        "a": "old",
        "b": "new",
    }
    cut = question.shown()["cut"]
    assert cut == {"left": kept["left_by"] == "new", "right": kept["right_by"] == "new"}


def test_two_tabs_are_asked_different_questions_and_a_reload_the_same(tmp_path: Path) -> None:
    asked = a_set(tmp_path, 3)
    names = [asked.next("pair", {}, tab, 7, None).id for tab in ("t", "u", "t", "u", "v")]
    assert names[0] == names[2] != names[1] == names[3] and names[4] not in names[:4]
    assert asked.next("pair", {}, "w", 7, None) is None


def test_some_questions_come_again_with_their_sides_turned(tmp_path: Path) -> None:
    asked, answers = a_set(tmp_path, 60), Answers(tmp_path)
    names = answered(asked, answers, 45)
    again = [name for name in names if name.endswith(AGAIN)]
    assert len(again) == 45 // (REPEAT_EVERY + 1)
    for name in again:
        first = name.removesuffix(AGAIN)
        assert names.index(name) - names.index(first) > 8
        assert asked.find(name, 7).swapped != asked.find(first, 7).swapped
    assert agreement(answers.standing()) == (len(again), 0)  # always left: never the same text
    assert pace(answers.standing()) == 30.0


def test_another_order_can_be_put_in_place_of_the_random_one(tmp_path: Path) -> None:
    asked, answers = a_set(tmp_path, 5), Answers(tmp_path)
    question = asked.next("pair", answers.standing(), "t", 7, lambda pairs: max(pairs, key=lambda pair: pair["id"]))
    assert question.id == "pair:round-1/000004"


def test_reward_and_sft_read_what_the_answers_become(tmp_path: Path) -> None:
    asked, answers = a_set(tmp_path, 100), Answers(tmp_path)
    for verdict, count in (("left", 30), ("right", 5), ("tie", 3), ("bad", 2), ("skip", 4)):
        answered(asked, answers, count, verdict)
    answered(asked, answers, 12, mode="rating", rating=-4)
    answered(asked, answers, 1, mode="rating", verdict="skip")
    answered(asked, answers, 1, mode="rewrite", better=" typed")
    standing = answers.standing()
    again = sum(name.endswith(AGAIN) for name in standing)
    found = feedback(standing, ["round-1"])
    assert feedback(standing, ["round-2"]) == ([], [], [], [], [])
    lost = sum(row["verdict"] in ("left", "right") for name, row in standing.items() if name.endswith(AGAIN))
    assert len(found.pairs) + len(found.held_out) == 35 - lost + 1 and again >= lost > 0
    assert 0 < len(found.held_out) < 20
    assert not {row["prompt"] for row in found.pairs} & {row["prompt"] for row in found.held_out}
    for row in standing.values():
        if row.get("verdict") == "right" and not row["question"].endswith(AGAIN):
            expected = {"prompt": row["prompt"], "chosen": row["right"], "rejected": row["left"]}
            assert expected in [*found.pairs, *found.held_out]
    assert len(found.ratings) + len(found.held_out_ratings) == 12
    (example,) = found.examples
    assert example["completion"] == " typed"
    typed = [row for row in [*found.pairs, *found.held_out] if row["chosen"] == " typed"]
    assert len(typed) == 1 and typed[0]["rejected"].strip()[0] in "ab"
    path = write_rows(tmp_path / "x.jsonl", found.pairs)
    assert [record.fields for record in read_records(path)] == found.pairs
    assert write_rows(path, []) is None and not path.exists()


def test_what_is_held_out_stays_so_and_no_prompt_is_on_both_sides() -> None:
    base = {"kind": "pair", "set": "s", "left": "a", "right": "b", "verdict": "left"}
    rows = {str(n): {**base, "prompt": f"p{n // 2}"} for n in range(200)}
    every, part = feedback(rows, ["s"]), feedback(dict(list(rows.items())[:60]), ["s"])
    sides = [{row["prompt"] for row in side} for side in (every.pairs, every.held_out)]
    assert not sides[0] & sides[1] and 10 <= len(sides[1]) <= 30
    assert {row["prompt"] for row in part.held_out} == sides[1] & {f"p{n}" for n in range(30)}


def test_wins_are_counted_for_the_model_whatever_its_side() -> None:
    base = {"left_by": "old", "right_by": "new"}
    verdicts = {"left": 0.0, "right": 1.0, "tie": 0.5, "bad": 0.5, "skip": None}
    for verdict, value in verdicts.items():
        assert verdict_on({**base, "verdict": verdict}, "new") == value
    assert verdict_on({"left_by": "new", "right_by": "old", "verdict": "left"}, "new") == 1.0


def test_no_text_acts_on_the_page_that_asks(tmp_path: Path) -> None:
    """An override of the direction of writing could show one answer as another; it is shown, and kept as written."""
    texts = {"prompt": "p", "shown": "a\u202eb", "a": " \u202ex\x1b[1m", "b": " y"}
    pair = {"id": "1", **texts, "by": {"a": "m", "b": "m"},
            "cut": {"a": False, "b": False}}  # fmt: skip
    question = Question("pair:s/1", "pair", {**pair, "set": "s"}, False)
    assert (question.shown()["prompt"], question.shown()["left"]) == ("a\\u202eb", " \\u202ex\\x1b[1m")
    assert question.kept()["left"] == pair["a"]
    assert question._replace(mode="rating").shown()["completion"] == " \\u202ex\\x1b[1m"
    assert question._replace(mode="rewrite").shown()["completion"] == pair["a"]
