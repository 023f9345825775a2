"""Supervised fine-tuning: the story."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.config.supervised import SFTConfig
from mlx_ppo.data.batches import length_batches
from mlx_ppo.data.examples import Example, ExampleSet, load_examples
from mlx_ppo.data.sequences import cut_said
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.roles import initial_weights, token_statistics
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.reporting import Silent
from mlx_ppo.runs.folder import Run
from mlx_ppo.runtime.group import ALONE, Group
from mlx_ppo.runtime.signals import Interrupts
from mlx_ppo.stages.optimizer import Optimizer
from mlx_ppo.stages.records import number
from mlx_ppo.supervised import (
    Course,
    Fit,
    Noise,
    StepReporter,
    Task,
    drop_tokens,
    noise_of,
)
from mlx_ppo.supervised_models import follow_policy, load_trainable, require_room, train_policy, work_of


@dataclass(frozen=True)
class Numbered:
    """A batch and what its noise derives from."""

    examples: Sequence[Example]
    epoch: int
    index: int


def finetune(config: SFTConfig, run: Run, reporter: StepReporter, interrupts: Interrupts) -> Path:
    """Train on examples and write the finished model or adapters; returns their folder.

    Raises:
        UserError: whatever is wrong with model or data, or went wrong.
    """
    return train_policy(_Job(config, reporter), config, run, reporter, interrupts)


def follow(config: SFTConfig, group: Group) -> None:
    """Do the same steps as the process that leads, on this one's part of each batch.

    Raises:
        UserError: as `finetune`.
    """
    follow_policy(_Job(config, Silent()), group)


class _Job:
    """Model and data, loaded."""

    def __init__(self, config: SFTConfig, reporter: StepReporter) -> None:
        """Load them."""
        self.config, seed, size = config, config.run.seed, config.sft.batch_size
        self.trunk = trunk = load_trainable(config.model, seed)
        self.train, self.validation = load_data(config, trunk.tokenizer, reporter)
        self.lengths = [len(example.tokens) for example in self.train.examples]
        kept = require_room(trunk, config.model, config.lora, self.lengths, size)
        weights = initial_weights(trunk, config.model, config.lora, key="policy", seed=seed)
        sets = (self.train, self.validation)
        longest = max((len(example.tokens) for part in sets if part for example in part.examples), default=0)
        for remark in (*trunk.remarks, *trunk.within(longest)):
            reporter.message(remark)
        steps = config.sft.epochs * math.ceil(len(self.lengths) / size)
        optimizer = Optimizer(config.optimizer, learning_rate=config.optimizer.learning_rate, total_steps=steps)
        self.state = Fit(weights, optimizer)
        self.course = Course(
            config.run, config.sft.epochs, config.sft.patience, trunk.blocks, self.validation is not None
        )
        self.work = work_of(trunk, weights, self.lengths, config.sft.epochs, min(size, len(self.lengths)), kept)

    def task(self, group: Group) -> Task[Numbered]:
        """What is trained, by the processes of a group."""

        def sizes(batch: Numbered) -> list[int]:
            return [len(example.tokens) for example in batch.examples]

        def validate(weights: Weights) -> dict[str, float]:
            held_out = self.validation.examples if self.validation is not None else self.train.examples[:256]
            value = mean_loss(self.trunk, weights, held_out, batch_size=self.config.sft.batch_size, group=group)
            return {"loss": value, "perplexity": math.exp(min(value, 50.0))}

        return Task(self.trunk.engine, self._batches, sizes, self._loss, validate, group)

    def _batches(self, epoch: int) -> list[Numbered]:
        size, seed = self.config.sft.batch_size, self.config.run.seed
        groups = length_batches(self.lengths, max_rows=size, max_tokens=None, seed_parts=(seed, epoch))
        return [Numbered([self.train.examples[row] for row in rows], epoch, at) for at, rows in enumerate(groups)]

    def _loss(self, weights: Weights, batch: Numbered, own: Sequence[int], key: mx.array) -> mx.array:
        section, trunk = self.config.sft, self.trunk
        rows = [example.tokens for example in batch.examples]
        parts = (self.config.run.seed, batch.epoch, batch.index)
        share, vocabulary = section.token_dropout, trunk.tokenizer.vocab_size
        read = drop_tokens(rows, share, vocabulary, *parts) if share else None
        noise = noise_of(section.dropout, key, [len(row) for row in rows], own)
        mine = None if read is None else [read[at] for at in own]
        total, _ = _summed_loss(trunk, weights, [batch.examples[at] for at in own], mine, noise)
        return total / sum(len(example.tokens) - example.start for example in batch.examples)


def load_data(config: SFTConfig, tokenizer: Tokenizer, reporter: StepReporter) -> tuple[ExampleSet, ExampleSet | None]:
    """Training and validation examples."""
    section = config.data
    sets: list[ExampleSet | None] = []
    for path in (section.train, section.validation):
        if path is None:
            sets.append(None)
            continue
        how = {"max_tokens": section.max_tokens, "overlong": section.overlong, "columns": section.columns}
        examples = load_examples(path, tokenizer, **how)  # type: ignore[arg-type]
        for line in filter(None, (examples.said, cut_said(path, examples.dropped, examples.truncated))):
            reporter.message(line)
        sets.append(examples)
    assert sets[0] is not None
    return sets[0], sets[1]


def mean_loss(
    trunk: Trunk, weights: Weights, examples: Sequence[Example], *, batch_size: int, group: Group = ALONE
) -> float:
    """Mean negative log-probability of the counted tokens, in nats; the processes of a group compute it together."""
    lengths = [len(example.tokens) for example in examples]
    batches = length_batches(lengths, max_rows=batch_size, max_tokens=None, seed_parts=None)

    def summed(at: int) -> "np.ndarray[Any, Any]":
        loss, count = _summed_loss(trunk, weights, [examples[row] for row in batches[at]])
        return np.array([number(loss), count], np.float64)

    found = group.divided([sum(lengths[row] for row in rows) for rows in batches], summed)
    total = counted = 0.0
    for loss, count in found:
        total, counted = total + float(loss), counted + float(count)
    return total / counted


def _summed_loss(
    trunk: Trunk,
    weights: Weights,
    examples: Sequence[Example],
    read: Sequence[Sequence[int]] | None = None,
    noise: Noise | None = None,
) -> tuple[mx.array, int]:
    """Summed negative log-probability of the counted tokens, and their number.

    `read`: rows to read in place of the examples' own. `noise`: a gradient will be taken.
    """
    rows = [example.tokens for example in examples]
    starts = [example.start for example in examples]
    sequences = make_sequences(
        [row[:at] for row, at in zip(rows, starts, strict=True)],
        [row[at:] for row, at in zip(rows, starts, strict=True)],
    )
    if read is not None:
        sequences = sequences._replace(tokens=make_sequences(read, [()] * len(read)).tokens)
    with trunk.using(weights), trunk.noise(*noise) if noise is not None else nullcontext():
        states = trunk.response_states(sequences, learning=noise is not None)
        logprobs, _ = token_statistics(trunk, states, sequences, temperature=1.0)
    return -logprobs.sum(), sequences.targets.size
