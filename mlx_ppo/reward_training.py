"""Reward models from human feedback: from pairs or ratings to a folder with a calibrated, normalised score."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.losses import pairwise_reward_loss
from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.config.supervised import RewardConfig
from mlx_ppo.data.batches import length_batches
from mlx_ppo.data.preferences import derive_pairs
from mlx_ppo.models.adapters import HEAD, Weights
from mlx_ppo.models.heads import HEAD_FILE, RewardFacts, apply_head, new_head, text_states, trunk_fingerprint
from mlx_ppo.models.roles import initial_weights
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.models.write import fill_with_adapters, fill_with_model, write_folder
from mlx_ppo.reporting import Silent
from mlx_ppo.reward_feedback import Feedback, Tokens, load_data
from mlx_ppo.rewards.figures import Floats, pair_figures, rating_figures
from mlx_ppo.runs.folder import Run, replace_file
from mlx_ppo.runtime.group import ALONE, Group
from mlx_ppo.runtime.signals import Interrupts
from mlx_ppo.stages.optimizer import Optimizer
from mlx_ppo.supervised import (
    Course,
    Fit,
    Noise,
    StepReporter,
    Task,
    drop_tokens,
    fit,
    load_trainable,
    noise_of,
    require_room,
    shared_run,
    work_of,
)


@dataclass(frozen=True)
class Batch:
    """Texts that are read together, with what is known of them: pairs, or single texts where there are none."""

    texts: Sequence[Tokens]  # of pairs, first the chosen and then the rejected ones
    ratings: Floats | None  # [n]
    pairs: int
    margins: Floats  # [p]
    noise_parts: tuple[int, ...]
    own: Sequence[int] | None = None  # the pairs, or texts, that are to be looked at; None: all

    def sizes(self) -> list[int]:
        """Tokens of each pair, or of each text."""
        lengths = [len(text) for text in self.texts]
        return [a + b for a, b in zip(lengths, lengths[self.pairs :], strict=False)] if self.pairs else lengths

    def part(self, own: Sequence[int]) -> "Batch":
        """The same of which only some pairs, or texts, are looked at."""
        return replace(self, own=own)


def train_reward_model(config: RewardConfig, run: Run, reporter: StepReporter, interrupts: Interrupts) -> Path:
    """Train a reward model and write it; returns its folder, which `[[reward]] path` takes.

    Raises:
        UserError: whatever is wrong with model or data, or went wrong.
    """
    job = _Job(config, reporter)
    with shared_run(config, run, job.work, reporter) as group:
        best = fit(job.task(group), job.state, run, reporter, interrupts, job.course)
        best, facts, report = job.result(best, group)
    for name, figures in report.items():
        reporter.message(f"{name}: " + "  ".join(f"{key} {value:.4f}" for key, value in figures.items()))
    run.secure()
    replace_file(run.folder / "report.json", json.dumps(report, indent=2) + "\n")
    result = _write(run.folder / "reward", job.trunk, best, facts, config)
    run.note_files(run.folder / "report.json", result)
    return result


def follow(config: RewardConfig, group: Group) -> None:
    """Do the same steps as the process that leads, on this one's part of each batch.

    Raises:
        UserError: as `train_reward_model`.
    """
    job = _Job(config, Silent())
    best = fit(job.task(group), job.state, None, Silent(), Interrupts(), job.course)
    job.result(best, group)


class _Job:
    """Model and feedback, loaded."""

    def __init__(self, config: RewardConfig, reporter: StepReporter) -> None:
        """Load them."""
        self.config, seed, section = config, config.run.seed, config.reward_training
        self.trunk = trunk = load_trainable(config.model, seed)
        self.train, self.validation, self.test = load_data(config, trunk.tokenizer, reporter)
        lengths = [len(text) for text in self.train.texts]
        kept = require_room(trunk, config.model, config.lora, lengths, section.batch_size)
        body = initial_weights(trunk, config.model, config.lora, key="reward", seed=seed)
        weights = body.holding({**body.arrays, **new_head(trunk.width)})
        sets = (self.train, self.validation, self.test)
        longest = max((len(text) for part in sets if part for text in part.texts), default=0)
        for remark in (*trunk.remarks, *trunk.within(longest)):
            reporter.message(remark)
        self.plan = [_index_batches(self.train, config, epoch) for epoch in range(section.epochs)]
        steps = sum(len(epoch) for epoch in self.plan)
        optimizer = Optimizer(config.optimizer, learning_rate=config.optimizer.learning_rate, total_steps=steps)
        self.state = Fit(weights, optimizer)
        self.held_out = self.validation if self.validation is not None else self.train
        self.course = Course(config.run, section.epochs, 0, trunk.blocks, self.validation is not None)
        texts = [len(self.train.texts[row]) for batch in self.plan[0] for row in batch[:, : _sides(config)].flat]
        self.work = work_of(trunk, weights, texts, section.epochs, section.batch_size, _sides(config) * kept)

    def task(self, group: Group) -> Task[Batch]:
        """What is trained, by the processes of a group."""

        def validate(weights: Weights) -> dict[str, float]:
            return measure(self.trunk, weights, self.held_out, self.config, group)

        def loss(weights: Weights, batch: Batch, own: Sequence[int], key: mx.array) -> mx.array:
            return _loss(self.trunk, weights, batch.part(own), self.config, key)

        return Task(self.trunk.engine, self._batches, Batch.sizes, loss, validate, group)

    def _batches(self, epoch: int) -> list[Batch]:
        seed = self.config.run.seed
        return [_batch(self.train, rows, self.config, (seed, epoch, at)) for at, rows in enumerate(self.plan[epoch])]

    def result(self, best: Weights, group: Group) -> tuple[Weights, RewardFacts, dict[str, dict[str, float]]]:
        """The weights as they are written, what is known of their outputs, and their figures by set."""
        config, trunk = self.config, self.trunk
        best = _rounded(best, config.model.save_dtype) if config.model.train == "full" else best
        facts = _facts(trunk, best, self.train, self.held_out, config, group)
        name = "validation" if self.validation is not None else "training"
        report = {name: measure(trunk, best, self.held_out, config, group)}
        if self.test is not None:
            report["test"] = measure(trunk, best, self.test, config, group)
        return best, facts, report


def _sides(config: RewardConfig) -> int:
    """Texts of what is judged at once: 2 of a pair."""
    return 1 if config.reward_training.objective == "regression" else 2


def _index_batches(feedback: Feedback, config: RewardConfig, epoch: int) -> list[np.ndarray]:
    """An epoch's batches: rows of texts [n, 1] (regression), or of (chosen, rejected, number of the pair) [p, 3]."""
    section, seed = config.reward_training, config.run.seed
    if section.objective == "regression":
        items = np.arange(len(feedback.texts))[:, None]
    else:
        pairs = feedback.pairs
        if feedback.ratings is not None:
            drawn = np.random.SeedSequence([seed, epoch]).generate_state(1)[0]
            pairs = derive_pairs(
                feedback.ratings.tolist(),
                min_difference=section.min_difference,
                per_item=section.pairs_per_item,
                seed=int(drawn),
            )
        items = np.concatenate([pairs, np.arange(len(pairs))[:, None]], axis=1)
    sides = _sides(config)
    lengths = [max(len(feedback.texts[text]) for text in row[:sides]) for row in items]
    groups = length_batches(lengths, max_rows=section.batch_size, max_tokens=None, seed_parts=(seed, epoch))
    return [items[rows] for rows in groups]


