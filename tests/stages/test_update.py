from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo.compute.engine import Engine
from mlx_ppo.errors import RunError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.roles import token_statistics
from mlx_ppo.stages.optimizer import Learner
from mlx_ppo.stages.records import Rollout

MakeWorld = Callable[..., Any]  # the fixture of conftest.py


@dataclass
class Recorder:
    """Stands in for an optimizer: keeps the gradients and leaves the weights as they are."""

    seen: list[dict[str, np.ndarray]] = field(default_factory=list)

    def step(
        self, engine: Engine, weights: Weights, gradients: Mapping[str, mx.array], *, what: str
    ) -> tuple[Weights, float]:
        self.seen.append({name: np.array(gradient) for name, gradient in gradients.items()})
        return weights, 0.0


def record(world: Any) -> tuple[Recorder, Recorder]:
    """Recorders in place of the optimizers of policy and critic."""
    world.policy.optimizer, world.critic.optimizer = Recorder(), Recorder()
    return world.policy.optimizer, world.critic.optimizer


def state_of(learner: Learner) -> dict[str, np.ndarray]:
    found = {name: np.array(array) for name, array in learner.weights.arrays.items()}
    found.update({f"state/{name}": np.array(array) for name, array in learner.optimizer.state().items()})
    return {**found, "steps": np.array(learner.optimizer.steps)}


def assert_equal(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array, err_msg=name)


def assert_near(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    size = max(np.abs(array).max() for array in first.values())
    for name, array in first.items():
        np.testing.assert_allclose(second[name], array, atol=2e-5 * size, err_msg=name)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("aggregate", ["token-mean", "sequence-mean", "constant"])
def test_gradients_are_those_of_the_formula_whatever_the_micro_batch(
    make_world: MakeWorld, aggregate: str, full: bool
) -> None:
    """Where the ratio is 1: the sum of -A grad log pi over the step's own denominator, row by row without padding."""
    world = make_world(full=full)
    recorders = {}
    for size in (1, 3, 8, 0):
        recorders[size] = record(world)
        world.update(epochs=1, minibatches=1, micro_batch=size, aggregate=aggregate, entropy_coef=0.3)
    count = len(world.rollout.prompts)
    lengths = [len(response) for response in world.rollout.responses]
    assert len(set(lengths)) > 2

    def loss(arrays: dict[str, mx.array]) -> mx.array:
        total = mx.zeros(())
        for row, length in enumerate(lengths):
            sequences = world.rollout.sequences([row])
            with world.roles.trunk.using(world.policy.weights.holding(arrays)):
                states = world.roles.trunk.response_states(sequences, learning=True)
                now, entropy = token_statistics(
                    world.roles.trunk, states, sequences, temperature=world.rollout.temperature
                )
            each = -world.batch.advantages[row, :length] * now[0, :length] - 0.3 * entropy[0, :length]
            total = total + each.sum() / (length if aggregate == "sequence-mean" else 1)
        return (
            total
            / {"token-mean": sum(lengths), "sequence-mean": count, "constant": count * world.rollout.max_tokens}[
                aggregate
            ]
        )

    gradients = mx.grad(loss)(dict(world.policy.weights.arrays))
    expected = {name: np.array(gradient) for name, gradient in gradients.items()}
    for policy, critic in recorders.values():
        assert len(policy.seen) == len(critic.seen) == 1
        assert_near(expected, policy.seen[0])
        assert_near(recorders[1][1].seen[0], critic.seen[0])


@pytest.mark.parametrize("aggregate", ["token-mean", "sequence-mean", "constant"])
def test_weights_dont_depend_on_the_micro_batch(make_world: MakeWorld, aggregate: str) -> None:
    found = []
    for size in (1, 8, 0):
        world = make_world()
        world.update(epochs=2, minibatches=2, micro_batch=size, aggregate=aggregate)
        found.append({**state_of(world.policy), **state_of(world.critic)})
    start = state_of(make_world().policy)
    moved = max(np.abs(found[0][name] - array).max() for name, array in start.items() if name in found[0])
    assert moved > 1e-3
    for other in found[1:]:
        for name, array in found[0].items():
            np.testing.assert_allclose(other[name], array, atol=1e-4, err_msg=name)


def test_rows_of_similar_length_are_read_together(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world, seen, real = make_world(samples=1), list[list[int]](), Rollout.sequences

    def sequences(rollout: Rollout, rows: list[int], *, sharing: bool = False) -> Any:
        seen.append([sum(rollout.lengths[row]) for row in rows])
        return real(rollout, rows, sharing=sharing)

    monkeypatch.setattr(Rollout, "sequences", sequences)
    world.update(epochs=1, minibatches=1, micro_batch=2)
    lengths = [length for part in seen for length in part]
    assert max(map(len, seen)) == 2 < len(lengths) == len(world.rollout.prompts)
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 3), (3, 10)])
def test_one_optimizer_step_a_minibatch_and_every_row_once_an_epoch(
    make_world: MakeWorld, epochs: int, minibatches: int
) -> None:
    world = make_world()
    policy, critic = record(world)
    stats = world.update(epochs=epochs, minibatches=minibatches, aggregate="constant")
    assert len(policy.seen) == len(critic.seen) == len(stats.policy_loss) == epochs * minibatches
    whole, _ = record(world)
    world.update(epochs=1, minibatches=1, aggregate="constant")
    sizes = [len(part) for part in np.array_split(range(10), minibatches)]
    for epoch in range(epochs):
        steps = policy.seen[epoch * minibatches : (epoch + 1) * minibatches]
        total = {name: sum(n * step[name] for n, step in zip(sizes, steps, strict=True)) / 10 for name in steps[0]}
        assert_near(whole.seen[0], total)
    if epochs > 1:
        assert any((policy.seen[0][name] != policy.seen[minibatches][name]).any() for name in policy.seen[0])


