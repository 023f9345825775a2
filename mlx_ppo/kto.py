"""Kahneman-Tversky optimization: a policy learns from answers that people found good or bad, each by itself.

Source: Ethayarajh et al. 2024, arXiv:2402.01306. As with DPO the reference is the policy as it begins. How far the
policy has moved, from which an answer's gain is counted, is estimated before each step, by answers to other prompts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.losses import kahneman_tversky_loss
from mlx_ppo.answer_logprobs import measured, summed_logprobs
from mlx_ppo.config.supervised import DPOConfig
from mlx_ppo.data.batches import length_batches
from mlx_ppo.data.judgements import Answer, Judged, balance, load_judged, mismatched
from mlx_ppo.data.random import philox
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ConfigError, RunError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.roles import initial_weights
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.rewards.figures import Floats
from mlx_ppo.runtime.group import Group
from mlx_ppo.stages.optimizer import Optimizer
from mlx_ppo.supervised import Course, Fit, StepReporter, Task
from mlx_ppo.supervised_models import load_trainable, require_room, work_of

_HELD_OUT = 512  # training answers that are measured where there is no validation file


class Batch(NamedTuple):
    """Rows of the training data, and how far the policy has moved in general when they are read."""

    rows: Sequence[int]
    moved: float = 0.0  # nats, at least 0


def load_data(config: DPOConfig, tokenizer: Tokenizer, reporter: StepReporter) -> tuple[Judged, Judged | None]:
    """Training and validation answers; ratings of both are parted at the training data's threshold, where it has one.

    Raises:
        ConfigError: a threshold, and the data are pairs.
        DataError: a file can't be read, a row is wrong, or one kind of answers is missing.
    """
    section, above = config.data, config.dpo.good_above
    sets = list[Judged]()
    for path in filter(None, (section.train, section.validation)):
        found = load_judged(
            path, tokenizer, max_tokens=section.max_tokens, overlong=section.overlong, columns=section.columns,
            above=above,
        )  # fmt: skip
        above = found.above if above is None else above
        sets.append(found)
        for line in found.said:
            reporter.message(line)
    if config.dpo.good_above is not None and all(found.above is None for found in sets):
        raise ConfigError(
            f"dpo.good_above: {section.train} has pairs, which say themselves what is good; remove the key"
        )
    if not any(answer.prompt for answer in sets[0].answers):
        reporter.message("no answer has a prompt: how far the policy has moved is told by other answers' own gains")
    return sets[0], sets[1] if len(sets) > 1 else None


class _Answers:
    """Judged answers, those to other prompts beside them, and what the reference gives to both."""

    def __init__(self, judged: Judged, config: DPOConfig) -> None:
        """Nothing is computed yet."""
        self.own, self.good = judged.answers, np.array(judged.good)
        self.elsewhere = mismatched(self.own, config.data.max_tokens, config.run.seed)
        self.size = config.dpo.batch_size
        self.reference = self.reference_elsewhere = np.zeros(len(self.own), np.float32)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer with its prompt."""
        return [len(answer.tokens) for answer in self.own]

    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(answer.tokens) for answer in (*self.own, *self.elsewhere))

    def some(self, most: int) -> list[int]:
        """Rows of both kinds as they are in all of them, at most so many, evenly from the whole."""
        by_kind = np.argsort(self.good, kind="stable")
        places = np.linspace(0, len(by_kind) - 1, min(most, len(by_kind))).round().astype(int)
        return sorted(by_kind[places].tolist())

    def gains(self, trunk: Trunk, weights: Weights, rows: Sequence[int], group: Group) -> tuple[Floats, Floats]:
        """What some rows have gained over the reference, and the answers to other prompts beside them, nats."""
        own, elsewhere = (
            self._measured(trunk, weights, [texts[row] for row in rows], group) for texts in (self.own, self.elsewhere)
        )
        found = own - self.reference[list(rows)], elsewhere - self.reference_elsewhere[list(rows)]
        if not (np.isfinite(found[0]).all() and np.isfinite(found[1]).all()):
            raise RunError("a log-probability of held-out answers is not finite; the last checkpoint stands")
        return found

    def read_by_reference(self, trunk: Trunk, weights: Weights, group: Group) -> None:
        """Keep what it gives to all of them."""
        self.reference = self._measured(trunk, weights, self.own, group)
        self.reference_elsewhere = self._measured(trunk, weights, self.elsewhere, group)

    def _measured(self, trunk: Trunk, weights: Weights, texts: Sequence[Answer], group: Group) -> Floats:
        rows = [len(answer.tokens) for answer in texts]
        batches = length_batches(rows, max_rows=self.size, max_tokens=None, seed_parts=None)
        return measured(trunk, weights, texts, batches, group)


