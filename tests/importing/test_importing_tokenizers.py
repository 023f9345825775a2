"""Tokenizers built from a GGUF file's vocabulary."""

import gguf_models as tiny
import pytest
from tokenizers import Tokenizer

from mlx_ppo.errors import ModelError
from mlx_ppo.importing.convert import import_model
from mlx_ppo.models.load import load_trunk

TEXT = "the in a <|im_end|> 12345 I'LL  don't\n\n\tété 日本 🙂"


def imported(path, **flags):
    tiny.write_model(path / "m.gguf", **flags)
    import_model(path / "m.gguf", path / "out")
    return Tokenizer.from_file(str(path / "out" / "tokenizer.json")), load_trunk(path / "out").tokenizer


def words(tokenizer, text):
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "numbers", "capitals"),
    [
        ("gpt-2", ["Ġ12345"], ["I", "'", "LL"]),
        ("smollm", ["Ġ", "1", "2", "3", "4", "5"], ["I", "'", "LL"]),
        ("llama-bpe", ["Ġ", "123", "45"], ["I", "'LL"]),
        ("qwen2", ["Ġ", "1", "2", "3", "4", "5"], ["I", "'LL"]),
        ("default", ["Ġ", "123", "45"], ["I", "'", "LL"]),
    ],
)
def test_byte_level(tmp_path, pre, numbers, capitals):
    raw, loaded = imported(tmp_path, pre=pre)
    assert words(raw, " 12345") == numbers and words(raw, "I'LL") == capitals
    tokens = loaded.encode(TEXT, bos=True)
    assert tokens == raw.encode(TEXT).ids and raw.decode(tokens[tokens[0] == 1 :], skip_special_tokens=False) == TEXT
    assert tokens.count(2) == 1 and loaded.eos_ids == {0, 2} and loaded.eos_id == 2
    assert (tokens[0] == 1) is (pre == "llama-bpe")  # which llama.cpp gives a BOS unless told not to


def test_bos_as_the_file_says(tmp_path):
    assert imported(tmp_path, add_bos=True)[1].encode("the", bos=True)[0] == 1


def test_unknown_kinds_are_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match="the pre-tokenizer 'tekken' can't be imported; gpt-2, smollm"):
        imported(tmp_path, pre="tekken")
    with pytest.raises(ModelError, match="the tokenizer 'bert' can't be imported; gpt2, llama, t5 can"):
        imported(tmp_path, tokenizer=tiny.pieces, model="bert")


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_pieces(tmp_path, model):
    flags = {"add_bos_token": True, "add_eos_token": False}
    raw, loaded = imported(tmp_path, tokenizer=tiny.pieces, model=model, **flags)
    tokens = loaded.encode("the in é", bos=True)
    names = [raw.id_to_token(token) for token in tokens]
    if model == "llama":  # merges; a unigram model would rather have the letters here, whose scores sum to more
        assert names == ["<s>", "▁the", "▁", "in", "▁", "<0xC3>", "<0xA9>"]
    assert names[0] == "<s>" and names[-2:] == ["<0xC3>", "<0xA9>"]
    assert loaded.decode(tokens) == "the in é" and loaded.eos_ids == {2}


def test_no_space_is_put_before_a_text_where_the_file_says_so(tmp_path):
    raw, _ = imported(tmp_path, tokenizer=tiny.pieces, add_space_prefix=False)
    assert raw.encode("the", add_special_tokens=False).tokens == ["the"]
    assert raw.decode(raw.encode(" the").ids) == " the"


def test_companions(tmp_path):
    imported(tmp_path)
    config = tiny.json_of(tmp_path / "out" / "tokenizer_config.json")
    assert config["eos_token"] == "<|im_end|>" and "messages" in config["chat_template"]
    assert tiny.json_of(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [2, 0]
