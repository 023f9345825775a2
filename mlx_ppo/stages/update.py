"""A scored rollout into new weights: epochs, minibatches, micro-batches, two optimizers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.diagnostics import approx_kl, clip_fractions, effective_sample_size
from mlx_ppo.algo.masked import masked_mean
from mlx_ppo.compute.engine import Engine
from mlx_ppo.compute.sequences import Sequences
from mlx_ppo.config.sections import PPOSection
from mlx_ppo.data.random import philox
from mlx_ppo.errors import RunError
from mlx_ppo.models.roles import Roles
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.runtime.phases import phase
from mlx_ppo.stages.losses import CriticTargets, Pass, PolicyTargets, critic_loss, policy_loss
from mlx_ppo.stages.optimizer import Learner, Learners, finite_norm
from mlx_ppo.stages.records import PPOBatch, Rollout, UpdateStats, number

RATIO_TOLERANCE = 1e-4  # of |ratio - 1|, where everything is computed in float32
# Nats a token, of the mean |log ratio| elsewhere: there single tokens are off by a hundredth or two where rows are
# batched otherwise than they were for scoring, and rounded otherwise.
_LOG_RATIO_TOLERANCE = 0.02
_FEW = 16.0  # tokens whose mean may be twice that: it strays by the root of their number

Gradients = dict[str, mx.array]


class Schedule(NamedTuple):
    """How an update goes over its rollout."""

    section: PPOSection
    seed_parts: tuple[int | str, ...]  # what the order of the minibatches derives from
    choices: Callable[[], Choices]  # asked before every optimizer step; they change memory, not the gradient
    train_policy: bool = True  # False while only the critic is warmed up


def update(roles: Roles, learners: Learners, rollout: Rollout, batch: PPOBatch, schedule: Schedule) -> UpdateStats:
    """Several passes over the rollout; the learners are changed in place.

    Args:
        roles: the shared trunks.
        learners: weights and optimizers of policy and critic.
        rollout: the responses.
        batch: old log-probabilities, advantages, old values, returns.
        schedule: epochs, minibatches, and what each of their steps may have in memory.
    Raises:
        RunError: a loss or gradient is not finite, or the first minibatch's ratio is not 1. Nothing is applied then.
    """
    stats = UpdateStats()
    section, train_policy = schedule.section, schedule.train_policy
    generator = philox(*schedule.seed_parts)
    step = _Step(roles, learners, rollout, batch, schedule)
    for epoch in range(section.epochs):
        order = generator.permutation(len(rollout.prompts))
        for index, rows in enumerate(np.array_split(order, section.minibatches)):
            first = epoch == 0 and index == 0
            step.run(rows.tolist(), stats, schedule.choices(), first=first)
        if (
            section.stop_at_kl
            and train_policy
            and np.mean(stats.kl_to_old[-section.minibatches :]) > section.stop_at_kl
        ):
            stats.stopped_early = epoch + 1 < section.epochs
            break
    return stats


@dataclass
class _Step:
    """One optimizer step of policy and critic over one minibatch."""

    roles: Roles
    learners: Learners
    rollout: Rollout
    batch: PPOBatch
    schedule: Schedule

    def run(self, rows: Sequence[int], stats: UpdateStats, choices: Choices, *, first: bool) -> None:
        policy, critic, train_policy = self.learners.policy, self.learners.critic, self.schedule.train_policy
        how = Pass(self.schedule.section, self.rollout.temperature, choices.checkpointing, learning=train_policy)
        self.roles.trunk.positions = choices.positions
        size, sharing = choices.micro_batch or len(rows), self._sharing(saving=how.saving)
        if sharing:  # rows of one prompt side by side
            rows = sorted(rows, key=self.rollout.prompts.__getitem__)
        elif size < len(rows):  # rows of similar length, which need little padding; the longest first
            lengths = self.rollout.lengths
            rows = sorted(rows, key=lambda row: -sum(lengths[row]))
        parts = self._parts(rows, sharing=sharing)
        own, rows = parts[self.roles.group.rank], [row for part in parts for row in part]
        mask = self.rollout.mask[mx.array(list(rows))]
        tokens = number(mask.sum())
        if tokens == 0:
            return
        denominator = {
            "token-mean": tokens,
            "sequence-mean": number(mask.any(axis=1).sum()),
            "constant": float(len(rows) * self.rollout.max_tokens),
        }[self.schedule.section.aggregate]
        work = _Work(own, size, sharing, tokens, denominator)
        passes, policy_gradients, critic_gradients = self._passes(work, how)
        if self.roles.group.size > 1:
            before = sum(map(len, parts[: self.roles.group.rank]))
            found = self._of_all(passes, before, len(rows), policy_gradients, critic_gradients)
            passes, policy_gradients, critic_gradients = found
        policy_loss, value_loss = passes.policy_loss, passes.value_loss
        if not np.isfinite(policy_loss) or not np.isfinite(value_loss):
            raise RunError(f"the loss is not finite (policy {policy_loss}, critic {value_loss}); nothing was applied")
        self._watch(rows, mx.concatenate(passes.logprobs), mx.concatenate(passes.ratios), stats, first=first)
        finite_norm(
            self._engine, critic_gradients, what="critic"
        )  # before the policy's step: both are applied, or neither
        stats.policy_loss.append(policy_loss)
        if train_policy:
            with phase("update step"):
                applied = policy.optimizer.step(self._engine, policy.weights, policy_gradients, what="policy")
            policy.weights, norm = applied
            stats.policy_norm.append(norm)
        if critic is not None:
            stats.value_loss.append(value_loss)
            with phase("update step"):
                applied = critic.optimizer.step(self._engine, critic.weights, critic_gradients, what="critic")
            critic.weights, norm = applied
            stats.critic_norm.append(norm)

    def _passes(self, work: "_Work", how: Pass) -> tuple["_Passes", Gradients, Gradients]:
        """Losses and gradients of this process's rows of a minibatch, micro-batch by micro-batch."""
        critic, own, size = self.learners.critic, work.rows, work.size
        policy_gradients: Gradients = {}
        critic_gradients: Gradients = {}
        policy_loss = value_loss = 0.0
        logprobs: list[mx.array] = []
        ratios: list[mx.array] = []
        for part in (own[start : start + size] for start in range(0, len(own), size)):
            sequences = self.rollout.sequences(part, sharing=work.sharing)
            with phase("update policy"):
                loss, (now, ratio, states), gradients = self._policy(sequences, part, work.denominator, how)
            policy_loss += loss
            logprobs.append(now)
            ratios.append(ratio)
            _accumulate(policy_gradients, gradients)
            del gradients  # they would stay in memory beside the sum
            if critic is not None:
                with phase("update critic"):
                    loss, gradients = self._critic(critic, sequences, part, work.tokens, states, how)
                value_loss += loss
                _accumulate(critic_gradients, gradients)
                del gradients
        return _Passes(policy_loss, value_loss, logprobs, ratios), policy_gradients, critic_gradients

    def _parts(self, rows: Sequence[int], *, sharing: bool) -> list[list[int]]:
        """The rows of each process of the group; those of one prompt stay together where they share it."""
        group = self.roles.group
        if group.size == 1 or sharing:
            return [[rows[at] for at in group.part(len(rows), rank=rank)] for rank in range(group.size)]
        return [[rows[at] for at in part] for part in group.deal([sum(self.rollout.lengths[row]) for row in rows])]

    def _of_all(
        self, passes: "_Passes", before: int, count: int, policy: Gradients, critic: Gradients
    ) -> tuple["_Passes", Gradients, Gradients]:
        """What the processes of the group have found for their rows of a minibatch, put together by one exchange.

        Args:
            passes: of this process, whose rows come after so many of the others'.
            before: how many.
            count: rows of the minibatch.
            policy: the policy's gradients, which are used up.
            critic: the critic's.
        """
        learners = {"policy": (self.learners.policy, policy), "critic": (self.learners.critic, critic)}
        given: Gradients = {"losses": mx.array([passes.policy_loss, passes.value_loss])}
        for name, column in (("logprobs", passes.logprobs), ("ratios", passes.ratios)):
            own = mx.concatenate(column) if column else mx.zeros((0, self.rollout.mask.shape[1]))
            given[name] = mx.pad(own, [(before, count - before - len(own)), (0, 0)])
        for role, (learner, gradients) in learners.items():
            if learner is not None and (role == "critic" or self.schedule.train_policy):
                arrays = gradients or {name: mx.zeros_like(array) for name, array in learner.weights.arrays.items()}
                given |= {f"{role} {name}": array for name, array in arrays.items()}
                del arrays
            gradients.clear()
        total = self.roles.group.total(given)
        policy_loss, value_loss = np.array(total.pop("losses")).tolist()
        found = _Passes(policy_loss, value_loss, [total.pop("logprobs")], [total.pop("ratios")])
        of_role = {
            role: {name.partition(" ")[2]: array for name, array in total.items() if name.startswith(f"{role} ")}
            for role in learners
        }
        return found, of_role["policy"], of_role["critic"]

    @property
    def _engine(self) -> Engine:
        return self.roles.trunk.engine

    def _sharing(self, *, saving: bool) -> bool:
        """Several responses have one prompt, and can be read on top of it."""
        several = len(set(self.rollout.prompts)) < len(self.rollout.prompts)
        critic = self.roles.critic
        trunks = [self.roles.trunk, *([critic.trunk] if critic is not None else [])]
        return several and all(trunk.shares_learning(saving=saving) for trunk in trunks)

    def _policy(
        self, sequences: Sequences, rows: list[int], denominator: float, how: "Pass"
    ) -> tuple[float, tuple[mx.array, mx.array, mx.array], Gradients]:
        """Loss, (log-probabilities, ratios, states) and gradients of a micro-batch; none without `how.learning`."""
        index = mx.array(rows)
        targets = PolicyTargets(self.batch.old_logprobs[index], self.batch.advantages[index], denominator)
        weights = self.learners.policy.weights
        loss_of = policy_loss(self.roles.trunk, weights, sequences, targets, how)
        if how.learning:
            (loss, now, ratio, states), gradients = mx.value_and_grad(loss_of)(dict(weights.arrays))
        else:
            (loss, now, ratio, states), gradients = loss_of(weights.arrays), {}
        mx.eval(loss, now, ratio, states, gradients)
        return number(loss), (now, ratio, states), gradients

    def _critic(
        self,
        learner: Learner,
        sequences: Sequences,
        rows: list[int],
        tokens: float,
        policy_states: mx.array,
        how: "Pass",
    ) -> tuple[float, Gradients]:
        index = mx.array(rows)
        critic = self.roles.critic
        assert critic is not None and self.batch.old_values is not None and self.batch.returns is not None
        old, returns = self.batch.old_values[index], self.batch.returns[index]
        targets = CriticTargets(old, returns, tokens)
        states = policy_states if critic.kind == "head" else None
        loss_of = critic_loss(critic, learner.weights, sequences, targets, how, states)
        loss, gradients = mx.value_and_grad(loss_of)(dict(learner.weights.arrays))
        mx.eval(loss, gradients)
        return number(loss), gradients

    def _check_itself(self, most: float, mean: float, tokens: float) -> None:
        """Before anything is learned, the probabilities must be those that scored.

        By the largest |ratio - 1| in float32; by the mean |log ratio| where single tokens are rounded coarsely.
        """
        exact = self.roles.trunk.engine.exact(self.roles.trunk)
        if most <= RATIO_TOLERANCE if exact else mean <= log_ratio_tolerance(tokens):
            return
        raise RunError(
            f"self-check failed: the first minibatch's ratio to the old policy is off 1 by up to {most:.2g}, its "
            f"logarithm by {mean:.2g} on average; the weights that scored are not those that are trained"
        )

    def _watch(
        self,
        rows: Sequence[int],
        logprobs: mx.array,
        ratio: mx.array,
        stats: UpdateStats,
        *,
        first: bool,
    ) -> None:
        """Diagnostics before the step; in the very first minibatch the ratio must be 1."""
        index = mx.array(list(rows))
        mask = self.rollout.mask[index]
        if first:
            stats.first_ratio_error = number(mx.where(mask, mx.abs(ratio - 1), 0.0).max())
            off = number(masked_mean(mx.abs(logprobs - self.batch.old_logprobs[index]), mask))
            self._check_itself(stats.first_ratio_error, off, number(mask.sum()))
        low, high = clip_fractions(
            ratio,
            self.batch.advantages[index],
            mask,
            clip_low=self.schedule.section.clip_low,
            clip_high=self.schedule.section.clip_high,
        )
        stats.clip_low.append(number(low))
        stats.clip_high.append(number(high))
        stats.kl_to_old.append(number(approx_kl(logprobs, self.batch.old_logprobs[index], mask)[1]))
        stats.effective_samples.append(number(effective_sample_size(ratio, mask)))


def log_ratio_tolerance(tokens: float) -> float:
    """Nats, of the mean |log ratio| of so many tokens."""
    return _LOG_RATIO_TOLERANCE * (1 + math.sqrt(_FEW / tokens))


def _accumulate(total: Gradients, part: Gradients) -> None:
    """Add gradients in place; an evaluation between micro-batches keeps their graphs from piling up."""
    for name, gradient in part.items():
        total[name] = total[name] + gradient if name in total else gradient
    mx.eval(total)


class _Work(NamedTuple):
    """A process's part of a minibatch."""

    rows: list[int]
    size: int  # rows together
    sharing: bool  # their prompts
    tokens: float  # counted, of the whole minibatch
    denominator: float  # of the policy's loss


class _Passes(NamedTuple):
    """What the micro-batches of a minibatch gave beside gradients."""

    policy_loss: float
    value_loss: float
    logprobs: list[mx.array]  # [B, T] each, in the order of the minibatch
    ratios: list[mx.array]  # the same