def _batch(feedback: Feedback, rows: np.ndarray, config: RewardConfig, parts: tuple[int, ...]) -> Batch:
    count = len(rows)
    paired = config.reward_training.objective != "regression"
    index = np.concatenate([rows[:, 0], rows[:, 1]]) if paired else rows[:, 0]
    rated = feedback.ratings is not None and config.reward_training.objective != "pairs"
    margins = feedback.margins[rows[:, 2]] if paired and feedback.ratings is None else np.zeros(count, np.float32)
    return Batch(
        texts=[feedback.texts[text] for text in index],
        ratings=feedback.ratings[index] if rated and feedback.ratings is not None else None,
        pairs=count if paired else 0,
        margins=margins,
        noise_parts=parts,
    )


def _loss(trunk: Trunk, weights: Weights, batch: Batch, config: RewardConfig, key: mx.array) -> mx.array:
    """What the pairs or texts that are looked at add to the mean loss of the whole batch."""
    section, pairs = config.reward_training, batch.pairs
    units = list(batch.own) if batch.own is not None else list(range(pairs or len(batch.texts)))
    rows = [*units, *(pairs + at for at in units)] if pairs else units
    texts = drop_tokens(batch.texts, section.token_dropout, trunk.tokenizer.vocab_size, *batch.noise_parts)
    noise = noise_of(section.dropout, key, [len(text) for text in texts], rows)
    raw = _outputs(trunk, weights, [texts[row] for row in rows], section.pooling, noise)
    total = mx.zeros(())
    if pairs:
        chosen, rejected = raw[: len(units)], raw[len(units) :]
        margins = mx.array(batch.margins[units])
        losses = pairwise_reward_loss(chosen, rejected, margin=margins, centering=section.centering)
        total = total + losses.sum() * (1 / pairs)
    if batch.ratings is not None:
        total = total + mx.square(raw - mx.array(batch.ratings[rows])).sum() * (1 / len(texts))
    return total


