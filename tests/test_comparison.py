"""Judges of two completions: by reward, by function, by a model that is asked; and how often they agree."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.comparison import ByFunction, ByModel, ByReward, Pair
from mlx_ppo.errors import ConfigError, ModelError
from mlx_ppo.models.adapters import HEAD, Weights
from mlx_ppo.models.heads import RewardFacts, RewardModel
from mlx_ppo.rewards.functions import RewardFunction
from mlx_ppo.rewards.verdicts import Rate, agreement, verdicts
from mlx_ppo.runs.targets import Target

PAIRS = [
    Pair("the film", {"prompt": "the film"}, " was good", " was bad and bad"),
    Pair("it", {"prompt": "it"}, " is a very good story", ""),
    Pair("a story", {"prompt": "a story"}, " of the film", " in the film and the story and it"),
]


def swapped(pairs):
    return [pair._replace(first=pair.second, second=pair.first) for pair in pairs]


def plain(trunk, weights, tokens):
    """Log-probabilities of the token after a row, by the whole model."""
    with trunk.using(weights):
        logits = np.array(trunk.model(mx.array([tokens])))[0, -1].astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def test_a_model_that_is_asked_is_read_by_two_log_probabilities_in_both_orders(trunk, make_adapters):
    weights = make_adapters(trunk, seed=4)
    judge = ByModel(Target(trunk, weights, None), "Which one?")
    found = judge.margins(PAIRS)
    tokenizer, each = trunk.tokenizer, []
    for pair in PAIRS:
        margins = []
        for one, other in ((pair.first, pair.second), (pair.second, pair.first)):
            text = f"A text begins like this:\n\n{pair.prompt}\n\nTwo writers went on.\n\nA:\n{one.strip()}\n\nB:\n"
            text += f"{other.strip()}\n\nWhich one? Answer with one letter, A or B.\n\nAnswer:"
            a, b = (tokenizer.encode(f"{text} {letter}", bos=True) for letter in "AB")
            assert a[:-1] == b[:-1] and a[-1] != b[-1]
            of = plain(trunk, weights, a[:-1])
            margins.append(of[b[-1]] - of[a[-1]])
        each.append((margins[0], -margins[1]))
    np.testing.assert_allclose(found, np.mean(each, axis=1), atol=1e-4)
    assert judge.by_place == np.mean([one * other < 0 for one, other in each])
    np.testing.assert_allclose(judge.margins(swapped(PAIRS)), -found, atol=1e-5)
    assert np.abs(found).max() > 1e-3


def test_a_taste_for_a_letter_alone_prefers_nothing(trunk, monkeypatch):
    judge = ByModel(Target(trunk, Weights({}), None))
    monkeypatch.setattr(judge, "_asked", lambda questions: np.full(len(questions), 2.5, np.float32))
    assert judge.margins(PAIRS).tolist() == [0.0] * 3 and judge.by_place == 1.0
    assert Rate.of(verdicts(judge.margins(PAIRS))).share == 0.5


def test_a_tokenizer_without_the_letters_is_refused(trunk, monkeypatch):
    judge = ByModel(Target(trunk, Weights({}), None))
    monkeypatch.setattr("mlx_ppo.comparison.answered_tokens", lambda *_: ([1, 5, 7], 2))
    with pytest.raises(ModelError, match="can't tell A from B; take another judge"):
        judge.margins(PAIRS)


def test_a_reward_model_scores_both_as_finished_answers(trunk, make_adapters):
    body = make_adapters(trunk, seed=2)
    head = {f"{HEAD}weight": mx.linspace(-1, 1, trunk.width), f"{HEAD}bias": mx.array(0.3)}
    facts = RewardFacts("adapters", "last", mean=5.0, deviation=2.0)
    judge = ByReward(RewardModel(trunk, body.holding({**body.arrays, **head}), facts))
    found, tokenizer = judge.margins(PAIRS), trunk.tokenizer
    for pair, margin in zip(PAIRS, found, strict=True):
        raw = []
        for text in (pair.first, pair.second):
            tokens = [*tokenizer.encode(pair.prompt + text, bos=True), tokenizer.eos_id]
            with trunk.using(body):
                raw.append(float(np.array(trunk.hidden(mx.array([tokens])))[0, -1] @ np.linspace(-1, 1, trunk.width)))
        assert margin == pytest.approx((raw[1] - raw[0]) / 2.0, abs=1e-4)
    np.testing.assert_allclose(judge.margins(swapped(PAIRS)), -found, atol=1e-5)


def test_a_function_judges_by_its_score(tmp_path):
    file = tmp_path / "rule.py"
    file.write_text(
        "def length(completions, prompts):\n    return [len(c) / len(p) for c, p in zip(completions, prompts)]\n"
    )
    with RewardFunction(file, "length", timeout=60.0) as function:
        found = ByFunction(function).margins(PAIRS)
    assert found.tolist() == pytest.approx([7 / 8, -21 / 2, 21 / 7])
    file.write_text("def length(completions, answer):\n    return [0.0 for _ in completions]\n")
    with RewardFunction(file, "length", timeout=60.0) as function, pytest.raises(ConfigError, match="'answer'"):
        ByFunction(function).margins(PAIRS)


def test_verdicts_and_agreement_by_hand():
    assert verdicts(np.array([0.1, -3.0, 0.0], np.float32)) == [1.0, 0.0, 0.5]
    hand = {"a": 1.0, "b": 0.0, "c": 0.5, "d": 1.0, "only": 1.0}
    machine = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "other": 0.0}
    found = agreement(hand, machine)
    assert (found.pairs, found.share) == (3, pytest.approx(2 / 3))
    assert agreement(hand, {}).pairs == 0 and str(found).startswith("66.7% (95 % interval 20.8% to 93.9%")
