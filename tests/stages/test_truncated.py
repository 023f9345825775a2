"""A rollout from truncated distributions: sampled, scored and learned from on the same sets, whatever the batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.algo.truncation import unpacked
from mlx_ppo.compute.sequences import Sequences
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.stages.losses import Pass
from mlx_ppo.stages.records import Rollout
from mlx_ppo.stages.rollout import Asked, Sampling, generate

MakeWorld = Callable[..., Any]
TEMPERATURE = 0.9  # of the worlds
BOUNDS = {
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.6},
    "min-p": {"min_p": 0.2},
    "all": {"top_k": 60, "top_p": 0.8, "min_p": 0.05},
}
by_bounds = pytest.mark.parametrize("name", BOUNDS)


def scaled_rows(trunk: Trunk, weights: Weights, rollout: Rollout) -> list[np.ndarray]:
    """Logits / temperature [T, V] of each response, by the whole model, without cache or padding, in float64."""
    found = []
    with trunk.using(weights):
        for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
            logits = np.array(trunk.model(mx.array([prompt + response])).astype(mx.float32))[0].astype(np.float64)
            found.append(logits[len(prompt) - 1 : -1] / TEMPERATURE)
    return found


def sets_of(rollout: Rollout, vocabulary: int) -> list[np.ndarray]:
    """[T, V] of each response."""
    assert rollout.support is not None
    whole = np.array(unpacked(rollout.support, vocabulary))
    ends = np.cumsum([len(response) for response in rollout.responses])
    assert len(whole) == ends[-1]
    return np.split(whole, ends[:-1])


def on_set(scaled: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Log-probabilities [T, V] of the distribution on sets; minus infinity outside."""
    within = np.where(own, scaled, -np.inf)
    top = within.max(axis=-1, keepdims=True)
    return within - top - np.log(np.exp(within - top).sum(axis=-1, keepdims=True))


@by_bounds
def test_every_log_probability_is_of_the_set_that_was_sampled_from(make_world: MakeWorld, name: str) -> None:
    """Sampled, old and reference; the sets are those of the policy that sampled, and no others."""
    world = make_world(bounds=BOUNDS[name], size=0.3)
    trunk, rollout = world.roles.trunk, world.rollout
    policy = scaled_rows(trunk, world.policy.weights, rollout)
    reference = scaled_rows(trunk, world.roles.reference, rollout)
    sets = sets_of(rollout, policy[0].shape[-1])
    referred = world.logprobs(world.roles.reference)
    sizes, differing = [], 0
    for row, (own, response) in enumerate(zip(sets, rollout.responses, strict=True)):
        count, at = len(response), np.arange(len(response))
        assert own[at, response].all()
        for logits, drawn in zip(policy[row], own, strict=True):
            check_set(logits, drawn, **BOUNDS[name])
            sizes.append(int(drawn.sum()))
        expected = on_set(policy[row], own)[at, response]
        for found in (rollout.logprobs[row], world.batch.old_logprobs[row]):
            np.testing.assert_allclose(np.array(found)[:count], expected, atol=1e-4)
        np.testing.assert_allclose(referred[row, :count], on_set(reference[row], own)[at, response], atol=1e-4)
        others = np.argsort(reference[row], axis=-1)[:, ::-1]
        differing += sum(set(np.flatnonzero(drawn)) != set(order[: drawn.sum()])
                         for drawn, order in zip(own, others, strict=True))  # fmt: skip
    assert 1 < np.mean(sizes) < 0.5 * policy[0].shape[-1]
    assert differing > 10, "the reference has other sets, so that it matters whose they are"