def _outputs(
    trunk: Trunk,
    weights: Weights,
    texts: Sequence[Sequence[int]],
    pooling: str,
    noise: Noise | None = None,
) -> mx.array:
    """Raw outputs [n] for texts. `noise`: a gradient will be taken."""
    sequences = make_sequences(texts, [()] * len(texts))
    with trunk.using(weights), trunk.noise(*noise) if noise is not None else nullcontext():
        return apply_head(weights.arrays, text_states(trunk, sequences, pooling, learning=noise is not None))


def raw_outputs(trunk: Trunk, weights: Weights, texts: Sequence[Tokens], pooling: str, group: Group = ALONE) -> Floats:
    """Raw outputs [n] for any number of texts, in their order; the processes of a group compute them together."""
    lengths = [len(text) for text in texts]
    batches = length_batches(lengths, max_rows=64, max_tokens=None, seed_parts=None)

    def outputs(at: int) -> Floats:
        return np.array(_outputs(trunk, weights, [texts[row] for row in batches[at]], pooling))

    found = np.zeros(len(texts), np.float32)
    computed = group.divided([sum(lengths[row] for row in rows) for rows in batches], outputs)
    for rows, values in zip(batches, computed, strict=True):
        found[rows] = values
    return found


def measure(
    trunk: Trunk, weights: Weights, feedback: Feedback, config: RewardConfig, group: Group = ALONE
) -> dict[str, float]:
    """Figures on held-out feedback; `loss` is the one that picks the best weights."""
    raw = raw_outputs(trunk, weights, feedback.texts, config.reward_training.pooling, group)
    if feedback.ratings is None:
        return pair_figures(raw[feedback.pairs[:, 0]], raw[feedback.pairs[:, 1]])
    objective, difference = config.reward_training.objective, config.reward_training.min_difference
    return rating_figures(raw, feedback.ratings, min_difference=difference, paired=objective == "pairs")


def _facts(
    trunk: Trunk, weights: Weights, train: Feedback, held_out: Feedback, config: RewardConfig, group: Group
) -> RewardFacts:
    """Normalisation over the training texts; rating points by least squares on the held-out ones."""
    pooling = config.reward_training.pooling
    reference = raw_outputs(trunk, weights, train.texts, pooling, group)
    slope = intercept = None
    if held_out.ratings is not None:
        raw = raw_outputs(trunk, weights, held_out.texts, pooling, group)
        slope, intercept = (float(value) for value in np.polyfit(raw, held_out.ratings, 1))
    mean, deviation = float(reference.mean()), max(float(reference.std()), math.sqrt(np.finfo(np.float32).eps))
    return RewardFacts(
        placement="adapters" if config.model.train == "lora" else "folder",
        pooling=pooling,
        mean=mean,
        deviation=deviation,
        slope=slope,
        intercept=intercept,
        trunk=trunk_fingerprint(trunk) if config.model.train == "lora" else None,
        lowest=(float(reference.min()) - mean) / deviation,
        highest=(float(reference.max()) - mean) / deviation,
    )


def _rounded(weights: Weights, dtype: str) -> Weights:
    """Weights as they will be read back from a folder of that type, so that the figures are those of the folder."""
    kinds = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
    rounded: Mapping[str, mx.array] = {
        name: array if name.startswith(HEAD) else array.astype(kinds[dtype]).astype(mx.float32)
        for name, array in weights.arrays.items()
    }
    return weights.holding(rounded)


def _write(target: Path, trunk: Trunk, weights: Weights, facts: RewardFacts, config: RewardConfig) -> Path:
    head = {name: array for name, array in sorted(weights.arrays.items()) if name.startswith(HEAD)}

    def fill(folder: Path) -> None:
        if facts.placement == "folder":
            fill_with_model(folder, Path(trunk.name), trunk, weights, dtype=config.model.save_dtype)
        else:
            fill_with_adapters(folder, weights, trunk.blocks)
        mx.save_safetensors(str(folder / HEAD_FILE), head)
        facts.write(folder)

    return write_folder(target, fill)
