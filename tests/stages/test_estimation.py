from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.algo.kl import AdaptiveKL
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.stages.advantages import advantages, pulls_back, signal
from mlx_ppo.stages.records import PPOBatch, Rollout, Scored
from mlx_ppo.stages.state import horizon_of, slow_controller

LENGTHS = [4, 1, 3, 2, 4, 2]
GROUP = [0, 0, 0, 1, 1, 1]
B, T = len(LENGTHS), 4
GENERATOR = np.random.default_rng(0)
SCORES, POLICY, REFERENCE, VALUES = (GENERATOR.normal(size=shape) for shape in (B, (B, T), (B, T), (B, T)))
MASK = np.arange(T)[None, :] < np.array(LENGTHS)[:, None]


def estimated(kl_coef: float, given: list[float] | None, *, critic: bool = True, **ppo: Any) -> tuple[PPOBatch, bool]:
    config = TrainConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"prompts": "p"},
            "reward": [{"kind": "model", "path": "r"}],
            "rollout": {"samples_per_prompt": 3},
            "ppo": ppo,
        }
    )
    policy, reference, values = (
        mx.array(np.where(MASK, array, np.nan), mx.float32) for array in (POLICY, REFERENCE, VALUES)
    )
    rollout = Rollout(
        prompts=((1,),) * B,
        responses=tuple((5,) * length for length in LENGTHS),
        logprobs=policy,
        mask=mx.array(MASK),
        finished=mx.array([True] * B),
        group=mx.array(GROUP),
        records=({},) * B,
        temperature=1.0,
        max_tokens=8,
    )
    scores = mx.array(SCORES if given is None else given, mx.float32)
    scored = Scored(scores, {"s": scores}, policy, reference, policy, values if critic else None)
    return advantages(config, rollout, scored, kl_coef=kl_coef), signal(config, rollout, scored) > 0


def found(kl_coef: float, *, critic: bool = True, **ppo: Any) -> PPOBatch:
    return estimated(kl_coef, None, critic=critic, **ppo)[0]


def gae_by_hand(kl_coef: float, discount: float, lambdas: list[float]) -> np.ndarray:
    """One response, one token at a time, in float64; the score is on the last token, as end-of-sequence or not."""
    result = np.zeros((B, T))
    for row, length in enumerate(LENGTHS):
        following = 0.0
        for slot in reversed(range(length)):
            reward = -kl_coef * (POLICY[row, slot] - REFERENCE[row, slot])
            reward += SCORES[row] if slot == length - 1 else 0.0
            next_value = VALUES[row, slot + 1] if slot < length - 1 else 0.0
            delta = reward + discount * next_value - VALUES[row, slot]
            following = delta + discount * lambdas[row] * following
            result[row, slot] = following
    return result


def whitened(array: np.ndarray, scores: np.ndarray = SCORES) -> np.ndarray:
    """Advantages that vary more than the scores by as much smaller."""
    counted = array[MASK]
    deviation = np.sqrt(counted.var(ddof=1) + 1e-8)
    return np.where(MASK, (array - counted.mean()) / deviation * min(1.0, scores.std(ddof=1) / deviation), 0.0)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize(("discount", "lambda_policy", "lambda_critic"), [(1.0, 0.95, 1.0), (0.9, 0.0, 0.7)])
def test_gae_with_a_lambda_each_for_policy_and_critic(
    kl_coef: float, whiten: bool, discount: float, lambda_policy: float, lambda_critic: float
) -> None:
    batch = found(kl_coef, whiten=whiten, discount=discount, lambda_policy=lambda_policy, lambda_critic=lambda_critic)
    estimates = gae_by_hand(kl_coef, discount, [lambda_policy] * B)
    expected = whitened(estimates) if whiten else estimates
    np.testing.assert_allclose(np.array(batch.advantages), expected, atol=2e-5)
    returns = np.where(MASK, gae_by_hand(kl_coef, discount, [lambda_critic] * B) + VALUES, 0.0)
    np.testing.assert_allclose(np.array(batch.returns), returns, atol=2e-5)
    np.testing.assert_array_equal(np.array(batch.old_values)[MASK], VALUES[MASK].astype(np.float32))
    np.testing.assert_array_equal(np.array(batch.old_logprobs)[MASK], POLICY[MASK].astype(np.float32))
    if lambda_critic == discount == 1.0:
        k1 = np.where(MASK, POLICY - REFERENCE, 0.0)
        to_come = SCORES[:, None] - kl_coef * np.cumsum(k1[:, ::-1], axis=1)[:, ::-1]
        np.testing.assert_allclose(np.array(batch.returns)[MASK], to_come[MASK], atol=2e-5)


