"""Direct preference optimization: a policy learns from pairs of answers, without a reward model and without sampling.

Source: Rafailov et al. 2023, arXiv:2305.18290. The reference is the policy as it begins; what it gives to each answer
is computed once, before the first step, so that it needs no memory of its own. `kto` learns from answers judged alone.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo import kto
from mlx_ppo.algo.losses import direct_preference_loss
from mlx_ppo.answer_logprobs import measured, summed_logprobs
from mlx_ppo.config.supervised import DPOConfig
from mlx_ppo.data.batches import length_batches
from mlx_ppo.data.judgements import both_answers
from mlx_ppo.data.preferences import Pair, PairSet, load_pairs
from mlx_ppo.data.sequences import cut_said
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.roles import initial_weights
from mlx_ppo.reporting import Silent
from mlx_ppo.rewards.figures import Floats
from mlx_ppo.runs.folder import Run
from mlx_ppo.runtime.group import Group
from mlx_ppo.runtime.signals import Interrupts
from mlx_ppo.stages.optimizer import Optimizer
from mlx_ppo.supervised import Course, Fit, StepReporter, Task
from mlx_ppo.supervised_models import (
    PolicyJob,
    follow_policy,
    load_trainable,
    require_room,
    train_policy,
    work_of,
)

_HELD_OUT = 256  # training pairs that are measured where there is no validation file


class Batch(NamedTuple):
    """Pairs, and what the reference gives to their answers."""

    pairs: Sequence[Pair]
    reference: Floats  # [p, 2] nats, of the chosen and the rejected answer


def optimize(config: DPOConfig, run: Run, reporter: StepReporter, interrupts: Interrupts) -> Path:
    """Train on pairs (`kto`: on judged answers) and write the finished model or adapters; returns their folder.

    Raises:
        UserError: whatever is wrong with model or data, or went wrong.
    """
    return train_policy(_job(config, reporter), config, run, reporter, interrupts)


def follow(config: DPOConfig, group: Group) -> None:
    """Do the same steps as the process that leads, on this one's part of each batch.

    Raises:
        UserError: as `optimize`.
    """
    follow_policy(_job(config, Silent()), group)


def _job(config: DPOConfig, reporter: StepReporter) -> PolicyJob:
    return kto.Job(config, reporter) if config.dpo.loss == "kto" else _Job(config, reporter)


def text_lengths(config: DPOConfig, tokenizer: Tokenizer, reporter: StepReporter) -> list[list[int] | None]:
    """Tokens of each text of the training and of the validation data, of which the second may be missing.

    Raises:
        DataError: a file can't be read, or a row is wrong.
    """
    if config.dpo.loss == "kto":
        judged = kto.load_data(config, tokenizer, reporter)
        return [[len(answer.tokens) for answer in part.answers] if part else None for part in judged]
    return [lengths(part.pairs) if part else None for part in load_data(config, tokenizer, reporter)]


def load_data(config: DPOConfig, tokenizer: Tokenizer, reporter: StepReporter) -> tuple[PairSet, PairSet | None]:
    """Training and validation pairs.

    Raises:
        DataError: a file can't be read, or a row is wrong.
    """
    section, sets = config.data, list[PairSet]()
    for path in filter(None, (section.train, section.validation)):
        found = load_pairs(
            path, tokenizer, max_tokens=section.max_tokens, overlong=section.overlong, columns=section.columns
        )
        for line in filter(None, (found.said, cut_said(path, found.dropped, found.truncated))):
            reporter.message(line)
        sets.append(found)
    return sets[0], sets[1] if len(sets) > 1 else None


class _Job:
    """Model and data, loaded."""

    def __init__(self, config: DPOConfig, reporter: StepReporter) -> None:
        """Load them."""
        self.config, self.reporter, size = config, reporter, config.dpo.batch_size
        self.trunk = trunk = load_trainable(config.model, config.run.seed)
        train, validation = load_data(config, trunk.tokenizer, reporter)
        self.train, self.held_out = train.pairs, (validation or train).pairs
        if validation is None:
            self.held_out = self.held_out[:_HELD_OUT]
        texts = lengths(self.train)
        kept = require_room(trunk, config.model, config.lora, texts, 2 * size)
        weights = initial_weights(trunk, config.model, config.lora, key="policy", seed=config.run.seed)
        longest = max(*texts, *lengths(self.held_out))
        for remark in (*trunk.remarks, *trunk.within(longest)):
            reporter.message(remark)
        steps = config.dpo.epochs * math.ceil(len(self.train) / size)
        optimizer = Optimizer(config.optimizer, learning_rate=config.optimizer.learning_rate, total_steps=steps)
        self.state = Fit(weights, optimizer)
        self.start = weights
        self.course = Course(config.run, config.dpo.epochs, 0, trunk.blocks, validation is not None)
        self.work = work_of(trunk, weights, texts, config.dpo.epochs, min(size, len(self.train)), kept)

    def task(self, group: Group) -> Task[Batch]:
        """What is trained, by the processes of a group; the reference's log-probabilities are computed here."""
        apart = self.course.validated
        count = len(self.train) + (len(self.held_out) if apart else 0)
        self.reporter.message(f"reading {count} pairs by the reference")
        reference = self._measured(self.start, self.train, group)
        of_held_out = self._measured(self.start, self.held_out, group) if apart else reference[: len(self.held_out)]
        rows = [max(map(len, (pair.chosen, pair.rejected))) for pair in self.train]
        size, seed = self.config.dpo.batch_size, self.config.run.seed

        def batches(epoch: int) -> list[Batch]:
            groups = length_batches(rows, max_rows=size, max_tokens=None, seed_parts=(seed, epoch))
            return [Batch([self.train[row] for row in rows], reference[list(rows)]) for rows in groups]

        def sizes(batch: Batch) -> list[int]:
            return [len(pair.chosen) + len(pair.rejected) for pair in batch.pairs]

        def validate(weights: Weights) -> dict[str, float]:
            now = self._measured(weights, self.held_out, group)
            gained = self._log_ratios(mx.array(now), mx.array(of_held_out), self.held_out)
            leads = np.array(gained[0] - gained[1])
            return {
                "loss": float(np.array(self._losses(*gained)).mean()),
                "accuracy": float((leads > 0).mean()),
                "margin": self.config.dpo.beta * float(leads.mean()),
                "chosen": float(np.array(now[:, 0] - of_held_out[:, 0]).mean()),
            }

        return Task(self.trunk.engine, batches, sizes, self._loss, validate, group)

    def _loss(self, weights: Weights, batch: Batch, own: Sequence[int], key: mx.array) -> mx.array:
        pairs = [batch.pairs[at] for at in own]
        now = summed_logprobs(self.trunk, weights, both_answers(pairs), learning=True).reshape(len(pairs), 2)
        losses = self._losses(*self._log_ratios(now, mx.array(batch.reference[list(own)]), pairs))
        return losses.sum() / len(batch.pairs)

    def _losses(self, chosen: mx.array, rejected: mx.array) -> mx.array:
        section = self.config.dpo
        return direct_preference_loss(
            chosen,
            rejected,
            beta=section.beta,
            kind="ipo" if section.loss == "ipo" else "sigmoid",
            label_smoothing=section.label_smoothing,
        )

    def _log_ratios(self, now: mx.array, reference: mx.array, pairs: Sequence[Pair]) -> tuple[mx.array, mx.array]:
        """Of the chosen and the rejected answers [p]; IPO's are means over their tokens."""
        ratios = now - reference
        if self.config.dpo.loss == "ipo":
            ratios = ratios / mx.array([answer_lengths(pair) for pair in pairs])
        return ratios[:, 0], ratios[:, 1]

    def _measured(self, weights: Weights, pairs: Sequence[Pair], group: Group) -> Floats:
        """Log-probabilities [p, 2] of the answers, computed by the processes of the group together."""
        rows = [max(map(len, (pair.chosen, pair.rejected))) for pair in pairs]
        batches = length_batches(rows, max_rows=self.config.dpo.batch_size, max_tokens=None, seed_parts=None)
        both = [[2 * row + side for row in batch for side in (0, 1)] for batch in batches]
        return measured(self.trunk, weights, both_answers(pairs), both, group).reshape(len(pairs), 2)


def lengths(pairs: Sequence[Pair]) -> list[int]:
    """Tokens of every text of some pairs."""
    return [len(text) for pair in pairs for text in (pair.chosen, pair.rejected)]


def answer_lengths(pair: Pair) -> list[int]:
    """Tokens of the two answers, EOS included."""
    return [len(pair.chosen) - pair.starts[0], len(pair.rejected) - pair.starts[1]]