def test_the_order_derives_from_the_seed(make_world: MakeWorld) -> None:
    seen = []
    for seed in (0, 0, 1):
        world = make_world()
        recorder, _ = record(world)
        world.update(epochs=1, minibatches=5, seed=seed)
        seen.append(recorder.seen[0])
    assert_equal(seen[0], seen[1])
    assert any((seen[0][name] != seen[2][name]).any() for name in seen[0])


@pytest.mark.parametrize("full", [False, True])
def test_the_policy_moves_as_told_and_the_reference_stays(make_world: MakeWorld, full: bool) -> None:
    world = make_world(full=full)
    reference, before = world.logprobs(world.roles.reference), world.logprobs(world.policy.weights)
    better = np.arange(10) % 2 == 0
    signs = mx.array(np.where(better, 1.0, -1.0), mx.float32)
    world.batch = world.batch._replace(advantages=mx.where(world.rollout.mask, signs[:, None], 0.0))
    for _ in range(3):
        now = mx.array(world.logprobs(world.policy.weights))
        world.batch = world.batch._replace(old_logprobs=now)
        stats = world.update(epochs=2, minibatches=2)
        assert stats.first_ratio_error < 1e-4
    np.testing.assert_array_equal(world.logprobs(world.roles.reference), reference)
    gained = (world.logprobs(world.policy.weights) - before).sum(axis=1)
    assert gained[better].mean() > 0.05
    assert gained[~better].mean() < -0.05


def test_self_check_refuses_old_logprobs_of_other_weights(make_world: MakeWorld) -> None:
    world = make_world()
    before = state_of(world.policy), state_of(world.critic)
    world.batch = world.batch._replace(old_logprobs=mx.array(world.logprobs(world.roles.reference)))
    with pytest.raises(RunError, match="self-check failed"):
        world.update(minibatches=2)
    for state, learner in zip(before, (world.policy, world.critic), strict=True):
        assert_equal(state, state_of(learner))


@pytest.mark.parametrize("where", ["advantages", "old_logprobs", "old_values", "returns"])
@pytest.mark.parametrize("train_policy", [True, False])
def test_a_nan_is_never_applied(make_world: MakeWorld, where: str, train_policy: bool) -> None:
    world = make_world()
    before = state_of(world.policy), state_of(world.critic)
    array = getattr(world.batch, where)
    slot = mx.arange(10)[:, None] == 7
    world.batch = world.batch._replace(**{where: mx.where(slot & (mx.arange(array.shape[1]) == 0), mx.nan, array)})
    with pytest.raises(RunError, match="the loss is not finite"):
        world.update(epochs=1, minibatches=1, train_policy=train_policy)
    for state, learner in zip(before, (world.policy, world.critic), strict=True):
        assert_equal(state, state_of(learner))


def test_a_critic_whose_gradient_overflows_leaves_the_policy_as_it_was(make_world: MakeWorld) -> None:
    """Its loss is still finite, so only the gradient's norm tells."""
    world = make_world("head", only=1, samples=1, max_tokens=1)
    before = state_of(world.policy), state_of(world.critic)
    world.batch = world.batch._replace(returns=mx.full((1, 1), 1.8e19))
    with pytest.raises(RunError, match="critic's gradient"):
        world.update(epochs=1, minibatches=1, value_clip=0.0)
    for state, learner in zip(before, (world.policy, world.critic), strict=True):
        assert_equal(state, state_of(learner))


@pytest.mark.parametrize("kind", ["adapters", "head", "model"])
def test_the_critic_learns_while_the_policy_stays(make_world: MakeWorld, kind: str) -> None:
    world = make_world(kind)
    before, losses = state_of(world.policy), []
    for seed in range(12):
        losses += world.update(train_policy=False, seed=seed, value_clip=0.0, epochs=1, minibatches=2).value_loss
    assert np.mean(losses[-2:]) < (0.85 if kind == "head" else 0.4) * np.mean(losses[:2])
    assert_equal(before, state_of(world.policy))
    assert world.critic.optimizer.steps == 24


