from pathlib import Path

import pytest

from mlx_ppo.data.judgements import Answer, balance, load_judged, mismatched
from mlx_ppo.data.preferences import load_rated
from mlx_ppo.errors import DataError

LAYOUTS = Path(__file__).parent / "layouts"
USER = {"role": "user", "content": "hi"}


def judged_of(path, tokenizer, **given):
    return load_judged(path, tokenizer, **({"max_tokens": 64, "overlong": "truncate"} | given))


def told(found, tokenizer):
    return [
        (tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[start:]), good)
        for (tokens, start, _), good in zip(found.answers, found.good, strict=True)
    ]


def test_ratings_labels_and_pairs_are_answers_that_are_good_or_bad(write, tokenizer):
    ratings = write(
        {"prompt": "a", "completion": "b", "rating": 1},
        {"prompt": [USER], "completion": "yo", "ratings": [4, 6]},
        {"text": "plain", "rating": 4},
    )
    found = judged_of(ratings, tokenizer)
    assert told(found, tokenizer) == [("a", "b", False), ("u:hi|a:", "yo|", True), ("", "plain", True)]
    assert found.above == 3.5 and "ratings above 3.5 are good: 2, below bad: 1" in found.said[-1]
    labels = write(
        {"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": False}
    )
    assert judged_of(labels, tokenizer).good == (True, False) and judged_of(labels, tokenizer).above == 0.5
    pairs = write({"prompt": "a", "chosen": "b", "rejected": ""})
    found = judged_of(pairs, tokenizer)
    assert told(found, tokenizer) == [("a", "b", True), ("a", "", False)] and found.above is None


def test_a_threshold_leaves_out_what_is_at_it_and_needs_both_kinds(write, tokenizer):
    path = write(*({"text": text, "rating": rating} for text, rating in (("a", 1), ("b", 2), ("c", 3))))
    found = judged_of(path, tokenizer)
    assert found.good == (False, True) and "at it 1, which are left out" in found.said[-1]
    assert judged_of(path, tokenizer, above=1.5).good == (False, True, True)
    for above, kind in ((3.5, "good"), (0.0, "bad")):
        with pytest.raises(
            DataError, match=f"from 1 to 3, so that with dpo.good_above at {above:g} no answer is {kind}"
        ):
            judged_of(path, tokenizer, above=above)


def test_what_is_too_long_is_cut_at_its_beginning_and_the_answer_is_still_found(write, tokenizer):
    path = write(
        {"prompt": "abcdef", "completion": "gh", "rating": 1}, {"prompt": "a", "completion": "b" * 9, "rating": 0}
    )
    found = judged_of(path, tokenizer, max_tokens=6)
    assert told(found, tokenizer) == [("ef", "gh", True), ("", "bbbb", False)]
    assert "0 overlong dropped, 2 truncated" in found.said[0]


def row(prompt, answer):
    return Answer((0, *prompt, *answer), 1 + len(prompt), str(prompt))


def test_mismatched_answers_are_drawn_evenly_from_those_to_other_prompts():
    answers = [row([prompt], [10 * prompt + at]) for prompt in (1, 2, 3) for at in (0, 1)]
    drawn = {answer.tokens: set() for answer in answers}
    for seed in range(60):
        found = mismatched(answers, 99, seed)
        assert found == mismatched(answers, 99, seed)
        for own, other in zip(answers, found, strict=True):
            assert other.tokens[:2] == own.tokens[:2] and other.start == own.start and other.prompt == own.prompt
            drawn[own.tokens].add(other.tokens[2])
    for own, others in drawn.items():
        assert others == {answer.tokens[2] for answer in answers if answer.tokens[1] != own[1]}


def test_of_pairs_both_kinds_of_answers_are_drawn_and_where_all_prompts_are_the_same_any_other_row():
    pairs = [row([number], [kind]) for number in range(200) for kind in (1000, 2000)]
    found = mismatched(pairs, 99, 0)
    assert 150 < sum(answer.tokens[2] == 1000 for answer in found) < 250
    same = [row([1], [number]) for number in range(5)]
    assert all(own.tokens != other.tokens for own, other in zip(same, mismatched(same, 99, 0), strict=True))
    assert mismatched(same[:1], 99, 0) == same[:1]


