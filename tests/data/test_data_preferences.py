import numpy as np
import pytest

from mlx_ppo.data.preferences import derive_pairs, load_pairs, load_rated
from mlx_ppo.errors import DataError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def pairs_of(path, tokenizer, max_tokens=64, overlong="error"):
    return load_pairs(path, tokenizer, max_tokens=max_tokens, overlong=overlong)


def rated_of(path, tokenizer, max_tokens=64, overlong="error"):
    return load_rated(path, tokenizer, max_tokens=max_tokens, overlong=overlong)


def test_pairs_in_each_format(write, tokenizer):
    path = write(
        PAIR,
        PAIR | {"margin": 2, "rejected": ""},
        {"prompt": [USER], "chosen": "b", "rejected": [ASSISTANT]},
        {"prompt": [USER], "chosen": [ASSISTANT | {"content": ""}], "rejected": "c"},
    )
    pairs = pairs_of(path, tokenizer).pairs
    assert [(tokenizer.decode(pair.chosen), tokenizer.decode(pair.rejected), pair.margin) for pair in pairs] == [
        ("ab", "ac", 0.0),
        ("ab", "a", 2.0),
        ("u:hi|a:b|", "u:hi|a:yo|", 0.0),
        ("u:hi|a:|", "u:hi|a:c|", 0.0),
    ]
    for pair in pairs:
        assert (pair.chosen[0], pair.chosen[-1], pair.rejected[0], pair.rejected[-1]) == (1, 2, 1, 2)
    assert pairs[3].where == f"{path}:4"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (PAIR | {"rejected": "b"}, "'chosen' and 'rejected' are the same; remove the line"),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": "yo"}, "'chosen' and 'rejected' are the same"),
        ({"chosen": "b", "rejected": "c"}, "no field 'prompt', only 'chosen', 'rejected'"),
        ({"prompt": "a", "chosen": "b", "reject": "c"}, "no field 'rejected', only 'prompt', 'chosen', 'reject'; did"),
        (PAIR | {"chosen": 5}, "'chosen' must be a string, not a number"),
        (PAIR | {"chosen": [ASSISTANT]}, "'chosen' is a list, so 'prompt' must be a list of messages as well"),
        (PAIR | {"prompt": [USER], "rejected": [USER, ASSISTANT]}, "'rejected' must be a string or a list of one assi"),
        (PAIR | {"margin": "1"}, "'margin' must be a number, not a string"),
        (PAIR | {"margin": None}, "'margin' must be a number, not null"),
        (PAIR | {"margin": -1}, "'margin' is -1, below 0; swap 'chosen' and 'rejected' instead"),
        (PAIR | {"rejected": "c" * 70}, "73 tokens, more than data.max_tokens = 64"),
        (PAIR | {"chosen": "b" * 70}, "73 tokens, more than data.max_tokens = 64"),
    ],
)
def test_a_bad_pair_is_refused_by_its_place(write, tokenizer, line, message):
    path = write(PAIR, line)
    with pytest.raises(DataError) as caught:
        pairs_of(path, tokenizer)
    assert str(caught.value).startswith(f"{path}:2: {message}")


def test_answers_that_only_the_tokenizer_can_not_tell_apart(write, tokenizer):
    encode = tokenizer.encode
    tokenizer.encode = lambda text, bos: encode(text.lower(), bos=bos)
    with pytest.raises(DataError, match="'chosen' and 'rejected' are the same to this tokenizer"):
        pairs_of(write(PAIR | {"rejected": "B"}), tokenizer)


def test_overlong_pairs_count_once_and_keep_their_ends(write, tokenizer):
    path = write(PAIR | {"chosen": "bbbbb", "rejected": "ccccc"}, PAIR, PAIR | {"chosen": "bxxxx", "rejected": "cxxxx"})
    kept = pairs_of(path, tokenizer, max_tokens=6, overlong="drop")
    assert ([pair.where for pair in kept.pairs], kept.dropped, kept.truncated) == ([f"{path}:2"], 2, 0)
    cut = pairs_of(path, tokenizer, max_tokens=6, overlong="truncate")
    # the third pair's difference would be cut away
    assert [(tokenizer.decode(pair.chosen), tokenizer.decode(pair.rejected)) for pair in cut.pairs] == [
        ("bbbb", "cccc"),
        ("ab", "ac"),
    ]
    assert [(pair.chosen[0], pair.chosen[-1]) for pair in cut.pairs] == [(1, 2), (1, 2)]
    assert (cut.dropped, cut.truncated) == (1, 1)


