"""Files in the layouts of other tools, written by hand in `layouts`: each read as it is meant, or refused by name."""

import gzip
import json
import re
import zlib
from pathlib import Path

import pytest

from mlx_ppo.data.containers import read_rows
from mlx_ppo.data.examples import load_examples
from mlx_ppo.data.layouts import find, records_as
from mlx_ppo.data.preferences import load_pairs, load_rated
from mlx_ppo.data.prompts import load_prompts
from mlx_ppo.errors import DataError

LAYOUTS = Path(__file__).with_name("layouts")
ALL = ("pairs", "rated", "examples", "prompts")


def user(*texts):
    """Messages of a user and an assistant in turn."""
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


EGG, BIRD, SHOP = "How do I boil an egg?", "Name a bird.", "Is the shop open?"
READ = {  # what the line says after the file's name, and the last row
    "hh.jsonl": ("hh dialogues: 2 pairs of chats",
        pair(user("Hi", "Hello, what can I do?", "Name a tree"), "Oak", "Trees are nice")),
    "ultrafeedback.jsonl": (
        "ultrafeedback by overall_score: 3 pairs of chats (every two answers whose scores differ)",
        pair(user("Is water wet?"), "It makes things wet.", "No.")),
    "ultrafeedback-binarised.json": (
        "ultrafeedback binarised: 1 pairs of chats, from a JSON list, 1 of 2 rows give none (ties are left out)",
        pair(user("Say hello in French."), "Bonjour.", "Hola.")),
    "kto.jsonl": (
        "kto: 3 rated texts (label true is the rating 1, false 0; `sft` imitates only the true ones)",
        {"prompt": "Where is the station?", "completion": " Behind the church.", "rating": 1}),
    "kto.csv": (
        "kto: 2 rated texts, from CSV separated by ',' "
        "(label true is the rating 1, false 0; `sft` imitates only the true ones)",
        {"prompt": SHOP, "completion": " Go and see.", "rating": 0}),
    "nectar.jsonl": ("nectar: 2 pairs of chats (every two answers whose ranks differ)",
        pair(user("Write a haiku."), "Old pond, frog, splash.", "No.")),
    "ranked-lists.jsonl": ("answers in a list: 4 pairs of texts (every two answers that aren't equally good)",
        pair("My favourite meal is", " soup.", " stone.")),
    "rated-lists.jsonl": ("answers in a list: 1 pairs of texts (every two answers that aren't equally good)",
        pair("The best season is", " spring.", " winter.")),
    "sharegpt.json": ("sharegpt: 2 chats to imitate, from a JSON list",
        {"messages": [{"role": "system", "content": "Be brief."}, *user("Hi", "Hello.")]}),
    "sharegpt-preferences.jsonl": ("sharegpt preferences: 1 pairs of chats", pair(user("Hi"), "Hello.", "What?")),
    "alpaca.json": ("alpaca: 2 chats to imitate, from a JSON list",
        {"prompt": user("Name a river."), "completion": "The Elbe."}),
    "alpaca-preferences.jsonl": ("alpaca preferences: 1 pairs of chats",
        pair(user("Name a river."), "The Elbe.", "A mountain.")),
    "dolly.jsonl": ("dolly: 1 chats to imitate",
        {"prompt": user("When was it built?\n\nThe bridge was built in 1901."), "completion": "In 1901."}),
    "gsm8k.jsonl": ("question and answer: 1 chats to imitate",
        {"prompt": user("Ann has 3 apples and buys 2. How many has she?"), "completion": "3 + 2 = 5\n#### 5"}),
    "orca-pairs.jsonl": ("question with chosen and rejected: 2 pairs of chats", pair(user(BIRD), "Wren.", "Bat.")),
    "chats-common.jsonl": ("chats with a common beginning: 2 pairs of chats",
        pair(user("Hi", "Hey", "How are you?"), "Fine.", "No.")),
    "openai-preferences.jsonl": ("openai preferences: 1 pairs of chats",
        pair(user("Is it cold?"), "A little.", "Ask later.")),
    "arena.csv": (
        "arena: 2 pairs of texts, from CSV separated by ';', 1 of 3 rows give none (ties are left out)",
        pair("Name a number.", "Seven.", "Blue.")),
    "shp.jsonl": ("shp: 1 pairs of chats",
        pair(user("How do I keep basil alive?"), "Water it from below and cut it often.", "Less sun.")),
    "helpsteer.jsonl": ("helpsteer by helpfulness: 2 rated texts",
        {"prompt": "What is yeast?", "completion": "Stuff.", "rating": 0}),
    "argilla-ratings.json": ("argilla: 2 rated texts, from a JSON list, 1 of 3 rows give none",
        {"prompt": "Name a nut.", "completion": "Bolt.", "ratings": [2]}),
    "argilla-preference.json": ("argilla: 3 pairs of texts, from a JSON list",
        pair("Name a nut.", "Bolt.", "Walnut.")),
    "argilla-ranking.json": ("argilla: 3 pairs of texts, from a JSON list",
        pair("Name a fruit.", "Tree.", "Chair.")),
    "label-studio-ratings.json": ("label studio: 2 rated texts, from a JSON list",
        {"text": "Two hours that I want back.", "ratings": [1]}),
    "label-studio-pairwise.json": ("label studio: 2 pairs of texts, from a JSON list", pair(BIRD, "Wren.", "Fork.")),
    "raters.tsv": ("ratings by several people: 2 rated texts, from CSV separated by '\\t'",
        {"text": "Dull.", "ratings": [1.0]}),
    "raters-wide.csv": ("ratings by several people: 2 rated texts, from CSV separated by ','",
        {"text": "Dull.", "ratings": [1.0, 2.0, 1.0]}),
    "pairs.csv": ("plain: 2 pairs of texts, from CSV separated by ','",
        pair("The end", " came late.", " never came.")),
    "plain-pairs.jsonl": (None, pair("The film", " was good.", " was.")),
}  # fmt: skip
REFUSED = {  # the error, after the file's name
    "hh-parted.jsonl": ":2: 'chosen' and 'rejected' part before their last message; only that may differ "
    "(one of 2 unusable rows of 3)",
    "sharegpt-tools.jsonl": ":2: 'conversations' message 2 has the role 'function_call', which no chat template takes; "
    "remove the row (one of 2 unusable rows of 3)",
    "argilla-two-ratings.json": ":1: 'style' and 'truth' are ratings; leave only one of them in the export",
    "ragged.csv": ":3: 4 cells under 3 names; quote what has ','",
    "broken.json": ":2: malformed JSON at column 32 (Expecting ',' delimiter); the file begins as a list, "
    "so it must be one whole list",
    "mixed.jsonl": ":3: the row is sharegpt, where the file is alpaca; repair or remove it "
    "(one of 2 unusable rows of 4)",
}
BY_READER = {"unknown.csv"}  # no layout: the reader says which names it wants


