import bz2
import gzip
import json
import lzma
import os
import re

import pytest

from mlx_ppo.data.jsonl import Record, number, one_field, read_records, text_field
from mlx_ppo.errors import DataError


def test_bom_crlf_blank_lines_and_missing_last_newline_are_accepted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xc3\xa4"}\r\n{"a": null}')
    records = read_records(path)
    assert [(record.line, record.fields) for record in records] == [(1, {"a": 1}), (4, {"a": "ä"}), (5, {"a": None})]
    assert records[1].where == f"{path}:4"


def test_a_line_ends_at_a_newline_only(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": "one\u2028two\x85three"}\n{"b": 1}\n'.encode())
    assert [record.line for record in read_records(path)] == [1, 2]


def test_a_surrogate_pair_and_an_escaped_backslash_are_no_lone_surrogates(write):
    path = write(rb'{"a": "\ud83d\ude00", "b": "\\ud83d"}')
    assert read_records(path)[0].fields == {"a": "😀", "b": "\\ud83d"}


GOOD = b'{"a": 1}'


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"a": "\xff"}', "byte 16 (0xff) isn't UTF-8; save the file as UTF-8"),
        (b'{"a": 1,}', "malformed JSON at column 9 ("),
        (b'{"a": 1} {"a": 2}', "malformed JSON at column 10 (Extra data); each line must be one whole JSON object"),
        (b"{", "malformed JSON at column 2 ("),
        (b"[1]", "each line must be a JSON object, not a list; write {...}"),
        (b"null", "each line must be a JSON object, not null"),
        (b"3", "each line must be a JSON object, not a number"),
        (b'{"a": NaN}', "NaN isn't a JSON number; write a finite one"),
        (b'{"a": [-Infinity]}', "-Infinity isn't a JSON number"),
        (b'{"a": 1e999}', "the number 1e999 is too large"),
        (b'{"a": ' + b"1" * 5000 + b"}", "the number 1111111111111111111111111111111111111111… is too large"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice in one object; keep one of them"),
        (b'{"x": [{"b": 1, "b": 1}]}', "the key 'b' is given twice in one object"),
        (rb'{"b": 1, "a": ["\ud83d"]}', r"'a' has \ud83d, half of a surrogate pair; write the whole character"),
        (rb'{"\uDE00": 1}', r"'\ude00' has \ude00, half of a surrogate pair"),
        (b'{"a": ' * 100_000, "the JSON is nested too deeply"),
    ],
)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_bad_line_is_refused_by_its_place(write, bad, message, bom):
    path = write(bom + GOOD, bad, GOOD)
    with pytest.raises(DataError) as caught:
        read_records(path)
    if bom:
        message = message.replace("byte 16", "byte 19")
    assert str(caught.value).startswith(f"{path}:2: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; give it one JSON object per line"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b"\r\n \n", "the file has only blank lines"),
    ],
)
def test_a_file_without_records(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("{}")
    (tmp_path / "zzz").write_text("")
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / "promts.jsonl")
    assert str(caught.value) == f"{tmp_path}/promts.jsonl: no such file; did you mean 'prompts.jsonl'?"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / "no" / "a.jsonl")
    assert str(caught.value) == f"{tmp_path}/no/a.jsonl: no such file, nor the folder {tmp_path}/no; check the path"


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r": this is a folder; name a JSONL file$"):
        read_records(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r": this is a folder; name a file in it, like 'a\.jsonl'$"):
        read_records(tmp_path)


def test_an_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    if os.geteuid() == 0:  # root reads everything

        def denied(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("mlx_ppo.data.jsonl.open_regular", denied)
    else:
        path.chmod(0)
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value) == f"{path}: can't be read (Permission denied); check the path and its permissions"


def test_a_path_that_no_system_has(tmp_path):
    with pytest.raises(DataError, match=r"can't be read \(the path has a null character\)"):
        read_records(tmp_path / "a\0b")


@pytest.fixture
def record(tmp_path):
    def _record(**fields):
        return Record(tmp_path / "a.jsonl", 7, fields)

    return _record


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no field 'prompt'; the object is empty"),
        ({"promt": "x", "id": 1}, "no field 'prompt', only 'promt', 'id'; did you mean 'promt'?"),
        ({"zzz": "x"}, "no field 'prompt', only 'zzz'; rename or add it"),
        ({f"f{n}": 1 for n in range(9)}, "no field 'prompt', only 'f0', 'f1', 'f2', 'f3', 'f4', 'f5', 'f6', 'f7' and"),
        ({"prompt": 5}, "'prompt' must be a string, not a number; put it in double quotes"),
        ({"prompt": None}, "'prompt' must be a string, not null"),
        ({"prompt": {}}, "'prompt' must be a string, not an object"),
        ({"prompt": " \n"}, "'prompt' is empty; give it a text or remove the line"),
    ],
)
def test_text_field_errors(record, fields, message):
    bad = record(**fields)
    with pytest.raises(DataError) as caught:
        text_field(bad, "prompt")
    assert str(caught.value).startswith(f"{bad.path}:7: {message}")


def test_text_field(record):
    assert text_field(record(a=" x "), "a") == " x "
    assert text_field(record(a=""), "a", allow_empty=True) == ""


def test_one_field(record):
    assert one_field(record(b=1), "a", "b") == "b"
    with pytest.raises(DataError, match=r":7: both 'a' and 'b' are given; keep one of them$"):
        one_field(record(b=1, a=1), "a", "b")
    with pytest.raises(DataError, match=r":7: no field 'text' or 'completion', only 'txt'; did you mean 'txt'\?$"):
        one_field(record(txt=1), "text", "completion")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "'rating' must be a number, not true"),
        ("3", "'rating' must be a number, not a string; write it without quotes"),
        (None, "'rating' must be a number, not null"),
        (float("nan"), "'rating' is too large for float32"),
        (1e300, "'rating' is too large for float32"),
        (10**400, "'rating' is too large for float32"),
    ],
)
def test_number_errors(value, message):
    with pytest.raises(DataError) as caught:
        number(value, "rating", "a.jsonl:3")
    assert str(caught.value).startswith(f"a.jsonl:3: {message}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b'{"a": 1}', mtime=0), "compressed by gzip; unpack it"),
        (bz2.compress(b'{"a": 1}'), "compressed by bzip2; unpack it"),
        (lzma.compress(b'{"a": 1}'), "compressed by xz; unpack it"),
        (b"\x28\xb5\x2f\xfd\x04", "compressed by zstd; unpack it"),
        (b"PK\x03\x04abc", "a zip archive"),
        (b"PAR1\x15\x04PAR1", "a binary Parquet file; write its rows as JSONL"),
        (b"ARROW1\0\0", "a binary Arrow file"),
        (b"SQLite format 3\0", "a binary SQLite database"),
        ('{"a": 1}'.encode("utf-16"), "text in UTF-16; save it as UTF-8"),
    ],
)
def test_other_kinds_of_files_are_called_what_they_are(tmp_path, content, words):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"d.jsonl: this is {words}")):
        read_records(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("line", "mend"),
    [
        ({"a": None}, "not null; give it a text or remove the line"),
        ({"a": 3}, "not a number; put it in double quotes"),
        ({"a": ["x"]}, "not a list; write it as one text"),
        ({"conversations": []}, "turn ShareGPT's turns into 'messages'"),
    ],
)
def test_the_mend_fits_what_is_there(tmp_path, line, mend):
    (tmp_path / "d.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=re.escape(mend)):
        text_field(read_records(tmp_path / "d.jsonl")[0], "a")
