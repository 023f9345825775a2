"""Texts to measure a model on: paragraphs, rows, and files that are neither."""

import json

import pytest

from mlx_ppo.data.passages import ENGLISH, load_passages
from mlx_ppo.errors import DataError


class Letters:
    """A token a letter; BOS is 1, EOS is 2."""

    eos_ids, eos_id, vocab_size, has_chat_template = frozenset({2}), 2, 300, False

    def encode(self, text, *, bos):
        return [1] * bos + [ord(letter) + 3 for letter in text]

    def decode(self, tokens):
        return "".join(chr(token - 3) for token in tokens if token > 2)


def test_paragraphs_of_a_plain_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbf\n\nab\ncd\r\n\r\n  \r\nef\n\n\n")
    found = load_passages(file, Letters())
    assert (found.parts, found.noun, found.said) == (2, "paragraphs", None)
    (passage,) = found.passages
    assert Letters().decode(passage.tokens) == "ab\ncd\n\nef" and passage.tokens[0] == 1
    assert passage.parts == (-1, *[0] * 7, 1, 1)


def test_rows_count_what_sft_learns(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "abc"}, {"prompt": "ab", "completion": "cd"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_passages(file, Letters())
    assert (found.parts, found.noun) == (2, "rows")
    assert [passage.parts for passage in found.passages] == [(-1, 0, 0, 0, 0), (-1, -1, -1, 1, 1, 1)]
    assert found.passages[1].tokens[-1] == 2


def test_the_bundled_text_has_paragraphs_enough():
    found = load_passages(ENGLISH, Letters())
    assert found.parts >= 20 and 5000 < len(found.passages[0].tokens) < 20_000
    assert ENGLISH.read_text("ascii")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b" \n\n", "has no text"),
        ("a.txt", b"", "has no text"),
        ("a.txt", b"a\n\xff", r"a.txt:2: byte 2 isn't UTF-8"),
        ("a.txt", b"a\x00b", "no plain text"),
        ("a.txt", b"\x1f\x8b123", "gzip"),
        ("a.jsonl", b"no json\n", "a.jsonl:1"),
        ("a.jsonl", b'{"prompt": "a"}\n', "a.jsonl"),
    ],
)
def test_files_that_are_no_text(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_passages(tmp_path / name, Letters())


def test_a_text_of_one_token_and_files_that_are_not_there(tmp_path):
    class Bare(Letters):
        def encode(self, text, *, bos):
            return super().encode(text, bos=False)

    (tmp_path / "a").write_text("a")
    with pytest.raises(DataError, match="no token that follows another"):
        load_passages(tmp_path / "a", Bare())
    with pytest.raises(DataError, match="no such file"):
        load_passages(tmp_path / "b", Letters())
    with pytest.raises(DataError, match="this is a folder"):
        load_passages(tmp_path, Letters())