def test_every_file_is_read_or_refused():
    assert {*READ, *REFUSED, *BY_READER} == {path.name for path in LAYOUTS.iterdir()}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_is_recognised_and_said(tmp_path, name, packed):
    path = LAYOUTS / name
    line, last = READ[name]
    if packed:
        path = tmp_path / name
        path.write_bytes(gzip.compress((LAYOUTS / name).read_bytes()))
    records, said = records_as(path, *ALL)
    records[-1].fields.pop("source", None)  # stays in every layout
    assert records[-1].fields == last
    if not packed:
        assert said == (line and f"{name}: {line}")
    else:
        assert said is not None and ", gzip" in said


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_by_place(name):
    with pytest.raises(DataError) as caught:
        records_as(LAYOUTS / name, *ALL)
    assert str(caught.value) == f"{LAYOUTS / name}{REFUSED[name]}"


def test_unknown_names_are_not_guessed_but_can_be_mapped(tokenizer):
    with pytest.raises(DataError, match=r"unknown\.csv:2: no field 'prompt', only 'frage', 'gut', 'schlecht'; rename"):
        load_pairs(LAYOUTS / "unknown.csv", tokenizer, max_tokens=99, overlong="error")
    columns = ("prompt=frage", "chosen=gut", "rejected=schlecht")
    found = load_pairs(LAYOUTS / "unknown.csv", tokenizer, max_tokens=99, overlong="error", columns=columns)
    assert tokenizer.decode(found.pairs[0].chosen) == "Was ist das?Ein Hund."
    with pytest.raises(DataError, match=r":2: no column 'Frage', which data\.columns names, only 'frage', 'gut'"):
        records_as(LAYOUTS / "unknown.csv", "pairs", columns=("prompt=Frage",))


def test_a_column_in_an_object_can_be_mapped():
    columns = ("prompt=instruction", "completion=completions.0")
    with pytest.raises(DataError, match=r":1: no column 'completions\.0'"):
        records_as(LAYOUTS / "ultrafeedback.jsonl", "examples", columns=columns)
    columns = ("prompt=fields.prompt", "completion=fields.response")
    records, _ = records_as(LAYOUTS / "argilla-ratings.json", "rated", columns=columns)
    assert records[0].fields == {"prompt": "Name a fruit.", "completion": "Pear.", "ratings": [4, 5]}


