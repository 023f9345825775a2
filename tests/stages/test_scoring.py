from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.algo.kl import kl_estimate
from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.config.rewards import ScoreSection
from mlx_ppo.errors import RunError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.heads import RewardFacts, RewardModel
from mlx_ppo.models.roles import Critic, Roles, Source
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.stages.records import Rollout, Scored
from mlx_ppo.stages.rollout import Asked, Sampling, generate
from mlx_ppo.stages.scoring import RawScores, combined_scores, raw_scores, score

Adapters = Callable[..., Weights]
TEMPERATURE = 0.8


def with_head(weights: Weights, seed: int, bias: float = 0.3) -> Weights:
    head = {"head.weight": mx.random.normal((32,), key=mx.random.key(seed)), "head.bias": mx.array(bias)}
    return weights.holding({**weights.arrays, **head})


@pytest.fixture
def policy(stopping_trunk: Trunk, make_adapters: Adapters) -> Weights:
    return make_adapters(stopping_trunk, seed=1)


@pytest.fixture
def rollout(stopping_trunk: Trunk, policy: Weights, prompts: list[tuple[int, ...]]) -> Rollout:
    asked = Asked(prompts, range(5), [{"id": row} for row in range(5)])
    return generate(stopping_trunk, policy, asked, Sampling((1,), 5, TEMPERATURE, samples_per_prompt=3, batch_size=64))


@pytest.fixture
def roles(stopping_trunk: Trunk, make_adapters: Adapters) -> Roles:
    facts = RewardFacts("adapters", "last", mean=0.5, deviation=2.0, slope=3.0, intercept=1.0)
    model = RewardModel(stopping_trunk, with_head(make_adapters(stopping_trunk, seed=2), 2), facts)
    return Roles(stopping_trunk, Weights({}), None, [Source("judge", 0.5, model)])


def scored(roles: Roles, policy: Weights, critic: Weights | None, rollout: Rollout, **section: Any) -> Scored:
    own = ScoreSection(**section)
    return score(roles, policy, critic, rollout, own, Choices(0, own.batch_size, 0, False))


def critic_of(roles: Roles, make_adapters: Adapters, kind: str) -> Weights:
    roles.critic = Critic(kind, roles.trunk)
    return with_head(make_adapters(roles.trunk, seed=3) if kind == "adapters" else Weights({}), 3)


@pytest.mark.parametrize("kind", ["adapters", "head"])
def test_every_number_by_the_whole_model_one_row_at_a_time(
    roles: Roles, policy: Weights, rollout: Rollout, make_adapters: Adapters, kind: str
) -> None:
    critic = critic_of(roles, make_adapters, kind)
    seen = scored(roles, policy, critic, rollout, batch_size=4)
    trunk = roles.trunk
    judge = roles.sources[0].scorer
    assert seen.values is not None
    width = rollout.mask.shape[1]
    for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        tokens, span = mx.array([prompt + response]), slice(len(prompt) - 1, -1)
        expected: dict[str, np.ndarray] = {}
        for name, weights in (("old_logprobs", policy), ("ref_logprobs", Weights({}))):
            with trunk.using(weights):
                logits = np.array(trunk.model(tokens))[0, span].astype(np.float64) / TEMPERATURE
            log_p = logits - logits.max(axis=-1, keepdims=True)
            log_p -= np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
            expected[name] = log_p[np.arange(len(response)), response]
            if name == "old_logprobs":
                expected["entropy"] = -(np.exp(log_p) * log_p).sum(axis=-1)
        with trunk.using(critic if kind == "adapters" else policy):
            states = np.array(trunk.hidden(tokens))[0, span]
        expected["values"] = states @ np.array(critic.arrays["head.weight"]) + 0.3
        for name, values in expected.items():
            padded = np.pad(values, (0, width - len(values)))
            np.testing.assert_allclose(np.array(getattr(seen, name)[row]), padded, atol=5e-5, err_msg=name)
        with trunk.using(judge.weights):
            last = np.array(trunk.hidden(tokens))[0, -1]
        raw = last @ np.array(judge.weights.arrays["head.weight"]) + 0.3
        assert seen.by_source["judge"][row].item() == pytest.approx((raw - 0.5) / 2.0, abs=5e-5)
        assert seen.scores[row].item() == pytest.approx(0.5 * (raw - 0.5) / 2.0, abs=5e-5)
    assert np.abs(np.array(kl_estimate(seen.old_logprobs, seen.ref_logprobs, kind="k1"))).max() > 0.1


@pytest.mark.parametrize("kind", ["adapters", "head"])
def test_batch_composition_changes_nothing(
    roles: Roles, policy: Weights, rollout: Rollout, make_adapters: Adapters, kind: str
) -> None:
    critic = critic_of(roles, make_adapters, kind)
    alone, *others = (scored(roles, policy, critic, rollout, batch_size=size) for size in (1, 4, 64))
    for other in others:
        for name in ("old_logprobs", "ref_logprobs", "entropy", "values", "scores"):
            np.testing.assert_allclose(
                np.array(getattr(other, name)), np.array(getattr(alone, name)), atol=2e-5, err_msg=name
            )