def check_set(logits: np.ndarray, drawn: np.ndarray, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> None:
    """A set holds the most probable tokens, as many as the bounds say, but for what lies within rounding of a bound."""
    falling = np.sort(logits)[::-1]
    mass = np.exp(falling - falling[0])
    count = int(drawn.sum())
    assert set(np.flatnonzero(drawn)) == set(np.argsort(-logits, kind="stable")[:count])
    bounds = [top_k or len(logits)]
    mass_of = mass[: bounds[0]] / mass[: bounds[0]].sum()
    bounds.append(int((np.cumsum(mass_of) - mass_of < top_p).sum()) if top_p < 1 else len(logits))
    bounds.append(int((mass >= min_p).sum()))
    near = abs(np.cumsum(mass_of) - top_p).min() < 1e-5 or (min_p and abs(mass - min_p).min() < 1e-5)
    assert count == min(bounds) or near


@by_bounds
def test_entropy_and_divergence_are_those_on_the_set(make_world: MakeWorld, name: str) -> None:
    """The mean of log pi - log pi_ref over a set, exactly, is a divergence: never below 0, and 0 where both agree."""
    from mlx_ppo.models.roles import token_statistics

    world = make_world(bounds=BOUNDS[name], size=0.3)
    trunk, rollout = world.roles.trunk, world.rollout
    policy = scaled_rows(trunk, world.policy.weights, rollout)
    reference = scaled_rows(trunk, world.roles.reference, rollout)
    sets = sets_of(rollout, policy[0].shape[-1])
    sequences = rollout.sequences(sharing=True)
    with trunk.using(world.policy.weights):
        states = trunk.response_states(sequences)
        _, entropies = token_statistics(trunk, states, sequences, temperature=TEMPERATURE)
    for row, own in enumerate(sets):
        log_p, log_q = on_set(policy[row], own), on_set(reference[row], own)
        p, held = np.exp(log_p), np.where(own, log_p, 0.0)
        np.testing.assert_allclose(np.array(entropies[row])[: len(own)], -(p * held).sum(axis=-1), atol=1e-4)
        divergence = (p * (held - np.where(own, log_q, 0.0))).sum(axis=-1)
        assert (divergence > -1e-9).all() and divergence.max() > 1e-3


@by_bounds
@pytest.mark.parametrize("form", ["plain", "kept", "8-bit", "full"])
def test_the_first_ratio_is_1_and_gradients_dont_depend_on_the_batches(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, name: str, form: str
) -> None:
    """Rows alone, together, with shared prompts, from kept states, with all weights trained."""
    how: dict[str, Any] = {"kept": {"layers": 1, "keep": True}, "8-bit": {"cache_form": "8-bit"},
                           "full": {"full": True}}.get(form, {})  # fmt: skip
    world = make_world(bounds=BOUNDS[name], **how)
    assert (world.rollout.kept is not None) == (form == "kept")
    found = []

    class Recorder:
        def step(self, engine: Any, weights: Any, gradients: Any, *, what: str) -> tuple[Any, float]:
            seen.append({key: np.array(array) for key, array in gradients.items()})
            return weights, 0.0

    for size in (1, 3, 0):
        seen: list[dict[str, np.ndarray]] = []
        world.policy.optimizer = world.critic.optimizer = Recorder()
        stats = world.update(epochs=1, minibatches=1, micro_batch=size, entropy_coef=0.2 if size == 3 else 0.0)
        assert stats.first_ratio_error < 1e-4
        if size != 3:
            found.append(seen[0])
    largest = max(np.abs(array).max() for array in found[0].values())
    for key, array in found[0].items():
        np.testing.assert_allclose(found[1][key], array, atol=3e-5 * largest, err_msg=key)


@by_bounds
def test_the_gradient_is_that_of_the_truncated_objective(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Against mlx's own gradient of -A log pi(a | S) - c H(pi | S), spelt out on the logits of each row by itself."""
    from mlx_ppo.stages.losses import PolicyTargets, policy_loss

    world = make_world(bounds=BOUNDS[name], size=0.3)
    trunk, rollout, coef = world.roles.trunk, world.rollout, 0.3
    vocabulary = trunk.logits(mx.zeros((1, trunk.width))).shape[-1]
    sets = sets_of(rollout, vocabulary)

    def loss(arrays: dict[str, mx.array]) -> mx.array:
        total = mx.zeros(())
        for row, own in enumerate(sets):
            prompt, response = rollout.prompts[row], mx.array(rollout.responses[row])
            with trunk.using(world.policy.weights.holding(arrays)):
                logits = trunk.model(mx.array([prompt + rollout.responses[row]]))[0, len(prompt) - 1 : -1]
            log_p = mx.where(mx.array(own), logits / TEMPERATURE, -1e30)
            log_p = log_p - mx.logsumexp(log_p, axis=-1, keepdims=True)
            entropies = -(mx.exp(log_p) * mx.where(mx.array(own), log_p, 0.0)).sum(axis=-1)
            now = mx.take_along_axis(log_p, response[:, None], axis=-1)[:, 0]
            advantages = world.batch.advantages[row, : len(own)]
            total = total - (mx.exp(now - mx.stop_gradient(now)) * advantages + coef * entropies).sum()
        return total / 7.0

    from mlx_ppo.config.sections import PPOSection

    section = PPOSection(clip_low=1.0, clip_high=50.0, dual_clip=0.0, entropy_coef=coef)
    targets = PolicyTargets(world.batch.old_logprobs, world.batch.advantages, 7.0)
    how = Pass(section, TEMPERATURE, saving=False)
    found = mx.grad(lambda arrays: policy_loss(
        trunk, world.policy.weights, rollout.sequences(sharing=True), targets, how)(arrays)[0]
    )(dict(world.policy.weights.arrays))  # fmt: skip
    wanted = mx.grad(loss)(dict(world.policy.weights.arrays))
    largest = max(np.abs(np.array(array)).max() for array in wanted.values())
    for key, array in wanted.items():
        np.testing.assert_allclose(np.array(found[key]), np.array(array), atol=1e-4 * largest, err_msg=key)


def drawn(trunk: Trunk, prompts: Any, **changes: Any) -> Rollout:
    options: dict[str, Any] = {"seed_parts": (0, "rollout"), "max_tokens": 12, "samples_per_prompt": 3, **changes}
    asked = Asked(prompts, range(len(prompts)), [{}] * len(prompts))
    return generate(trunk, Weights({}), asked, Sampling(**options))


@by_bounds
def test_batch_size_changes_nothing(make_model: Callable[..., Path], prompts: Any, name: str) -> None:
    trunk = load_trunk(make_model(eos_token_id=[2, *range(100, 140)]))
    alone, *others = (drawn(trunk, prompts, batch_size=size, **BOUNDS[name]) for size in (1, 3, 7, 64))
    assert len({len(response) for response in alone.responses}) > 3
    vocabulary = trunk.logits(mx.zeros((1, trunk.width))).shape[-1]
    wanted = np.concatenate(sets_of(alone, vocabulary))
    for other in others:
        assert other.responses == alone.responses
        assert (np.concatenate(sets_of(other, vocabulary)) != wanted).sum() <= 2, "but for rounding"
    assert drawn(trunk, prompts, **BOUNDS[name]).responses != drawn(trunk, prompts).responses


def test_rows_have_their_own_sets(make_world: MakeWorld) -> None:
    """In any order, with shared prompts or without, and none where all tokens could be drawn."""
    rollout = make_world(bounds={"top_k": 9}).rollout
    whole = np.array(rollout.support)
    ends = np.cumsum([len(response) for response in rollout.responses])
    for rows in ([0], [3, 1], [9, 0, 4], list(range(10))):
        for sharing in (False, True):
            sequences: Sequences = rollout.sequences(rows, sharing=sharing)
            wanted = [whole[ends[row] - len(rollout.responses[row]) : ends[row]] for row in rows]
            np.testing.assert_array_equal(np.array(sequences.support), np.concatenate(wanted))
            assert len(sequences.support) == len(sequences.targets)
    assert make_world().rollout.support is None and make_world().rollout.sequences([0]).support is None


def test_sets_are_kept_only_where_they_are_wanted(trunk: Trunk, prompts: Any) -> None:
    kept, bare = (drawn(trunk, prompts, top_k=4, supports=wanted) for wanted in (True, False))
    assert kept.responses == bare.responses and kept.support is not None and bare.support is None
    greedy = drawn(trunk, prompts, top_k=4, temperature=0.0)
    assert greedy.support is None and greedy.responses == drawn(trunk, prompts, temperature=0.0).responses


def test_top_k_of_the_whole_vocabulary_leaves_nothing_out(trunk: Trunk, prompts: Any) -> None:
    whole, plain = drawn(trunk, prompts, top_k=10**9), drawn(trunk, prompts)
    assert whole.responses == plain.responses
    np.testing.assert_allclose(np.array(whole.logprobs), np.array(plain.logprobs), atol=1e-6)
    vocabulary = trunk.logits(mx.zeros((1, trunk.width))).shape[-1]
    assert all(own.all() for own in sets_of(whole, vocabulary))


def test_a_quantised_model(
    make_model: Callable[..., Path], quantised: Callable[..., Path], make_world: MakeWorld
) -> None:
    trunk = load_trunk(quantised(make_model(eos_token_id=[2, *range(100, 179)])))
    world = make_world(given=trunk, bounds=BOUNDS["all"])
    assert world.update(epochs=1, minibatches=1).first_ratio_error < (1e-4 if trunk.engine.exact(trunk) else 0.1)
