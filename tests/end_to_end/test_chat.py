"""Chats through the commands: system messages, several turns, several stop tokens, and templates that misbehave."""

import json
import shutil

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from mlx_ppo.data.prompts import load_prompts
from mlx_ppo.runs.targets import load_target
from mlx_ppo.stages.rollout import Asked, Sampling, generate
from mlx_ppo.tokenizers import chat_template

START, END = 300, 301  # tokens that the tiny model's tokenizer leaves free
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}"
    "<|start|>{{ message.role }}\n{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
HANG = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SYSTEM = {"role": "system", "content": "be good"}
USER = {"role": "user", "content": "the film"}
ANSWER = {"role": "assistant", "content": "it was bad"}
AGAIN = {"role": "user", "content": "and the story"}
CHATS = (
    {"prompt": [USER], "number": 0},
    {"prompt": [SYSTEM, USER], "number": 1},
    {"messages": [USER, ANSWER, AGAIN], "number": 2},
    {"messages": [SYSTEM, USER, ANSWER, AGAIN | {"name": "kept in the record"}], "number": 3},
)
RULE = """import json, pathlib
def letters(prompts, completions, records):
    with pathlib.Path("seen.jsonl").open("a") as file:
        for row in zip(prompts, completions, records):
            file.write(json.dumps(row) + "\\n")
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def chats(project, model_folder):
    """A project whose model has a chat template, two special tokens, and three tokens that end a response."""

    def make(template=TEMPLATE):
        target = project.folder / "model"
        if target.is_symlink():
            target.unlink()
            shutil.copytree(model_folder, target)
        tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|start|>", "<|end|>")])
        assert [tokenizer.token_to_id(text) for text in ("<|start|>", "<|end|>")] == [START, END]
        tokenizer.save(str(target / "tokenizer.json"))
        settings = json.loads((target / "tokenizer_config.json").read_text())
        (target / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, END, 200]}))
        return project

    project.jsonl("prompts.jsonl", CHATS)
    (project.folder / "rule.py").write_text(RULE)
    return make


def spoken(chat):
    """What TEMPLATE makes of a chat, up to the answer, without the special tokens."""
    messages = chat.get("prompt", chat.get("messages"))
    return "".join(f"{message['role']}\n{message['content']}" for message in messages) + "assistant\n"


def shown(chat):
    """A chat as a person reads it, up to where the answer follows."""
    messages = chat.get("prompt", chat.get("messages"))
    if isinstance(messages, str):
        return messages
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant: "


def test_training_prompts_are_rendered_and_records_reach_the_reward_function(chats):
    project = chats()
    config = project.config(
        run={"iterations": 2}, data={"max_prompt_tokens": 200, "eval_count": 4, "eval_prompts": "prompts.jsonl"},
        rollout={"prompts": 4, "max_tokens": 6},
    )  # fmt: skip
    project.done("train", config)
    seen = [json.loads(line) for line in (project.folder / "seen.jsonl").read_text().splitlines()]
    assert len(seen) >= 8
    found = {record["number"]: (prompt, record) for prompt, _, record in seen}
    assert found == {chat["number"]: (spoken(chat), chat) for chat in CHATS}
    texts = {text for row in project.samples() if "completion" in row for text in [row["prompt"]]}
    assert texts and texts <= {shown(chat) for chat in CHATS}
    assert project.metrics()[-1]["step"] == 2


def test_the_tokens_are_the_templates(chats):
    project = chats()
    target = load_target(project.folder / "model")
    tokenizer = target.trunk.tokenizer
    prompts = load_prompts(project.folder / "prompts.jsonl", tokenizer, max_tokens=200, overlong="error").prompts
    for prompt, chat in zip(prompts, CHATS, strict=True):
        messages = chat.get("prompt", chat.get("messages"))
        turns = "".join(f"<|start|>{m['role']}\n{m['content']}<|end|>" for m in messages)
        assert list(prompt.tokens) == tokenizer.hf.encode(turns + "<|start|>assistant\n", add_special_tokens=False)
        assert prompt.tokens[0] == START and prompt.tokens.count(END) == len(messages)
        assert prompt.text == shown(chat) and prompt.record == chat


@pytest.fixture
def taught(chats):
    """The project after sft on two chats and a plain text, each of which ends in its own way."""
    project = chats()
    project.jsonl("texts.jsonl", [
        {"messages": [SYSTEM, USER, ANSWER, AGAIN, {"role": "assistant", "content": "very good"}]},
        {"prompt": [USER], "completion": [{"role": "assistant", "content": "is not bad"}]},
        {"prompt": "the film", "completion": " was good"},
    ])  # fmt: skip
    project.done("sft", project.config("sft", sft={"epochs": 30, "batch_size": 3}, optimizer={"learning_rate": 2e-2}))
    rows = project.metrics()
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"]
    return project


def test_sampled_answers_follow_the_whole_chat_and_end_with_either_stop_token(taught):
    project = taught
    asked = [{"messages": [SYSTEM, USER, ANSWER, AGAIN]}, {"prompt": [USER]}, {"prompt": "the film"}]
    file = project.jsonl("asked.jsonl", asked)
    written = project.done("sample", "runs/a", "--prompts", "asked.jsonl", "--temperature", 0, "--max-tokens", 20)
    assert written.split("\n\n") == [
        shown(asked[0]) + "very good", shown(asked[1]) + "is not bad", "the film was good\n",
    ]  # fmt: skip
    target = load_target(project.run())
    prompts = load_prompts(file, target.trunk.tokenizer, max_tokens=200, overlong="error").prompts
    questions = Asked([prompt.tokens for prompt in prompts], range(3), [{}] * 3)
    rollout = generate(target.trunk, target.weights, questions, Sampling((0,), 20, temperature=0.0))
    assert np.array(rollout.finished).all()
    assert [response[-1] for response in rollout.responses] == [END, END, 2]
    assert target.trunk.tokenizer.eos_ids == {2, END, 200}


def test_the_export_keeps_template_and_stop_tokens(taught):
    project = taught
    project.done("export", "runs/a", "fused", "--format", "fused")
    asked = project.jsonl("asked.jsonl", [{"prompt": [USER]}]).name
    ask = ("--prompts", asked, "--temperature", 0, "--max-tokens", 20)
    assert project.done("sample", "fused", *ask) == project.done("sample", "runs/a", *ask) != ""
    project.done("export", "runs/a", "gguf", "--format", "gguf")
    fields = gguf.GGUFReader(project.folder / "gguf/gguf.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert "PARAMETER stop" in (project.folder / "gguf/Modelfile").read_text()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"prompt": [USER, USER]},
            "'prompt' message 2 has role 'user' where 'assistant' must come; the order is system",
        ),
        ({"prompt": [USER, SYSTEM, USER]}, "'prompt' message 2 has role 'system' where 'assistant' must come"),
        ({"messages": [SYSTEM, ANSWER, USER]}, "'messages' message 2 has role 'assistant' where 'user' must come"),
        ({"messages": [USER, ANSWER]}, "'messages' ends with role 'assistant' where the last must be 'user'; remove"),
        ({"prompt": [SYSTEM]}, "'prompt' ends with role 'system' where the last must be 'user'; add the user's"),
        ({"prompt": [USER | {"role": "tool"}]}, "'prompt' message 1 has role 'tool' where 'user' must come"),
    ],
)
def test_chats_in_the_wrong_order_name_their_line(chats, row, words):
    project = chats()
    project.jsonl("prompts.jsonl", [CHATS[0], row])
    config = project.config(data={"max_prompt_tokens": 200})
    for arguments in (("train", config), ("sample", "model", "--prompts", "prompts.jsonl")):
        shown = project.refused(3, f"prompts.jsonl:2: {words}", *arguments)
        assert shown.count("\n") == 1


def test_a_template_that_refuses_a_chat_names_its_line(chats):
    project = chats("{{ raise_exception('only\n one turn') if messages | length > 1 }}" + TEMPLATE)
    shown = project.refused(3, "prompts.jsonl:2: ", "train", project.config(data={"max_prompt_tokens": 200}))
    assert shown.endswith("/model: its chat template refuses this conversation: only one turn\n")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (HANG, "its chat template took longer than 1 s and was ended; it is broken or hostile"),
        ("{{ 'a' * 10**10 }}", "its chat template needed more than 1024 MB of memory and was ended"),
        ("{% for a in range(99999) %}{{ 'a' * 99 }}{% endfor %}", "its chat template wrote more than 4000000 charact"),
        ("{{ messages.__class__.__mro__ }}", "its chat template can't render this conversation (line 1: "),
        ("{% for %}", "its chat template is broken (line 1: TemplateSyntaxError"),
    ],
    ids=["time", "memory", "length", "sandbox", "syntax"],
)
def test_a_hostile_template_is_one_line_in_every_command(chats, template, words, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    monkeypatch.setattr(chat_template, "_PATIENCE", 200.0)  # the machine may be busy
    project = chats(template)
    project.jsonl("texts.jsonl", [{"messages": [USER, ANSWER]}])
    project.jsonl("ratings.jsonl", [{"prompt": [USER], "chosen": "good", "rejected": "bad"}])
    for file, *arguments in (
        ("prompts.jsonl", "train", project.config(data={"max_prompt_tokens": 200})),
        ("texts.jsonl", "sft", project.config("sft")),
        ("ratings.jsonl", "reward", project.config("reward")),
        ("prompts.jsonl", "sample", "model", "--prompts", "prompts.jsonl"),
    ):
        shown = project.refused(3, f"{file}:1: ", *arguments)
        assert words in shown and "/model: " in shown and shown.count("\n") == 1


def test_a_hostile_template_does_not_hold_up_an_export(chats, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    monkeypatch.setattr(chat_template, "_PATIENCE", 200.0)  # the machine may be busy
    project = chats(HANG)
    project.jsonl("texts.jsonl", [{"text": "the film is good"}])
    project.done("sft", project.config("sft"))
    words = "its chat template took longer than 1 s and was ended"
    assert project.refused(3, words, "export", "runs/a", "out", "--format", "gguf").count("\n") == 1