def test_rated_texts_in_each_format(write, tokenizer):
    path = write(
        {"text": "abc", "rating": 3},
        {"completion": "bc", "rating": -0.5},
        {"prompt": "a", "completion": "bc", "ratings": [1, 2, 2, 3]},
        {"prompt": [USER], "completion": "", "ratings": [4]},
    )
    rated = rated_of(path, tokenizer).rated
    assert [(tokenizer.decode(row.tokens), row.rating, row.count) for row in rated] == [
        ("abc", 3.0, 1),
        ("bc", -0.5, 1),
        ("abc", 2.0, 4),
        ("u:hi|a:|", 4.0, 1),
    ]
    assert [row.spread for row in rated] == pytest.approx([0, 0, 0.5**0.5, 0])
    assert all((row.tokens[0], row.tokens[-1]) == (1, 2) for row in rated)
    assert rated[3].where == f"{path}:4"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a", "rating": NaN}', "NaN isn't a JSON number"),
        ({"text": "a", "rating": True}, "'rating' must be a number, not true"),
        ({"text": "a", "rating": "3"}, "'rating' must be a number, not a string; write it without quotes"),
        ({"text": "a", "rating": 1e300}, "'rating' is too large for float32"),
        ({"text": "a"}, "no field 'rating' or 'ratings', only 'text'"),
        ({"text": "a", "rating": 1, "ratings": [1]}, "both 'rating' and 'ratings' are given"),
        ({"text": "a", "ratings": 3}, "'ratings' must be a list, not a number; use 'rating' for a single one"),
        ({"text": "a", "ratings": []}, "'ratings' is empty"),
        ({"text": "a", "ratings": [1, False]}, "'ratings[1]' must be a number, not false"),
        ({"text": " ", "rating": 1}, "'text' is empty"),
        ({"text": "a", "completion": "b", "rating": 1}, "both 'text' and 'completion' are given"),
        ({"completion": "", "rating": 1}, "'completion' is empty"),
        ({"rating": 1}, "no field 'text' or 'completion', only 'rating'"),
    ],
)
def test_a_bad_rating_is_refused_by_its_place(write, tokenizer, line, message):
    path = write({"text": "a", "rating": 1}, line)
    with pytest.raises(DataError) as caught:
        rated_of(path, tokenizer)
    assert str(caught.value).startswith(f"{path}:2: {message}")


def test_overlong_rated_texts_keep_their_end(write, tokenizer):
    cut = rated_of(write({"text": "abcdef", "rating": 1}), tokenizer, max_tokens=4, overlong="truncate")
    assert (cut.rated[0].tokens, cut.dropped, cut.truncated) == ((1, 104, 105, 2), 0, 1)
    with pytest.raises(DataError, match=r"data\.jsonl: every record \(1\) is longer"):
        rated_of(write({"text": "abcdef", "rating": 1}), tokenizer, max_tokens=4, overlong="drop")


def test_derived_pairs_are_all_clear_pairs_when_many_are_drawn():
    ratings = np.random.default_rng(0).integers(0, 17, size=30) / 4
    pairs = derive_pairs(ratings.tolist(), min_difference=1.5, per_item=2000, seed=1)
    clear = {(a, b) for a in range(30) for b in range(30) if ratings[a] - ratings[b] >= 1.5}
    assert {tuple(pair) for pair in pairs.tolist()} == clear
    assert len(pairs) == len(clear)
    assert pairs.dtype == np.int64


def test_derived_pairs_are_as_many_as_asked_and_even():
    ratings = np.random.default_rng(0).normal(size=4000)
    pairs = derive_pairs(ratings.tolist(), min_difference=1.0, per_item=3, seed=1)
    assert 0.98 * 3 * 4000 < len(pairs) <= 3 * 4000
    assert (ratings[pairs[:, 0]] - ratings[pairs[:, 1]] >= 1.0).all()
    # the top item's partners are drawn evenly: their mean is that of all eligible, to within 5 standard errors
    top = int(ratings.argmax())
    many = derive_pairs([*ratings.tolist()], min_difference=1.0, per_item=200, seed=2)
    lower = ratings[many[many[:, 0] == top, 1]]
    eligible = ratings[ratings <= ratings[top] - 1.0]
    assert abs(lower.mean() - eligible.mean()) < 5 * eligible.std() / len(lower) ** 0.5


def test_derived_pairs_depend_on_the_seed_only():
    ratings = [float(n % 13) for n in range(100)]
    first, again, other = (derive_pairs(ratings, min_difference=2, per_item=2, seed=seed) for seed in (5, 5, 6))
    assert (first == again).all()
    assert first.shape != other.shape or (first != other).any()


def test_items_without_partners_draw_none():
    pairs = derive_pairs([0.0, 1.0, 2.0, 3.0], min_difference=2.5, per_item=4, seed=0)
    assert pairs.tolist() == [[3, 0]]


@pytest.mark.parametrize("ratings", [[], [1.0], [1.0, 1.5, 1.2]])
def test_no_clear_pair_at_all(ratings):
    with pytest.raises(
        DataError, match=rf"no two of the {len(ratings)} ratings differ by min_difference = 1; lower it"
    ):
        derive_pairs(ratings, min_difference=1, per_item=2, seed=0)


def test_the_difference_must_be_above_zero():
    with pytest.raises(ValueError, match="min_difference"):
        derive_pairs([1.0, 2.0], min_difference=0, per_item=1, seed=0)
