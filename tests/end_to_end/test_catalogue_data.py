"""The catalogue of bad data: each, under every command that reads it, ends in one line with file and line."""

import json
import os
import shutil
from collections.abc import Callable

import pytest

from mlx_ppo.tokenizers import chat_template

GOOD = {"prompt": "it was", "completion": " bad", "text": "it was", "rating": 3}
ROWS = {
    "train": {"prompt": "it was"},
    "sft": {"text": "it was"},
    "reward": {"text": "it was", "rating": 3},
    "sample": {"prompt": "it was"},
    "compare": {"prompt": "it was"},
}


@pytest.fixture
def home(project, model_folder, reward_folders):
    """A project whose model has a chat template, and a judge."""
    shutil.copytree(model_folder, project.folder / "chat")
    template(project.folder / "chat", "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}")
    shutil.copytree(reward_folders["folder"], project.folder / "judge")
    return project


def template(folder, source: str) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": source}))


def readers(project) -> dict[str, tuple[tuple[object, ...], ...]]:
    """Every command, and every key of it, that reads `bad.jsonl`."""
    model = {"path": "chat"}

    def config(job: str, key: str):
        path = project.config(job, model=model, data={key: "bad.jsonl"})
        return path.rename(path.with_name(f"{job}-{key}.toml"))

    return {
        "train": tuple(
            (job, config(job, key), *more)
            for job, key, more in (
                ("train", "prompts", ()),
                ("train", "eval_prompts", ()),
                ("train", "prompts", ("--dry-run",)),
            )
        ),
        "sft": tuple(("sft", config("sft", key)) for key in ("train", "validation")),
        "reward": tuple(("reward", config("reward", key)) for key in ("train", "validation", "test")),
        "sample": (("sample", "chat", "--prompts", "bad.jsonl"),),
        "compare": (("compare", "chat", "chat", "--reward", "judge", "--prompts", "bad.jsonl"),),
    }


def each_refuses(project, words: str, only: tuple[str, ...] = tuple(ROWS)) -> None:
    for reader, commands in readers(project).items():
        for command in commands if reader in only else ():
            shown = project.refused(3, words, *command)
            assert len(shown.splitlines()) == 1, shown


LINES: dict[str, tuple[bytes, str]] = {
    "malformed": (b'{"prompt": ', "bad.jsonl:2: malformed JSON at column"),
    "not UTF-8": (b'{"text": "\xff"}', "isn't UTF-8; save the file as UTF-8"),
    "no object": (b"[1, 2]", "bad.jsonl:2: each line must be a JSON object, not a list"),
    "two objects": (b"{} {}", "bad.jsonl:2: malformed JSON"),
    "NaN": (b'{"rating": NaN}', "bad.jsonl:2: NaN isn't a JSON number"),
    "a key twice": (b'{"text": "a", "text": "b"}', "bad.jsonl:2: the key 'text' is given twice"),
    "half a character": (rb'{"text": "\ud83d"}', r"bad.jsonl:2: 'text' has \ud83d, half of a surrogate pair"),
    "nested too deeply": (b'{"a":' * 50_000, "bad.jsonl:2: the JSON is nested too deeply"),
    "thousands of digits": (b'{"rating": ' + b"9" * 5000 + b"}", "bad.jsonl:2: the number 9999"),
    "too large a number": (b'{"rating": 1e999}', "bad.jsonl:2: the number 1e999 is too large"),
    "no field": (b'{"other": 1}', "bad.jsonl:2: no field"),
    "an empty object": (b"{}", "the object is empty"),
    "a line of 17 MB": (b'{"text": "' + b"x" * (17 << 20) + b'"}', "bad.jsonl:2: a line of more than 16 MiB"),
}


@pytest.mark.parametrize("case", LINES)
def test_a_bad_line(home, case):
    line, words = LINES[case]
    for reader, row in ROWS.items():
        (home.folder / "bad.jsonl").write_bytes(json.dumps(row).encode() + b"\n" + line + b"\n")
        each_refuses(home, words, (reader,))