def test_mismatched_answers_keep_the_bound_on_tokens_and_a_prompt_that_was_cut_is_the_same():
    answers = [row([1, 2, 3], [10]), row([4], [11, 12, 13])]
    found = mismatched(answers, 5, 0)
    assert found[0] == Answer((0, 3, 11, 12, 13), 2, "[1, 2, 3]") and found[1] == row([4], [10])
    assert mismatched(answers, 3, 0)[0] == Answer((0, 12, 13), 1, "[1, 2, 3]")
    cut = [Answer((0, 3, 10), 2, "long"), Answer((0, 10, 11), 1, "long"), Answer((0, 7, 8), 2, "other")]
    assert all(mismatched(cut, 9, seed)[0].tokens[2:] == (8,) for seed in range(9))


def test_layouts_with_ratings_and_pairs_are_read_as_ratings(tokenizer):
    path = LAYOUTS / "ultrafeedback.jsonl"
    found, rated = judged_of(path, tokenizer), load_rated(path, tokenizer, max_tokens=64, overlong="truncate")
    assert 2 <= len(found.answers) <= len(rated.rated) and found.above is not None
    assert "every two answers" not in found.said[0]


def test_of_rankings_answers_are_good_that_are_preferred_more_often_than_not(write, tokenizer):
    rows = [{"prompt": "a", "completions": ["b", "c", "d"], "ranks": [1, 2, 3]}]
    rows += [{"prompt": prompt, "completions": ["b", "c"], "ranks": [1, 2]} for prompt in "xyz"]
    found = judged_of(write(*rows), tokenizer)
    assert told(found, tokenizer) == [
        ("a", "b", True), ("a", "d", False), *((p, c, c == "b") for p in "xyz" for c in "bc"),
    ]  # fmt: skip
    assert "good: 4, others bad: 4, as often as not: 1, which are left out" in found.said[-1]
    circle = write({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "c", "rejected": "b"})
    with pytest.raises(DataError, match="as often as not, so that none is good or bad"):
        judged_of(circle, tokenizer)


def test_errors_are_those_of_ratings_where_the_layout_is_of_ratings(tokenizer):
    with pytest.raises(DataError, match="are ratings; leave only one of them in the export"):
        judged_of(LAYOUTS / "argilla-two-ratings.json", tokenizer)


def test_a_prompt_is_the_same_however_much_of_it_was_cut(write, tokenizer):
    ask = "q" * 50
    ratings = write(*({"prompt": ask, "completion": "c" * n, "rating": n} for n in (3, 9)))
    pairs = write({"prompt": ask, "chosen": "c" * 3, "rejected": "d" * 9})
    for path in (ratings, pairs):
        first, second = judged_of(path, tokenizer, max_tokens=20).answers
        assert first.prompt == second.prompt != "" and first.tokens[:3] == second.tokens[:3]
        assert first.start != second.start
    texts = write({"prompt": "a", "text": "b", "rating": 1}, {"prompt": "c", "text": "d", "rating": 2})
    assert {answer.prompt for answer in judged_of(texts, tokenizer).answers} == {""}


def test_halfway_is_between_single_ratings_and_rounding_makes_no_difference(write, tokenizer):
    path = write(
        {"text": "a", "ratings": [1, 1]}, {"text": "b", "ratings": [1, 0]}, {"text": "c", "ratings": [0.0, 0.0]},
        {"text": "d", "ratings": [0.1] * 3 + [0.9] * 3},
    )  # fmt: skip
    found = judged_of(path, tokenizer)
    assert found.above == 0.5 and found.good == (True, False)
    tenths = write(*({"text": text, "ratings": [0.1] * count} for text, count in (("a", 1), ("b", 3), ("c", 6))))
    with pytest.raises(DataError, match="no answer is good"):
        judged_of(tenths, tokenizer)


def test_balance():
    assert balance([True, True, True, False]) == 3 and balance([True, False]) == 1