@pytest.mark.parametrize(("spread", "largest"), [(0.0, 0.0), (1e-3, 0.01), (0.1, 0.5), (100.0, 3.0)])
def test_whitening_makes_nothing_of_the_critics_error_alone(spread: float, largest: float) -> None:
    """The critic's values vary by about 1; scores by `spread`."""
    scores = 1 + spread * np.array([1, -1, 1, -1, 1, -1])
    batch, _ = estimated(0.0, scores.tolist())
    assert np.abs(np.array(batch.advantages)).max() <= largest
    assert spread < 100 or np.array(batch.advantages)[MASK].std(ddof=1) == pytest.approx(1)


@pytest.mark.parametrize(
    ("scores", "gae", "rloo"),
    [
        ([2.0] * 6, False, False),
        ([0.0] * 6, False, False),
        ([0.7 + 1e-8, 0.7, 0.7, 0.7 - 1e-8, 0.7, 0.7], False, False),
        ([1.0, 1.0, 1.0, 2.0, 2.0, 2.0], True, False),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.001], True, True),
    ],
)
def test_a_signal_is_a_difference_between_scores_that_are_compared(scores: list[float], gae: bool, rloo: bool) -> None:
    assert estimated(0.1, scores)[1] is gae
    assert estimated(0.1, scores, critic=False, advantage="rloo")[1] is rloo


@pytest.mark.parametrize("whiten", [True, False])
def test_with_equal_scores_the_kl_penalty_alone_is_learned_from_and_not_enlarged(whiten: bool) -> None:
    batch, signal = estimated(0.01, [2.0] * B, whiten=whiten)
    k1 = np.where(MASK, POLICY - REFERENCE, 0.0)
    to_pay = -0.01 * np.cumsum(k1[:, ::-1], axis=1)[:, ::-1]
    expected = np.where(MASK, to_pay - to_pay[MASK].mean(), 0.0)
    np.testing.assert_allclose(np.array(batch.advantages), expected, atol=1e-6)
    assert not signal


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_group_of_equal_scores_has_the_kl_penalty_in_its_own_size(kind: str) -> None:
    """The other group has a signal, and is compared as always."""
    scores = [1.0, 1.0, 1.0, 3.0, 2.0, 4.0]
    batch, signal = estimated(0.01, scores, critic=False, advantage=kind)
    paid = 0.01 * np.where(MASK, POLICY - REFERENCE, 0.0).sum(axis=1)[:3]
    first = np.array(batch.advantages)[:3, 0]
    np.testing.assert_allclose(first, (paid.mean() - paid) * (1.5 if kind == "rloo" else 1.0), atol=1e-6)
    assert signal and np.abs(np.array(batch.advantages)[3:]).max() > 0.5