@pytest.mark.parametrize("kind", ["adapters", "head", "model"])
def test_the_critics_gradients_are_those_of_the_formula(make_world: MakeWorld, kind: str) -> None:
    """The mean of (V - R)^2 / 2 over the tokens, on the critic's own states; with kind head on the policy's."""
    world = make_world(kind)
    critic, role, rollout = world.critic.weights, world.roles.critic, world.rollout
    head = mx.random.normal((32,), key=mx.random.key(0))
    world.critic.weights = critic = critic.holding({**critic.arrays, "head.weight": head})
    tokens = rollout.mask.sum()

    def loss(arrays: dict[str, mx.array]) -> mx.array:
        total = mx.zeros(())
        for row, response in enumerate(rollout.responses):
            sequences = rollout.sequences([row])
            with role.trunk.using(world.policy.weights if kind == "head" else critic.holding(arrays)):
                states = role.trunk.response_states(sequences, learning=True)
            values = states @ arrays["head.weight"] + arrays["head.bias"]
            total = total + 0.5 * mx.square(values - world.batch.returns[row, : len(response)]).sum()
        return total / tokens

    gradients = mx.grad(loss)(dict(critic.arrays))
    expected = {name: np.array(gradient) for name, gradient in gradients.items()}
    assert {name for name, gradient in expected.items() if not gradient.any()} <= {"lm_head.weight"}
    for size in (3, 0):
        _, recorder = record(world)
        world.update(epochs=1, minibatches=1, micro_batch=size, value_clip=0.0)
        assert_near(expected, recorder.seen[0])


@pytest.mark.parametrize("kind", ["adapters", "head", "model"])
def test_the_critic_sends_no_gradient_into_the_policy(make_world: MakeWorld, kind: str) -> None:
    worlds = [make_world(kind), make_world(None)]
    for world in worlds:
        world.update(epochs=2, minibatches=2)
    assert_equal(state_of(worlds[0].policy), state_of(worlds[1].policy))
    if kind == "head":
        assert worlds[0].critic.weights.arrays.keys() == {"head.weight", "head.bias"}


def test_passes_end_when_the_policy_has_moved_far(make_world: MakeWorld) -> None:
    stats = make_world().update(epochs=4, minibatches=2, stop_at_kl=1e-7)
    assert stats.stopped_early
    assert len(stats.policy_loss) == 2
    stats = make_world().update(epochs=4, minibatches=2, stop_at_kl=100.0)
    assert not stats.stopped_early
    assert len(stats.policy_loss) == 8


@pytest.mark.parametrize("kind", ["adapters", "head"])
def test_kept_states_give_the_losses_and_weights_of_the_whole_pass(make_world: Callable[..., Any], kind: str) -> None:
    """With adapters on the upper of two blocks; the states are kept by the rollout and read by every role."""
    worlds = [make_world(kind, layers=1, keep=keep) for keep in (False, True)]
    assert [world.rollout.kept is None for world in worlds] == [True, False]
    stats = [world.update(epochs=2, minibatches=2) for world in worlds]
    np.testing.assert_allclose(stats[0].policy_loss, stats[1].policy_loss, atol=1e-5)
    np.testing.assert_allclose(stats[0].value_loss, stats[1].value_loss, rtol=1e-4)
    np.testing.assert_allclose(stats[0].policy_norm, stats[1].policy_norm, rtol=1e-3)
    for a, b in ((w.policy.weights.arrays, o.policy.weights.arrays) for w, o in [worlds]):
        for name, array in a.items():
            np.testing.assert_allclose(np.array(array), np.array(b[name]), atol=1e-4, err_msg=name)
    spoilt = worlds[1].rollout._replace(kept=worlds[1].rollout.kept + 1)
    worlds[1].rollout = spoilt
    with pytest.raises(RunError, match="self-check"):
        worlds[1].update()


@pytest.mark.parametrize("full", [False, True])
def test_checkpointing_gives_the_same_gradients(make_world: MakeWorld, full: bool) -> None:
    seen = []
    for checkpointing in ("off", "on"):
        world = make_world(full=full)
        recorder, _ = record(world)
        world.update(epochs=1, minibatches=1, gradient_checkpointing=checkpointing)
        seen.append(recorder.seen[0])
    assert any(array.any() for array in seen[0].values())
    assert_near(seen[0], seen[1])


@pytest.mark.parametrize("kind", ["adapters", "head"])
def test_without_kept_states_every_pass_is_whole(make_world: Callable[..., Any], kind: str) -> None:
    """Roles on the upper block share what lies below, and a rollout whose cache isn't exact keeps nothing of it."""
    plain = make_world(kind, layers=1)
    world = make_world(kind, layers=1, keep=True, cache_form="8-bit")
    assert world.roles.trunk.split == 1 and world.rollout.kept is None
    assert world.rollout.responses == plain.rollout.responses, "heads of 8 stay as they are"
    stats = [one.update(epochs=2, minibatches=2, gradient_checkpointing="on") for one in (plain, world)]
    np.testing.assert_allclose(stats[0].policy_loss, stats[1].policy_loss, atol=1e-5)
    np.testing.assert_allclose(stats[0].value_loss, stats[1].value_loss, rtol=1e-4)
