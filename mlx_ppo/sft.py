"""Supervised fine-tuning: the story."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.config.supervised import SFTConfig
from mlx_ppo.data.batches import length_batches
from mlx_ppo.data.examples import Example, ExampleSet, load_examples
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.roles import initial_weights, token_statistics
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.runs.folder import Run
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
    fit,
    load_trainable,
    require_room,
    write_result,
)


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
    seed = config.run.seed
    trunk = load_trainable(config.model, seed)
    train, validation = load_data(config, trunk.tokenizer, reporter)
    lengths = [len(example.tokens) for example in train.examples]
    require_room(trunk, config.model, config.lora, lengths, config.sft.batch_size)
    weights = initial_weights(trunk, config.model, config.lora, key="policy", seed=seed)
    longest = max((len(example.tokens) for part in (train, validation) if part for example in part.examples), default=0)
    for remark in (*trunk.remarks, *trunk.within(longest)):
        reporter.message(remark)
    size = config.sft.batch_size

    def batches(epoch: int) -> list[Numbered]:
        groups = length_batches(lengths, max_rows=size, max_tokens=None, seed_parts=(seed, epoch))
        return [Numbered([train.examples[row] for row in rows], epoch, at) for at, rows in enumerate(groups)]

    def loss(weights: Weights, batch: Numbered, key: mx.array) -> mx.array:
        share, vocabulary = config.sft.token_dropout, trunk.tokenizer.vocab_size
        rows = [example.tokens for example in batch.examples]
        read = drop_tokens(rows, share, vocabulary, seed, batch.epoch, batch.index) if share else None
        total, count = _summed_loss(trunk, weights, batch.examples, read, Noise(config.sft.dropout, key))
        return total / count

    def validate(weights: Weights) -> dict[str, float]:
        held_out = validation.examples if validation is not None else train.examples[:256]
        value = mean_loss(trunk, weights, held_out, batch_size=size)
        return {"loss": value, "perplexity": math.exp(min(value, 50.0))}

    steps = config.sft.epochs * math.ceil(len(lengths) / size)
    optimizer = Optimizer(config.optimizer, learning_rate=config.optimizer.learning_rate, total_steps=steps)
    best = fit(
        Task(trunk.engine, batches, loss, validate),
        Fit(weights, optimizer),
        run,
        reporter,
        interrupts,
        Course(config.run, config.sft.epochs, config.sft.patience, trunk.blocks, validation is not None),
    )
    run.secure()
    result = write_result(run.folder, trunk, best, config.model)
    run.note_files(result)
    return result


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
        if examples.said:
            reporter.message(examples.said)
        if examples.dropped or examples.truncated:
            reporter.message(f"{path.name}: {examples.dropped} overlong dropped, {examples.truncated} truncated")
        sets.append(examples)
    assert sets[0] is not None
    return sets[0], sets[1]


def mean_loss(trunk: Trunk, weights: Weights, examples: Sequence[Example], *, batch_size: int) -> float:
    """Mean negative log-probability of the counted tokens, in nats."""
    groups = length_batches([len(e.tokens) for e in examples], max_rows=batch_size, max_tokens=None, seed_parts=None)
    total = counted = 0.0
    for rows in groups:
        loss, count = _summed_loss(trunk, weights, [examples[row] for row in rows])
        total, counted = total + number(loss), counted + count
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
