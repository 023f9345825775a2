import numpy as np
import pytest

from mlx_ppo.data.prompts import PromptStream, load_prompts, shared_prompts
from mlx_ppo.errors import DataError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "be"}


def load(path, tokenizer, max_tokens=64, overlong="error"):
    return load_prompts(path, tokenizer, max_tokens=max_tokens, overlong=overlong)


def test_plain_and_chat_prompts(write, tokenizer):
    path = write(
        {"prompt": "ab", "id": 9},
        {"prompt": [SYSTEM, USER]},
        {"messages": [USER, ASSISTANT, USER | {"name": "extra keys are left out"}]},
        {"prompt": "cd", "messages": [USER, ASSISTANT]},
    )
    plain, system, turns, both = load(path, tokenizer).prompts
    assert plain.tokens == (1, 100, 101)
    assert (plain.text, plain.record, plain.where) == ("ab", {"prompt": "ab", "id": 9}, f"{path}:1")
    assert system.text == "system: be\nuser: hi\nassistant: "
    assert list(system.tokens) == tokenizer.encode("s:be|u:hi|a:", bos=True)
    assert turns.text == "user: hi\nassistant: yo\nuser: hi\nassistant: "
    assert both.text == "cd"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": 1}, "'prompt' must be a string, not a number"),
        ({"promt": "a"}, "no field 'prompt' or 'messages', only 'promt'; did you mean 'promt'?"),
        ({"messages": "a"}, "'messages' must be a list of messages, not a string"),
        ({"messages": []}, "'messages' has no messages"),
        ({"prompt": []}, "'prompt' has no messages"),
        (
            {"messages": [USER, ASSISTANT]},
            "'messages' ends with role 'assistant' where the last must be 'user'; remove",
        ),
        ({"messages": [SYSTEM]}, "'messages' ends with role 'system' where the last must be 'user'; add the user's"),
        ({"messages": [USER, USER]}, "'messages' message 2 has role 'user' where 'assistant' must come"),
        ({"messages": [ASSISTANT, USER]}, "'messages' message 1 has role 'assistant' where 'user' must come"),
        ({"messages": [USER, SYSTEM]}, "'messages' message 2 has role 'system' where 'assistant' must come"),
        ({"messages": [SYSTEM, ASSISTANT]}, "'messages' message 2 has role 'assistant' where 'user' must come"),
        ({"messages": [USER | {"role": "tool"}]}, "'messages' message 1 has role 'tool' where 'user' must come"),
        ({"messages": ["hi"]}, "'messages' message 1 must be an object with 'role' and 'content', not a string"),
        ({"messages": [{"role": "user"}]}, "'messages' message 1 has no 'content'"),
        ({"messages": [{"content": "hi"}]}, "'messages' message 1 has no 'role'"),
        ({"messages": [USER | {"content": None}]}, "'messages' message 1 has null as its 'content'"),
        ({"messages": [USER | {"content": " "}]}, "'messages' message 1 is empty"),
        ({"messages": [USER | {"content": "refuse me"}]}, "the chat template refuses this; leave it out"),
        ({"prompt": "x" * 64}, "65 tokens, more than data.max_prompt_tokens = 64; shorten the text"),
    ],
)
def test_a_bad_prompt_is_refused_by_its_place(write, tokenizer, line, message):
    path = write({"prompt": "fine"}, b"", line)
    with pytest.raises(DataError) as caught:
        load(path, tokenizer)
    assert str(caught.value).startswith(f"{path}:3: {message}")


def test_messages_without_a_chat_template(write, tokenizer):
    tokenizer.has_chat_template = False
    with pytest.raises(DataError, match=r"data\.jsonl:1: messages need a chat template, which this model lacks"):
        load(write({"messages": [USER]}), tokenizer)


def test_a_text_without_tokens(write, tokenizer):
    tokenizer.encode = lambda text, bos: []
    with pytest.raises(DataError, match=r"data\.jsonl:1: the tokenizer finds no tokens in this text"):
        load(write({"prompt": "\u200b"}), tokenizer)


def test_overlong_prompts(write, tokenizer):
    path = write({"prompt": "abcdef"}, {"prompt": "abc"}, {"prompt": [USER]})
    kept = load(path, tokenizer, max_tokens=4, overlong="drop")
    assert ([prompt.where for prompt in kept.prompts], kept.dropped, kept.truncated) == ([f"{path}:2"], 2, 0)

    cut = load(path, tokenizer, max_tokens=4, overlong="truncate")
    assert [prompt.text for prompt in cut.prompts] == ["def", "abc", "|a:"]
    assert [prompt.tokens[0] for prompt in cut.prompts] == [1, 1, 1]
    assert [len(prompt.tokens) for prompt in cut.prompts] == [4, 4, 4]
    assert (cut.dropped, cut.truncated) == (0, 2)

    with pytest.raises(DataError, match=r"data\.jsonl:1: 7 tokens, more than data.max_prompt_tokens = 4"):
        load(path, tokenizer, max_tokens=4)
    with pytest.raises(
        DataError, match=r"data\.jsonl: every record \(3\) is longer than data.max_prompt_tokens = 3 and was dropp"
    ):
        load(path, tokenizer, max_tokens=3, overlong="drop")
    with pytest.raises(ValueError, match="at least 2"):
        load(path, tokenizer, max_tokens=1, overlong="truncate")


def test_shared_prompts(write, tokenizer):
    a = load(write({"prompt": "a"}, {"prompt": "b"}, name="a"), tokenizer).prompts
    b = load(write({"prompt": "b"}, {"prompt": "c"}, {"prompt": "b"}, name="b"), tokenizer).prompts
    assert shared_prompts(a, b) == 2
    assert shared_prompts(b, a) == 1
    assert shared_prompts(a, []) == 0


@pytest.fixture
def prompts(write, tokenizer):
    return load(write(*({"prompt": str(n)} for n in range(7))), tokenizer).prompts


def test_every_epoch_is_another_permutation(prompts):
    stream = PromptStream(prompts, seed=3)
    taken = stream.take(0, 21)
    assert all(prompts[index] is prompt for index, prompt in taken)
    epochs = [[index for index, _ in taken[start : start + 7]] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert taken != PromptStream(prompts, seed=4).take(0, 21)


def test_the_order_depends_on_the_position_only(prompts):
    whole = PromptStream(prompts, seed=3).take(0, 40)
    assert [index for index, _ in whole[:9]] == [5, 4, 1, 3, 2, 6, 0, 6, 3]  # resume in a later version needs the same
    for start, count in np.ndindex(20, 20):
        assert PromptStream(prompts, seed=3).take(start, count) == whole[start : start + count]


def test_a_stream_needs_prompts():
    with pytest.raises(ValueError, match="at least one"):
        PromptStream([], seed=0)