def test_a_cell_under_another_name_is_read_as_the_name_that_it_is_given(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,stars,liked\nq,a,4,True\nq,b,1.5,false\n", "utf-8")
    how = {"max_tokens": 99, "overlong": "error"}
    assert [one.rating for one in load_rated(path, tokenizer, columns=("rating=stars",), **how).rated] == [4, 1.5]
    assert [one.rating for one in load_rated(path, tokenizer, columns=("label=liked",), **how).rated] == [1, 0]


def test_lines_are_those_on_which_rows_begin(tmp_path):
    rows = find(LAYOUTS / "alpaca.json", "examples").records
    assert [record.line for record in rows] == [2, 7]
    assert [record.line for record in find(LAYOUTS / "ultrafeedback.jsonl", "pairs").records] == [1, 1, 2]
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,chosen,rejected\r\n"two\r\nlines",a,b\r\n\r\nc,d,e\r\n')
    assert [(record.line, record.fields["prompt"]) for record in read_rows(path).records] == [
        (2, "two\r\nlines"),
        (5, "c"),
    ]


def test_the_readers_take_them(tokenizer):
    how = {"max_tokens": 999, "overlong": "error"}
    pairs = load_pairs(LAYOUTS / "hh.jsonl", tokenizer, **how)
    assert tokenizer.decode(pairs.pairs[0].chosen) == f"u:{EGG}|a:Eight minutes in boiling water.|"
    rated = load_rated(LAYOUTS / "label-studio-ratings.json", tokenizer, **how).rated
    assert [(item.rating, item.spread, item.count) for item in rated] == [(3.5, 0.5, 2), (1.0, 0.0, 1)]
    examples = load_examples(LAYOUTS / "kto.jsonl", tokenizer, **how)
    shown = [
        (tokenizer.decode(e.tokens[: e.loss_from]), tokenizer.decode(e.tokens[e.loss_from :]))
        for e in examples.examples
    ]
    assert shown == [(SHOP, " Yes, until six."), ("Where is the station?", " Behind the church.")]
    assert examples.said is not None and "1 of 3 rows give none" in examples.said
    prompts = load_prompts(LAYOUTS / "gsm8k.jsonl", tokenizer, **how).prompts
    assert prompts[0].text == "user: Ann has 3 apples and buys 2. How many has she?\nassistant: "
    assert prompts[0].record["answer"] == "3 + 2 = 5\n#### 5"
    chats = load_prompts(LAYOUTS / "sharegpt.json", tokenizer, **how).prompts
    assert chats[1].text == "system: Be brief.\nuser: Hi\nassistant: "


def test_ratings_of_several_answers_can_be_read_as_ratings():
    records, _ = records_as(LAYOUTS / "ultrafeedback.jsonl", "rated")
    assert [record.fields["rating"] for record in records] == [9.0, 3.5, 9.0, 8.0, 4.0]


def test_another_kind_than_a_command_reads_is_refused_by_name():
    with pytest.raises(DataError, match=r"alpaca\.json: this is alpaca, which gives .*, not pairs of answers$"):
        records_as(LAYOUTS / "alpaca.json", "pairs", "rated")
    with pytest.raises(
        DataError, match=r"hh\.jsonl: this is hh dialogues, which gives pairs of answers, not answers to"
    ):
        records_as(LAYOUTS / "hh.jsonl", "examples")


def test_parquet(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [json.loads(line) for line in (LAYOUTS / "chats-common.jsonl").read_text().splitlines()]
    path = tmp_path / "train-00000-of-00001.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    records, said = records_as(path, *ALL)
    assert said == f"{path.name}: chats with a common beginning: 2 pairs of chats, from Parquet"
    assert records[1].fields == READ["chats-common.jsonl"][1] and records[1].line == 2
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"the Parquet file can't be read \("):
        records_as(path, *ALL)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=re.escape("needs pyarrow; pip install 'mlx-ppo[parquet]'")):
        records_as(path, *ALL)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", "the list is empty"),
        (b"[1]", ":1: each item of the list must be an object, not a number"),
        (b'[{"a": 1}\n,\n{"a": 1, "a": 2}]', ":3: the key 'a' is given twice"),
        (b'[{"a": 1}\n{"a": 1}]', ":2: the list has no ',' or ']'"),
        (b'[{"a": 1}]\n{"a": 1}', ":2: something follows the list"),
        (b'[{"a": 1},\n{"a": "\xff"}]', ":2: byte 18 (0xff) isn't UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (rb'[{"a": "\ud83d"}]', r":1: 'a' has \ud83d, half of a surrogate pair"),
        (b'prompt,chosen\n"a', ":2: malformed CSV"),
        (b"prompt,chosen\n", "a line of names and no rows"),
        (gzip.compress(b'{"prompt": "a"}', mtime=0)[:-12], "the gzip archive is damaged"),
        (gzip.compress(b"PK\x03\x04", mtime=0), "a zip archive"),
    ],
)
def test_damaged_files(tmp_path, content, words):
    path = tmp_path / "d"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        records_as(path, *ALL)
    assert words in str(caught.value) and str(caught.value).startswith(str(path))


def test_a_packed_endless_line_is_not_unpacked(tmp_path):
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(b"".join([packer.compress(b'{"a": "' + bytes(1 << 25)), packer.flush()]))
    with pytest.raises(DataError, match="a line of more than 16 MiB"):
        records_as(path, *ALL)


@pytest.mark.parametrize("name", [name for name in READ if name.endswith((".json", ".jsonl"))])
def test_a_field_that_is_missing_or_of_another_type_is_named_by_line(tmp_path, name):
    rows = [record.fields for record in read_rows(LAYOUTS / name).records]
    path = tmp_path / "a.jsonl"
    for field in rows[0]:
        for junk in (None, True, 3, "x", [], {}, [[1]], [{"role": 1}], [{"from": "human"}], ...):
            wrong = {**rows[0], field: junk}
            if junk is ...:
                del wrong[field]
            path.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *rows, wrong)))
            try:
                records_as(path, *ALL)
            except DataError as error:
                assert str(error).startswith(f"{path}:{2 * len(rows) + 1}: ")