def test_what_stands_in_the_padding_changes_nothing(stopping_trunk: Trunk, rollout: Rollout) -> None:
    sequences = rollout.sequences()
    width = sequences.tokens.shape[1]
    inside = mx.arange(width)[None, :] < sequences.lengths[:, None]
    assert not inside.all().item()
    junk = sequences._replace(tokens=mx.where(inside, sequences.tokens, 123))
    clean, dirty = (np.array(stopping_trunk.response_states(s)) for s in (sequences, junk))
    np.testing.assert_array_equal(clean, dirty)
    assert make_sequences(rollout.prompts, rollout.responses).tokens.tolist() == sequences.tokens.tolist()


def test_scores_are_weighted_then_penalised_then_clipped(roles: Roles, rollout: Rollout) -> None:
    roles.sources.append(Source("other", -2.0, roles.sources[0].scorer))
    count = len(rollout.prompts)
    first, second = np.linspace(-3, 3, count), np.cos(np.arange(count))
    raw = RawScores({"judge": mx.array(first, mx.float32), "other": mx.array(second, mx.float32)}, {})
    finished = np.array(rollout.finished)
    lengths = np.array([len(response) for response in rollout.responses])
    assert 0 < finished.sum() < count
    total = 0.5 * first - 2.0 * second
    overlong = np.clip((5 - 3 - lengths) / 3, -1, 0)
    for section, expected in (
        ({}, total),
        ({"truncated": "replace", "truncated_value": -4.0}, np.where(finished, total, -4.0)),
        ({"truncated": "subtract", "truncated_value": 1.5}, np.where(finished, total, total - 1.5)),
        ({"overlong_buffer": 3}, total + overlong),
        ({"truncated": "replace", "truncated_value": -4.0, "clip": 1.0}, np.clip(np.where(finished, total, -4), -1, 1)),
    ):
        found = combined_scores(raw, roles, rollout, ScoreSection(**section), 5)
        np.testing.assert_allclose(np.array(found), expected, atol=1e-5)


def test_a_source_without_weight_only_judges(roles: Roles, rollout: Rollout) -> None:
    """The lowest of the sources and their deviation are taken over those that count."""
    count = len(rollout.prompts)
    first = mx.array(np.linspace(1, 3, count), mx.float32)
    raw = RawScores({"judge": first, "other": mx.array(np.cos(np.arange(count)), mx.float32)}, {})
    for combine in ("sum", "worst", "cautious"):
        roles.sources = [Source("judge", 0.5, None)]
        alone = combined_scores(raw, roles, rollout, ScoreSection(combine=combine), 5)
        roles.sources.append(Source("other", 0.0, None))
        beside = combined_scores(raw, roles, rollout, ScoreSection(combine=combine), 5)
        np.testing.assert_array_equal(np.array(beside), np.array(alone), err_msg=combine)


def test_points_and_functions(roles: Roles, rollout: Rollout) -> None:
    asked: list[Any] = []

    def answer(prompts: list[str], texts: list[str], records: list[dict[str, Any]]) -> list[float]:
        asked.extend(zip(prompts, texts, records, strict=True))
        return [float(len(text)) for text in texts]

    roles.sources.append(Source("length", 1.0, SimpleNamespace(score=answer)))  # type: ignore[arg-type]
    raw = raw_scores(roles, rollout, batch_size=4)
    np.testing.assert_allclose(
        np.array(raw.points["judge"]), (np.array(raw.normalised["judge"]) * 2.0 + 0.5) * 3.0 + 1.0, rtol=1e-5
    )
    assert raw.points.keys() == {"judge"}
    assert [prompt for prompt, _, _ in asked[::3]] == [
        "the film", "a very good story of the film and it was", "it", "bad", "is it not in the story",
    ]  # fmt: skip
    assert [record["id"] for _, _, record in asked] == [row // 3 for row in range(15)]
    assert raw.normalised["length"].tolist() == [len(text) for _, text, _ in asked]
    decode = roles.trunk.tokenizer.decode
    for (prompt, text, _), tokens in zip(asked, zip(rollout.prompts, rollout.responses, strict=True), strict=True):
        assert prompt + text == decode([*tokens[0], *tokens[1]])


@pytest.mark.parametrize("what", ["score", "policy", "value"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_stop_the_run(
    roles: Roles, policy: Weights, rollout: Rollout, make_adapters: Adapters, what: str, value: float
) -> None:
    critic = critic_of(roles, make_adapters, "adapters")
    judge = roles.sources[0].scorer
    bad = {"head.bias": mx.array(value)}
    if what == "score":
        roles.sources[0].scorer = RewardModel(
            roles.trunk, judge.weights.holding({**judge.weights.arrays, **bad}), judge.facts
        )
    elif what == "value":
        critic = critic.holding({**critic.arrays, **bad})
    else:
        name = "model.layers.1.mlp.up_proj.lora_b"
        policy = policy.holding({**policy.arrays, name: policy.arrays[name] + np.nan})
    message = {"score": "a score of the reward 'judge'", "policy": "of the policy", "value": "a value of the critic"}
    with np.errstate(invalid="ignore"), pytest.raises(RunError, match=message[what]):
        scored(roles, policy, critic, rollout)


def test_the_sample_that_broke_a_reward_is_named(roles: Roles, rollout: Rollout) -> None:
    values = [0.0] * 15
    values[7] = np.nan
    roles.sources = [Source("mine", 1.0, SimpleNamespace(score=lambda *_: values))]  # type: ignore[arg-type]
    text = roles.trunk.tokenizer.decode([*rollout.prompts[7], *rollout.responses[7]])
    with pytest.raises(RunError) as caught:
        raw_scores(roles, rollout, batch_size=4)
    assert repr(text[:120]) in str(caught.value)
