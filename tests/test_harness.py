"""What lm-evaluation-harness is told of a policy, against plain passes, and against mlx-lm's own interface."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

REVIEWS = Path(__file__).resolve().parents[1] / "models" / "reviews"
WORDS = ("the", "film", "is", "good", "bad", "it", "was", "story")


class Request(NamedTuple):
    args: tuple[Any, ...]


@pytest.fixture
def policy(trunk, make_adapters):
    harness = pytest.importorskip("mlx_ppo.harness", exc_type=ImportError)
    from mlx_ppo.runs.targets import Target

    return harness.PolicyLM(Target(trunk, make_adapters(trunk, seed=1), None), chat=False)


def logprobs(policy: Any, tokens: list[int]) -> np.ndarray:
    """[S - 1, V]: of each next token, by a plain pass."""
    target = policy._target
    with target.trunk.using(target.weights):
        logits = target.trunk.logits(target.trunk.hidden(mx.array([tokens])))[0, :-1]
        values = np.array(logits.astype(mx.float32), np.float64)
    return (
        values
        - np.log(np.exp(values - values.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - values.max(-1, keepdims=True)
    )


def test_continuations(policy):
    encode = policy._target.trunk.tokenizer.encode
    asked = [
        ("the film", " was bad"),
        ("it", " was"),
        ("the film", " good"),
        ("a very good story ", "of it"),
        ("", "it was"),
    ]
    found = policy.loglikelihood([Request(pair) for pair in asked])
    for (context, after), (value, greedy) in zip(asked, found, strict=True):
        tokens, start = encode(context + after, bos=True), len(encode(context.rstrip(), bos=True))
        table = logprobs(policy, tokens)[start - 1 :]
        assert value == pytest.approx(table[np.arange(len(table)), tokens[start:]].sum(), abs=1e-4)
        assert greedy == (table.argmax(-1) == tokens[start:]).all()


def test_what_greedy_decoding_writes(policy):
    """Of one of the contexts the likeliest token is a word that is read as it is written."""
    tokenizer = policy._target.trunk.tokenizer
    found = []
    for context in (f"{one} {other}" for one in WORDS for other in WORDS):
        tokens = tokenizer.encode(context, bos=True)
        likeliest = int(logprobs(policy, [*tokens, 0])[-1].argmax())
        after = f" {tokenizer.decode([likeliest]).strip()}"
        if tokenizer.encode(context + after, bos=True) == [*tokens, likeliest]:
            found += [(context, after), (context, f"{after} bad bad bad bad")]
    assert found
    greedy = [same for _, same in policy.loglikelihood([Request(pair) for pair in found])]
    assert all(greedy[::2]) and not any(greedy[1::2])


def test_whole_texts(policy):
    encode = policy._target.trunk.tokenizer.encode
    texts = ["a very good story of the film", "it"]
    for text, value in zip(texts, policy.loglikelihood_rolling([Request((text,)) for text in texts]), strict=True):
        tokens = encode(text, bos=True)
        table = logprobs(policy, tokens)
        assert value == pytest.approx(table[np.arange(len(table)), tokens[1:]].sum(), abs=1e-4)


def test_answers_end_where_the_task_says(policy):
    from mlx_ppo.errors import ConfigError

    whole, short = policy.generate_until(
        [Request(("the film", {"max_gen_toks": 8})), Request(("the film", {"max_gen_toks": 3}))]
    )
    assert whole.startswith(short) and whole != short
    word = whole[2:4]
    (cut,) = policy.generate_until([Request(("the film", {"max_gen_toks": 8, "until": [word]}))])
    assert cut == whole[: whole.index(word)]
    with pytest.raises(ConfigError, match="asks for samples"):
        policy.generate_until([Request(("the film", {"do_sample": True}))])


def test_what_is_too_long_loses_its_beginning_and_is_counted(policy):
    encode, most = policy._target.trunk.tokenizer.encode, int(policy._most)
    long = "bad " * most + "the film"
    assert policy.cut == 0
    (long_one,) = policy.loglikelihood([Request((long, " was"))])
    assert policy.cut == 1
    tokens = encode(long + " was", bos=True)[-most:]
    assert long_one[0] == pytest.approx(logprobs(policy, tokens)[-1, tokens[-1]], abs=1e-3)


@pytest.mark.slow
def test_it_says_what_the_interface_of_mlx_lm_says(model_folder, monkeypatch):
    harness = pytest.importorskip("mlx_ppo.harness", exc_type=ImportError)
    from mlx_lm.evaluate import MLXLM

    alone = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    monkeypatch.setattr(mx.distributed, "init", lambda *_, **__: alone)
    for name in ("all_max", "all_gather"):
        monkeypatch.setattr(mx.distributed, name, lambda given, **_: mx.array(given))

    from mlx_ppo.runs.targets import load_target

    own, theirs = harness.PolicyLM(load_target(model_folder), chat=False), MLXLM(str(model_folder))
    pairs = [Request(("the film", " was bad")), Request(("it", " was")), Request(("the film", " good"))]
    for one, other in zip(own.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3) and one[1] == other[1]
    own, theirs = harness.PolicyLM(load_target(REVIEWS), chat=False), MLXLM(str(REVIEWS))
    settings = {"until": ["\n"], "max_gen_toks": 12}
    prompts = [Request((text, settings)) for text in ("The film", "A story of")]
    written = [[text.strip() for text in model.generate_until(prompts)] for model in (own, theirs)]
    assert written[0] == written[1]  # the detokenizer of mlx-lm loses the first space


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}the {{ message['role'] }} : {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}the assistant : {% endif %}"
)


def test_questions_in_a_chat_template(model_folder, tmp_path):
    """The template brings the token that begins a text, once; a last message that is begun is gone on with."""
    harness = pytest.importorskip("mlx_ppo.harness", exc_type=ImportError)
    from mlx_ppo.runs.targets import load_target

    folder = tmp_path / "chats"
    shutil.copytree(model_folder, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**settings, "bos_token": "<s>", "chat_template": TEMPLATE}))
    policy = harness.PolicyLM(load_target(folder), chat=True)
    asked = [{"role": "user", "content": "is the film good"}]
    context = policy.apply_chat_template(asked)
    assert context == "<s>the user : is the film good\nthe assistant : "
    begun = policy.apply_chat_template([*asked, {"role": "assistant", "content": "it"}], add_generation_prompt=False)
    assert begun == context + "it"
    tokenizer = policy._target.trunk.tokenizer
    before = tokenizer.render_chat(asked, add_generation_prompt=True)
    tokens = tokenizer.encode(context + "it was", bos=False)
    assert tokens.count(before[0]) == 1 and policy._context(context) == tuple(before)
    start = len(tokenizer.encode(context.rstrip(), bos=False))
    table = logprobs(policy, tokens)[start - 1 :]
    (found,) = policy.loglikelihood([Request((context, "it was"))])
    assert found[0] == pytest.approx(table[np.arange(len(table)), tokens[start:]].sum(), abs=1e-4)
