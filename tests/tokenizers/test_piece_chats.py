"""Chats of folders that have only a SentencePiece `tokenizer.model`, and their GGUF files."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer

from mlx_ppo.data.prompts import load_prompts
from mlx_ppo.errors import ModelError
from mlx_ppo.exporting.gguf_writer import gguf_content, write_gguf
from mlx_ppo.exporting.modelfile import modelfile
from mlx_ppo.importing.convert import import_model
from mlx_ppo.models.folder import check_model_folder
from mlx_ppo.models.load import load_trunk
from mlx_ppo.tokenizers.load import FolderTokenizer, load_tokenizer
from mlx_ppo.tokenizers.piece_model import read_piece_model
from mlx_ppo.tokenizers.piece_tokenizer import PieceTokenizer

REVIEWS = Path(__file__).resolve().parents[2] / "models/reviews"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}<<SYS>>{{ m.content }}<</SYS>>\n"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the film, naïve 好"},
    {"role": "assistant", "content": "it is  good"},
    {"role": "user", "content": "why <unk> not?"},
]
TEXTS = ["the film is a good film and the story is good", "it was not a bad story", "very very good: user assistant"]
ADDED = {300: "<|im_start|>", 301: "<|im_end|>", 302: "<|note|>"}
MakeFolder = Callable[..., Path]


def settings(**more: Any) -> str:
    return json.dumps({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **more})


@pytest.fixture
def folder(tmp_path: Path) -> MakeFolder:
    """The bundled tokenizer with one of its two forms and a chat template."""

    def make(form: str, **more: Any) -> Path:
        target = tmp_path / form
        target.mkdir()
        shutil.copyfile(REVIEWS / form, target / form)
        given = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **more}
        (target / "tokenizer_config.json").write_text(settings(**given))
        return target

    return make


def rewritten(path: Path, *, legacy: bool) -> None:
    """tokenizer.json with tokens added, and a space before each part, as transformers converts such a folder to."""
    document = json.loads((path / "tokenizer.json").read_text())
    if legacy:
        marks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        document["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, marks]}
        document["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_special_tokens([AddedToken("<|assistant|>", special=True, rstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<<SYS>>", special=False, normalized=False)])
    tokenizer.save(str(path / "tokenizer.json"))


@pytest.mark.parametrize("legacy", [True, False, None])
def test_chats_are_the_same_tokens_as_of_the_folders_tokenizer_json(legacy: bool | None, folder: MakeFolder) -> None:
    whole = folder("tokenizer.json")
    rewritten(whole, legacy=legacy is not False)
    fast = load_tokenizer(whole, {"eos_token_id": 2})
    assert isinstance(fast, FolderTokenizer)
    first = fast.vocab_size - 2
    decoder = {
        str(first): {"content": "<|assistant|>", "special": True, "rstrip": True, "lstrip": False},
        str(first + 1): {"content": "<<SYS>>", "special": False},
    }
    keys: dict[str, Any] = {"added_tokens_decoder": decoder}
    pieces = load_tokenizer(
        folder("tokenizer.model", **keys, **({} if legacy is None else {"legacy": legacy})), {"eos_token_id": 2}
    )
    assert isinstance(pieces, PieceTokenizer) and pieces.has_chat_template
    assert pieces.vocab_size == fast.vocab_size
    for ask in (True, False):
        for chat in (TALK[1:2], TALK, TALK[:2]):
            text = pieces.chat_text(chat, add_generation_prompt=ask)
            assert text == fast.chat_text(chat, add_generation_prompt=ask)
            tokens = pieces.render_chat(chat, add_generation_prompt=ask)
            assert tokens == fast.render_chat(chat, add_generation_prompt=ask)
            assert tokens[0] == 1 and (tokens[-1] == first) == ask
    for text in ("a <<SYS>> b<|assistant|>  c", "</s> a", "x<s>", "<<SYS>>", ""):
        for bos in (True, False):
            tokens = fast.encode(text, bos=bos)
            assert pieces.encode(text, bos=bos) == tokens
            assert pieces.decode(tokens) == fast.decode(tokens)


def test_a_template_file_counts_before_the_settings(folder: MakeFolder) -> None:
    path = folder("tokenizer.model")
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
    tokenizer = load_tokenizer(path, {})
    assert isinstance(tokenizer, PieceTokenizer)
    assert tokenizer.chat_text(TALK, add_generation_prompt=True) == "be brief"


def test_without_a_template_there_is_none(folder: MakeFolder) -> None:
    tokenizer = load_tokenizer(folder("tokenizer.model", chat_template=None), {})
    assert not tokenizer.has_chat_template
    with pytest.raises(ModelError, match="no chat template"):
        tokenizer.render_chat(TALK, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("added_tokens.json", '{"<|a|>": -1}', "added_tokens.json: the added token '<|a|>' with the id '-1' is malf"),
        ("added_tokens.json", '{"<|a|>": 1e3}', "the added token '<|a|>' with the id '1000.0'"),
        ("added_tokens.json", '{"": 3}', "the added token '' with the id '3'"),
        ("added_tokens.json", "[]", "added_tokens.json: not a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "the added token 'a' with the"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9": {"content": 5}}}', "the added token '5' with the id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "'added_tokens_decoder' in tokenizer_config.json"),
        ("tokenizer_config.json", '{"bos_token": 5}', "'bos_token' must be a text, not '5'"),
        ("tokenizer_config.json", '{"chat_template": {"a": "b"}}', "several chat templates ('a') and no 'default' one"),
    ],
)
def test_malformed_files_are_one_line(file: str, content: str, words: str, folder: MakeFolder) -> None:
    path = folder("tokenizer.model")
    (path / file).write_text(content)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(path, {})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_model_is_read_as_the_library_reads_it() -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(REVIEWS / "tokenizer.model"))
    content = pieces.serialized_model_proto()
    model = read_piece_model(content)
    assert len(model.pieces) == pieces.vocab_size() and (model.kind, model.adds_space) == ("unigram", True)
    for index, (text, score, kind) in enumerate(model.pieces):
        assert (text, score) == (pieces.id_to_piece(index), pieces.get_score(index))
        flags = (pieces.is_unknown(index), pieces.is_control(index), pieces.is_unused(index), pieces.is_byte(index))
        assert flags == (kind == 2, kind == 3, kind == 5, kind == 6)
    for size in (len(content) - 1, 20, 1):
        with pytest.raises(ValueError, match="cut off"):
            read_piece_model(content[:size])


@pytest.fixture
def chat_model(make_model: Callable[..., Path], tmp_path: Path) -> MakeFolder:
    """A tiny model with a tokenizer.model of its own, tokens that are added to it, and a ChatML template."""

    def make(kind: str) -> Path:
        target = tmp_path / f"{kind} model"
        shutil.copytree(make_model(), target)
        (target / "tokenizer.json").unlink()
        content = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 20), model_writer=content, model_type=kind, vocab_size=300,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            hard_vocab_limit=False, minloglevel=2, num_threads=1,
        )  # fmt: skip
        (target / "tokenizer.model").write_bytes(content.getvalue())
        rows = {str(index): {"content": text, "special": index < 302} for index, text in ADDED.items()}
        (target / "tokenizer_config.json").write_text(settings(eos_token="<|im_end|>", added_tokens_decoder=rows))
        (target / "chat_template.jinja").write_text(CHATML)
        return target

    return make


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_gguf_file_holds_tokenizer_and_template(kind: str, chat_model: MakeFolder, tmp_path: Path) -> None:
    path = chat_model(kind)
    trunk = load_trunk(path)
    own = trunk.tokenizer
    assert isinstance(own, PieceTokenizer) and (own.eos_id, own.eos_ids) == (301, {2, 301})
    content = gguf_content(check_model_folder(path), own, trunk.base, name="a", dtype="f16")
    write_gguf(tmp_path / "a.gguf", content)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    found = {key.removeprefix("tokenizer."): field.contents() for key, field in reader.fields.items()}
    assert found["chat_template"] == CHATML
    assert found["ggml.model"] == {"bpe": "llama", "unigram": "t5"}[kind] and found["ggml.add_space_prefix"] is True
    tokens, scores, types = (found[f"ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    size = pieces.vocab_size()
    assert len(tokens) == len(scores) == len(types) == 304
    same = [index for index in range(size) if tokens[index] == pieces.id_to_piece(index)]
    assert set(range(259, size)) <= set(same) and (kind == "unigram" or len(same) == size)
    assert all(scores[index] == pytest.approx(pieces.get_score(index)) for index in same)
    assert [tokens[index] for index in ADDED] == list(ADDED.values()) and [types[i] for i in ADDED] == [3, 3, 4]
    assert types[:3] == [2, 3, 3] and types[303] == 5 and tokens[303] == "[PAD303]"
    ids = {key.removeprefix("ggml."): value for key, value in found.items() if key.endswith("token_id")}
    assert ids == {"eos_token_id": 301, "bos_token_id": 1, "unknown_token_id": 0, "eot_token_id": 2}
    assert found["ggml.add_bos_token"] is True
    assert modelfile("a.gguf", own, temperature=1.0).endswith(
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ else }}{{ end }}'
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        '<|im_start|>assistant\n"""\nPARAMETER temperature 1\nPARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\n'
    )


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_gguf_file_comes_back_as_a_folder_with_the_same_chats(
    kind: str, chat_model: MakeFolder, tmp_path: Path
) -> None:
    path = chat_model(kind)
    trunk = load_trunk(path)
    write_gguf(
        tmp_path / "a.gguf", gguf_content(check_model_folder(path), trunk.tokenizer, trunk.base, name="a", dtype="f16")
    )
    import_model(tmp_path / "a.gguf", tmp_path / "back")
    back = load_tokenizer(tmp_path / "back", {"eos_token_id": [2, 301]})
    chat = [row | {"content": text} for row, text in zip(TALK[:2], ("be good", "the film is it"), strict=True)]
    assert back.eos_ids == trunk.tokenizer.eos_ids and back.has_chat_template
    for text in TEXTS:
        assert back.encode(text, bos=True) == trunk.tokenizer.encode(text, bos=True)
    for ask in (True, False):
        tokens = trunk.tokenizer.render_chat(chat, add_generation_prompt=ask)
        assert tokens.count(300) == 2 + ask and tokens.count(301) == 2
        assert back.decode(tokens) == trunk.tokenizer.decode(tokens)
        found = back.render_chat(chat, add_generation_prompt=ask)
        assert [t for t in found if t in ADDED] == [t for t in tokens if t in ADDED]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "char", "byte_fallback": False}, "this kind of SentencePiece model can't be said in GGUF"),
        ({"normalization_rule_name": "nmt_nfkc"}, "this normalisation of tokenizer.model can't be said in GGUF"),
        ({"remove_extra_whitespaces": True}, "this normalisation of tokenizer.model can't be said in GGUF"),
        ({"byte_fallback": False}, "a tokenizer.model without bytes isn't written as GGUF"),
    ],
)
def test_what_gguf_cannot_say_is_refused(options: dict[str, Any], words: str, chat_model: MakeFolder) -> None:
    path = chat_model("bpe")
    given: dict[str, Any] = {
        "model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1,
    }  # fmt: skip
    size = {"vocab_size": 60} if options.get("byte_fallback") is False else {}
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=content, **{**given, **size, **options}
    )
    (path / "tokenizer.model").write_bytes(content.getvalue())
    trunk = load_trunk(path)
    with pytest.raises(ModelError, match=words):
        gguf_content(check_model_folder(path), trunk.tokenizer, trunk.base, name="a", dtype="f16")


def test_prompts_of_such_a_folder(chat_model: MakeFolder, tmp_path: Path) -> None:
    tokenizer = load_trunk(chat_model("bpe")).tokenizer
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": TALK[:2]}) + "\n" + json.dumps({"prompt": "the film"}) + "\n")
    chat, plain = load_prompts(file, tokenizer, max_tokens=200, overlong="error").prompts
    assert list(chat.tokens) == tokenizer.render_chat(TALK[:2], add_generation_prompt=True)
    assert chat.tokens[0] == 300 and chat.tokens.count(301) == 2 and plain.tokens[0] == 1
