import io
import re
import warnings

import pytest

from mlx_ppo.data.examples import load_examples
from mlx_ppo.errors import DataError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}


def load(path, tokenizer, max_tokens=64, overlong="error"):
    return load_examples(path, tokenizer, max_tokens=max_tokens, overlong=overlong)


def split(example, tokenizer):
    """The text without loss, the text with loss, and whether EOS ends it."""
    before, after = example.tokens[: example.loss_from], example.tokens[example.loss_from :]
    return tokenizer.decode(before), tokenizer.decode(after), example.tokens[-1] == tokenizer.eos_id


def test_each_format(write, tokenizer):
    path = write(
        {"text": "abc", "prompt": "ignored"},
        {"prompt": "ab", "completion": "cd"},
        {"prompt": [USER], "completion": "cd"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"messages": [USER, ASSISTANT, USER, ASSISTANT], "prompt": "ignored"},
    )
    examples = load(path, tokenizer).examples
    assert [split(example, tokenizer) for example in examples] == [
        ("", "abc", True),
        ("ab", "cd", True),
        ("u:hi|a:", "cd|", True),
        ("u:hi|a:", "yo|", True),
        ("u:hi|a:yo|\nu:hi|a:", "yo|", True),
    ]
    assert all(example.tokens[0] == 1 for example in examples)
    assert examples[4].where == f"{path}:5"


def test_eos_is_added_where_the_template_has_none(write, tokenizer):
    tokenizer.eos_ids, tokenizer.eos_id = frozenset({300, ord("h") + 3}), 300  # the h of the prompt ends no answer
    (example,) = load(write({"messages": [USER, ASSISTANT]}), tokenizer).examples
    assert example.tokens[-3:] == (2, ord("\n") + 3, 300)


def test_an_answer_ends_at_its_last_eos(write, tokenizer):
    tokenizer.eos_ids = frozenset({2, ord("!") + 3})
    (example,) = load(write({"messages": [USER, ASSISTANT | {"content": "a!b"}]}), tokenizer).examples
    assert split(example, tokenizer) == ("u:hi|a:", "a!b|", True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"txt": "a"}, "no field 'text' or 'completion' or 'messages', only 'txt'; did you mean 'txt'?"),
        ({"text": "a", "completion": "b"}, "both 'text' and 'completion' are given; keep one of them"),
        ({"text": ""}, "'text' is empty"),
        ({"completion": "b"}, "no field 'prompt', only 'completion'"),
        ({"prompt": "", "completion": "b"}, "'prompt' is empty"),
        ({"prompt": "a", "completion": "\n"}, "'completion' is empty"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "'completion' is a list, so 'prompt' must be a list of messages"),
        (
            {"prompt": [USER], "completion": [USER]},
            "'completion' must be a string or a list of one assistant message, ",
        ),
        ({"prompt": [USER], "completion": [ASSISTANT, USER]}, "'completion' must be a string or a list of one"),
        (
            {"prompt": [USER], "completion": [5]},
            "'completion' must be a string or a list of one assistant message, not",
        ),
        ({"prompt": [USER], "completion": [ASSISTANT | {"content": 1}]}, "'completion' must be a string, not a number"),
        ({"prompt": [USER, ASSISTANT], "completion": "b"}, "'prompt' ends with role 'assistant' where the last must"),
        (
            {"messages": [USER]},
            "'messages' ends with role 'user' where the last must be 'assistant'; add the assistant",
        ),
        ({"messages": [USER, ASSISTANT | {"content": ""}]}, "the last message in 'messages' is empty"),
    ],
)
def test_a_bad_example_is_refused_by_its_place(write, tokenizer, line, message):
    path = write({"text": "fine"}, line)
    with pytest.raises(DataError) as caught:
        load(path, tokenizer)
    assert str(caught.value).startswith(f"{path}:2: {message}")


