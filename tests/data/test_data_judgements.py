import pytest

from mlx_ppo.data.judgements import Answer, balance, load_judged, mismatched
from mlx_ppo.errors import DataError

USER = {"role": "user", "content": "hi"}


def judged_of(path, tokenizer, **given):
    return load_judged(path, tokenizer, **({"max_tokens": 64, "overlong": "truncate"} | given))


def told(found, tokenizer):
    return [
        (tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[start:]), good)
        for (tokens, start), good in zip(found.answers, found.good, strict=True)
    ]


def test_ratings_labels_and_pairs_are_answers_that_are_good_or_bad(write, tokenizer):
    ratings = write(
        {"prompt": "a", "completion": "b", "rating": 1},
        {"prompt": [USER], "completion": "yo", "ratings": [4, 5]},
        {"text": "plain", "rating": 3},
    )
    found = judged_of(ratings, tokenizer)
    assert told(found, tokenizer) == [("a", "b", False), ("u:hi|a:", "yo|", True), ("", "plain", True)]
    assert found.above == 2.75 and "ratings above 2.75 are good: 2, below bad: 1" in found.said[-1]
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
    return Answer((0, *prompt, *answer), 1 + len(prompt))


def test_mismatched_answers_are_the_nearest_earlier_ones_to_another_prompt():
    answers = [row([1], [10]), row([1], [11]), row([2], [12]), row([2], [13, 14]), row([1], [15]), row([1], [16])]
    found = [list(one.tokens) for one in mismatched(answers, 99)]
    assert found == [[0, 1, 13, 14], [0, 1, 13, 14], [0, 2, 11], [0, 2, 11], [0, 1, 13, 14], [0, 1, 13, 14]]
    assert all(one.start == 2 for one in mismatched(answers, 99))
    same = [row([1], [10]), row([1], [11])]
    assert [list(one.tokens) for one in mismatched(same, 99)] == [[0, 1, 11], [0, 1, 10]]
    assert mismatched([row([1], [10])], 99) == [row([1], [10])]


def test_mismatched_answers_keep_the_bound_on_tokens():
    answers = [row([1, 2, 3], [10]), row([4], [11, 12, 13])]
    found = mismatched(answers, 5)
    assert found[0] == Answer((0, 3, 11, 12, 13), 2) and found[1] == row([4], [10])
    assert mismatched(answers, 3)[0] == Answer((0, 12, 13), 1)


def test_balance():
    assert balance([True, True, True, False]) == 3 and balance([True, False]) == 1