class Job:
    """Model and data, loaded."""

    def __init__(self, config: DPOConfig, reporter: StepReporter) -> None:
        """Load them."""
        self.config, self.reporter, section = config, reporter, config.dpo
        self.trunk = trunk = load_trainable(config.model, config.run.seed)
        train, validation = load_data(config, trunk.tokenizer, reporter)
        self.bad_weight = section.bad_weight or balance(train.good)
        if not section.bad_weight:
            reporter.message(f"a bad answer weighs {self.bad_weight:.3g}, a good one 1 (dpo.bad_weight)")
        size = section.batch_size
        self.train = _Answers(train, config)
        self.held_out = self.train if validation is None else _Answers(validation, config)
        self.validated = self.held_out.some(_HELD_OUT if validation is None else len(validation.answers))
        kept = require_room(trunk, config.model, config.lora, self.train.lengths, size)
        weights = initial_weights(trunk, config.model, config.lora, key="policy", seed=config.run.seed)
        for remark in (*trunk.remarks, *trunk.within(max(self.train.longest(), self.held_out.longest()))):
            reporter.message(remark)
        steps = section.epochs * math.ceil(len(train.answers) / size)
        optimizer = Optimizer(config.optimizer, learning_rate=config.optimizer.learning_rate, total_steps=steps)
        self.state, self.start = Fit(weights, optimizer), weights
        self.course = Course(config.run, section.epochs, 0, trunk.blocks, validation is not None)
        pieces = min(size, len(train.answers))
        self.work = work_of(trunk, weights, 2 * self.train.lengths, section.epochs, pieces, kept)

    def task(self, group: Group) -> Task[Batch]:
        """What is trained, by the processes of a group; the reference's log-probabilities are computed here."""
        sets = [self.train] if self.held_out is self.train else [self.train, self.held_out]
        count = 2 * sum(len(answers.own) for answers in sets)
        self.reporter.message(f"reading {count} answers by the reference, half of them after another prompt")
        for answers in sets:
            answers.read_by_reference(self.trunk, self.start, group)
        size, seed, lengths = self.config.dpo.batch_size, self.config.run.seed, self.train.lengths

        def batches(epoch: int) -> list[Batch]:  # not by length, which often goes with what is good
            rows = philox("kto", seed, epoch).permutation(len(lengths)).tolist()
            return [Batch(rows[at : at + size]) for at in range(0, len(rows), size)]

        def prepare(weights: Weights, batch: Batch) -> Batch:
            texts = [self.train.elsewhere[row] for row in batch.rows]
            parts = [part for part in group.deal([len(text.tokens) for text in texts]) if part]
            now = measured(self.trunk, weights, texts, parts, group)
            return batch._replace(moved=_moved(now - self.train.reference_elsewhere[list(batch.rows)]))

        return Task(
            self.trunk.engine,
            batches,
            lambda batch: [lengths[row] for row in batch.rows],
            self._loss,
            lambda weights: self._validate(weights, group),
            group,
            prepare,
        )

    def _loss(self, weights: Weights, batch: Batch, own: Sequence[int], key: mx.array) -> mx.array:
        rows = [batch.rows[at] for at in own]
        now = summed_logprobs(self.trunk, weights, [self.train.own[row] for row in rows], learning=True)
        losses = self._losses(now - mx.array(self.train.reference[rows]), mx.array(self.train.good[rows]), batch.moved)
        return losses.sum() / len(batch.rows)

    def _losses(self, gained: mx.array, good: mx.array, moved: float) -> mx.array:
        return kahneman_tversky_loss(gained, good, moved, beta=self.config.dpo.beta, bad_weight=self.bad_weight)

    def _validate(self, weights: Weights, group: Group) -> dict[str, float]:
        good = self.held_out.good[self.validated]
        gained, elsewhere = self.held_out.gains(self.trunk, weights, self.validated, group)
        moved = _moved(elsewhere)
        return {
            "loss": float(np.array(self._losses(mx.array(gained), mx.array(good), moved)).mean()),
            "accuracy": float(((gained > moved) == good).mean()),
            "margin": self.config.dpo.beta * float(gained[good].mean() - gained[~good].mean()),
            "chosen": float(gained[good].mean()),
        }


def _moved(log_ratios: Floats) -> float:
    """The estimate of KL(pi, pi_ref) by answers to other prompts, which is 0 where they have become less probable."""
    mean = float(log_ratios.mean(dtype=np.float64))
    if not math.isfinite(mean):
        raise RunError("a log-probability is not finite; the update was not applied, and the last checkpoint stands")
    return max(0.0, mean)