def test_a_template_that_rewrites_the_prompt_is_refused(write, tokenizer):
    render = tokenizer.render_chat

    def counting(messages, *, add_generation_prompt):
        return [1, len(messages), *render(messages, add_generation_prompt=add_generation_prompt)]

    tokenizer.render_chat = counting
    with pytest.raises(DataError, match=r"data\.jsonl:1: the chat template writes the prompt differently once an answ"):
        load(write({"messages": [USER, ASSISTANT]}), tokenizer)


@pytest.mark.parametrize(
    ("end", "answer", "joined"),
    [(" ", "Yes", " Y"), ("\n", "\nYes", "\n\n"), ("a:", ":) ok", "::"), ("> ", " two", "  "), ("no:", "-)", ":-")],
)
def test_an_answer_may_join_the_last_token_of_a_chat(write, tokenizer, end, answer, joined):
    """Its first character becomes one token with the last one of the generation prompt."""

    def encode(text):
        parts = re.findall(f"{re.escape(joined)}|.", text, flags=re.DOTALL)
        return [259 if part == joined else ord(part) + 3 for part in parts]

    def render(messages, *, add_generation_prompt):
        text = f"u:{messages[0]['content']}|{end}"
        return encode(text) if add_generation_prompt else [*encode(text + messages[-1]["content"]), 2]

    tokenizer.render_chat = render
    tokenizer.decode = lambda tokens: "".join(
        joined if token == 259 else chr(token - 3) for token in tokens if token > 2
    )
    [example] = load(write({"messages": [USER, ASSISTANT | {"content": answer}]}), tokenizer).examples
    assert example.tokens[example.loss_from] == 259
    assert tokenizer.decode(example.tokens[: example.loss_from]) + joined[:-1] == f"u:{USER['content']}|{end}"


def test_overlong_examples(write, tokenizer):
    path = write({"text": "abcdefgh"}, {"prompt": "abc", "completion": "defg"}, {"prompt": "abcde", "completion": "f"})
    kept = load(path, tokenizer, max_tokens=8, overlong="drop")
    assert ([example.where for example in kept.examples], kept.dropped, kept.truncated) == ([f"{path}:3"], 2, 0)

    cut = load(path, tokenizer, max_tokens=6, overlong="truncate")
    # the third's prompt fills the limit, so nothing would be left to learn
    assert [split(example, tokenizer) for example in cut.examples] == [("", "abcde", False), ("abc", "de", False)]
    assert (cut.dropped, cut.truncated) == (1, 2)

    with pytest.raises(DataError, match=r"data\.jsonl:1: 10 tokens, more than data.max_tokens = 8"):
        load(path, tokenizer, max_tokens=8)


@pytest.fixture(scope="module")
def pieces():
    """A SentencePiece model of a few words, trained here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # SWIG's, at import
        import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the film was good", "the film was bad", "un good film", "goodness"] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

    class Pieces:
        eos_id = processor.eos_id()
        eos_ids = frozenset({eos_id})
        vocab_size = processor.vocab_size()
        has_chat_template = False

        def encode(self, text, *, bos):
            return [processor.bos_id()] * bos + processor.encode(text)

        def decode(self, tokens):
            return processor.decode(list(tokens))

    return Pieces()


@pytest.mark.parametrize(
    ("prompt", "completion"), [("the film was", " good"), ("the film was go", "od"), ("the film was ", "bad")]
)
def test_sentencepiece_tokenises_prompt_and_completion_as_one_text(write, pieces, prompt, completion):
    (example,) = load(write({"prompt": prompt, "completion": completion}), pieces).examples
    joint = pieces.encode(prompt + completion, bos=True)
    assert example.tokens == (*joint, pieces.eos_id)
    # the loss covers the completion in full, and begins within the last word of the prompt at the earliest
    assert (prompt + completion).endswith(pieces.decode(joint[example.loss_from :]))
    assert pieces.decode(joint[example.loss_from :]).endswith(completion.strip())
    assert pieces.decode(joint[: example.loss_from]).startswith("the film")


def test_apart_the_completion_would_have_a_space_before_it(pieces):
    apart = pieces.encode("the film was go", bos=False) + pieces.encode("od", bos=False)
    assert pieces.decode(apart) == "the film was go od"