FILES: dict[str, tuple[Callable[[object], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "bad.jsonl: the file is empty"),
    "a BOM alone": (lambda path: path.write_bytes(b"\xef\xbb\xbf"), "bad.jsonl: the file is empty"),
    "blank lines": (lambda path: path.write_bytes(b"\n \r\n"), "bad.jsonl: the file has only blank lines"),
    "missing": (lambda path: path.with_name("bat.jsonl").write_text("{}"), "did you mean 'bat.jsonl'"),
    "a folder": (lambda path: path.mkdir(), "bad.jsonl: this is a folder; name a JSONL file"),
    "a pipe": (lambda path: os.mkfifo(path), "bad.jsonl: can't be read (not a regular file)"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "bad.jsonl: can't be read (not a regular file)"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "bad.jsonl: can't be read (Too many levels"),
    "zeros": (lambda path: path.write_bytes(bytes(1000)), "bad.jsonl:1: malformed JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file(home, case):
    make, words = FILES[case]
    make(home.folder / "bad.jsonl")
    each_refuses(home, words)


def test_a_sparse_file_is_not_read_into_memory(home):
    with (home.folder / "big.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    (home.folder / "bad.jsonl").symlink_to("big.jsonl")
    for command in readers(home)["sample"]:
        result = home.cli(*command)
        assert result.exit_code == 3 and "bad.jsonl:1: a line of more than 16 MiB" in result.stderr


@pytest.mark.parametrize("encode", [lambda raw: b"\xef\xbb\xbf" + raw, lambda raw: raw.replace(b"\n", b"\r\n")])
def test_a_bom_and_crlf_are_accepted(home, encode):
    rows = [{**ROWS["train"], **ROWS["reward"]}, {"prompt": "bad", "text": "bad", "rating": 5}]
    (home.folder / "bad.jsonl").write_bytes(encode("".join(json.dumps(row) + "\n" for row in rows).encode()))
    for job, key in (("train", "prompts"), ("reward", "train")):
        home.done(job, home.config(job, data={key: "bad.jsonl"}), "--dry-run")
    home.done("sample", "model", "--prompts", "bad.jsonl", "--max-tokens", 2)
    (home.folder / "bad.jsonl").write_bytes(encode(b'{"text": "it was"}\n'))
    home.done("sft", home.config("sft", data={"train": "bad.jsonl"}), "--dry-run")


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


USER, ANSWER, SYSTEM = ("user", "it"), ("assistant", "was"), ("system", "be")
CHATS = {
    "an answer first": ([ANSWER, USER], "message 1 has role 'assistant' where 'user' must come"),
    "two users": ([USER, USER], "message 2 has role 'user' where 'assistant' must come"),
    "system later": ([USER, ANSWER, SYSTEM, USER], "message 3 has role 'system' where 'user' must come"),
    "a tool": ([USER, ("tool", "x")], "has role 'tool' where 'assistant' must come"),
    "an empty user": ([("user", " ")], "message 1 is empty"),
    "nobody": ([], "has no messages"),
}


@pytest.mark.parametrize("case", CHATS)
def test_a_wrong_order_of_roles(home, case):
    turns, words = CHATS[case]
    rows = {
        "train": {"messages": chat(*turns)},
        "sft": {"messages": chat(*turns)},
        "reward": {"prompt": chat(*turns), "chosen": "a", "rejected": "b"},
    }
    for reader, row in (rows | {"sample": rows["train"], "compare": rows["train"]}).items():
        (home.folder / "bad.jsonl").write_text(json.dumps(row) + "\n")
        for command in readers(home)[reader][: 1 if reader == "reward" else None]:  # its others aren't pairs
            shown = home.refused(3, words, *command)
            assert "bad.jsonl:1: '" in shown


HOSTILE = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "took longer than"),
    "grows": ("{{ 'x' * 9999999999 }}", "of memory"),
    "writes": ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "characters beyond the messages"),
    "reaches": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "can't render this conversation"),
    "refuses": ("{{ raise_exception('no \x1b[2J chats') }}", r"refuses this conversation: no \x1b[2J chats"),
    "is broken": ("{% if %}", "its chat template is broken"),
    "says nothing": ("{# #}", "writes nothing for this conversation"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_template(home, case, monkeypatch):
    source, words = HOSTILE[case]
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    monkeypatch.setattr(chat_template, "_PATIENCE", 200.0)  # the machine may be busy
    monkeypatch.setattr(chat_template, "CHARACTERS", 100_000)
    template(home.folder / "chat", source)
    rows = {"train": {"messages": chat(USER)}, "sft": {"messages": chat(USER, ANSWER)}}
    rows["reward"] = {"prompt": chat(USER), "chosen": "a", "rejected": "b"}
    for reader, row in {**rows, "sample": rows["train"]}.items():
        (home.folder / "bad.jsonl").write_text(json.dumps(row) + "\n")
        home.refused(3, words, *readers(home)[reader][0])


def test_pairs_without_a_difference(home):
    for chosen, rejected in ((" is", " is"), ("", "")):
        home.jsonl("bad.jsonl", [{"prompt": "it", "chosen": chosen, "rejected": rejected}])
        home.refused(3, "bad.jsonl:1: 'chosen' and 'rejected' are the same", *readers(home)["reward"][0])


def test_the_same_texts_in_training_and_evaluation_are_told(home):
    home.jsonl("held.jsonl", [{"prompt": "it was"}, {"prompt": "a film"}])
    config = home.config(data={"eval_prompts": "held.jsonl"})
    shown = home.done("train", config, "--dry-run")
    assert "warning: 1 of the 2 evaluation prompts are also training prompts" in shown
    home.jsonl("held.jsonl", [{"text": "a very good film", "rating": 5}, {"text": "new", "rating": 1}])
    shown = home.done("reward", home.config("reward", data={"validation": "held.jsonl"}), "--dry-run")
    assert "warning: 1 texts of held.jsonl are also training texts" in shown


def test_prompts_on_the_command_line(home):
    for prompt, words in (
        ("", "--prompt: is empty"),
        ("  ", "--prompt: is empty"),
        ("a\udcff", r"'a\udcff' isn't UTF-8"),
    ):
        home.refused(2, words, "sample", "model", "--prompt", prompt)
    home.refused(2, "give --prompt or --prompts", "sample", "model")


def test_a_bound_that_leaves_nothing(home):
    home.jsonl("bad.jsonl", [{"prompt": "the film is a very good story"}])
    config = home.config(data={"prompts": "bad.jsonl", "max_prompt_tokens": 4})
    home.refused(3, "bad.jsonl: every record (1) is longer than data.max_prompt_tokens = 4", "train", config)