def test_without_a_signal_the_gradient_is_that_of_the_kl_divergence() -> None:
    """Four responses of a token each, as often as their probabilities say: the estimate is exact."""
    policy, reference, drawn = np.array([0.5, 0.25, 0.25]), np.array([0.2, 0.3, 0.5]), [0, 0, 1, 2]
    config = TrainConfig.model_validate(
        {"model": {"path": "m"}, "data": {"prompts": "p"}, "reward": [{"kind": "model", "path": "r"}]}
    )
    old, frozen = (mx.array(np.log(p[drawn])[:, None], mx.float32) for p in (policy, reference))
    mask, values = mx.ones((4, 1), mx.bool_), mx.array([[9.0], [-9.0], [5.0], [1.0]])  # the critic's error has no part
    rollout = Rollout(((1,),) * 4, ((5,),) * 4, old, mask, mx.ones(4), mx.arange(4), ({},) * 4, 1.0, 8)
    batch = advantages(config, rollout, Scored(mx.ones(4), {}, old, frozen, old, values), kl_coef=0.1)
    by_logits = np.array(batch.advantages).T @ (np.eye(3)[drawn] - policy) / 4
    apart = np.log(policy / reference)
    expected = -0.1 * policy * (apart - (policy * apart).sum())
    np.testing.assert_allclose(by_logits[0], expected, atol=1e-7)


@pytest.mark.parametrize(("kl_coef", "apart", "pulls"), [(0.05, 1.0, True), (0.0, 1.0, False), (0.05, 1e-5, False)])
def test_the_penalty_pulls_back_a_policy_that_has_left_the_reference(kl_coef: float, apart: float, pulls: bool) -> None:
    policy = mx.array(np.where(MASK, REFERENCE + apart * (POLICY - REFERENCE), np.nan), mx.float32)
    scored = Scored(mx.zeros(B), {}, policy, mx.array(REFERENCE, mx.float32), policy, None)
    rollout = Rollout(((1,),) * B, ((5,),) * B, policy, mx.array(MASK), mx.ones(B), mx.array(GROUP), ({},) * B, 1.0, 8)
    assert pulls_back(rollout, scored, kl_coef=kl_coef) is pulls


def test_lambda_by_length_is_the_policys_alone() -> None:
    batch = found(0.3, whiten=False, length_adaptive=0.4)
    lambdas = [max(0.0, 1 - 1 / (0.4 * length)) for length in LENGTHS]
    assert len(set(lambdas)) == 3
    np.testing.assert_allclose(np.array(batch.advantages), gae_by_hand(0.3, 1.0, lambdas), atol=2e-5)
    returns = np.where(MASK, gae_by_hand(0.3, 1.0, [1.0] * B) + VALUES, 0.0)
    np.testing.assert_allclose(np.array(batch.returns), returns, atol=2e-5)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_without_a_critic_the_penalised_scores_are_compared_within_a_group(kind: str, kl_coef: float) -> None:
    batch = found(kl_coef, critic=False, advantage=kind)
    totals = SCORES - kl_coef * np.where(MASK, POLICY - REFERENCE, 0.0).sum(axis=1)
    expected = np.zeros(B)
    for rows in (slice(0, 3), slice(3, 6)):
        own = totals[rows]
        centred = own - own.mean()
        others = own - (own.sum() - own) / 2
        expected[rows] = {"grpo": centred / (own.std(ddof=1) + 1e-4), "dr_grpo": centred, "rloo": others}[kind]
    np.testing.assert_allclose(np.array(batch.advantages), np.where(MASK, expected[:, None], 0.0), atol=2e-5)
    assert batch.old_values is None
    assert batch.returns is None


@pytest.mark.parametrize(("iterations", "samples", "given", "horizon"), [
    (50, 64, 0.0, 320.0), (100, 32, 0.0, 320.0), (3, 4, 0.0, 4.0), (50, 64, 10_000.0, 10_000.0),
])  # fmt: skip
def test_the_controller_acts_within_the_run(iterations: int, samples: int, given: float, horizon: float) -> None:
    config = TrainConfig.model_validate(
        {
            "run": {"iterations": iterations},
            "model": {"path": "m"},
            "data": {"prompts": "p"},
            "reward": [{"kind": "model", "path": "r"}],
            "rollout": {"prompts": samples},
            "kl": {"controller": "adaptive", "horizon": given},
        }
    )
    assert horizon_of(config) == horizon
    controller = AdaptiveKL(0.05, 6.0, horizon_of(config))
    for _ in range(iterations):
        controller.update(100.0, samples)
    assert (controller.coef > 0.05 * min(1.1**iterations, 5)) is (given == 0) is (slow_controller(config) is None)
