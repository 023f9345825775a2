"""Reward models from human feedback: from pairs or ratings to a folder with a calibrated, normalised score."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.losses import pairwise_reward_loss
from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.config.supervised import FeedbackDataSection, RewardConfig
from mlx_ppo.data.batches import length_batches
from mlx_ppo.data.layouts import find
from mlx_ppo.data.preferences import Rated, derive_pairs, load_pairs, load_rated
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ConfigError, DataError
from mlx_ppo.models.adapters import HEAD, Weights
from mlx_ppo.models.heads import HEAD_FILE, RewardFacts, apply_head, new_head, text_states, trunk_fingerprint
from mlx_ppo.models.roles import initial_weights
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.models.write import fill_with_adapters, fill_with_model, write_folder
from mlx_ppo.rewards.figures import Floats, pair_figures, rating_figures
from mlx_ppo.runs.folder import Run, replace_file
from mlx_ppo.runtime.signals import Interrupts
from mlx_ppo.stages.optimizer import Optimizer
from mlx_ppo.supervised import Course, Fit, Noise, StepReporter, Task, drop_tokens, fit, load_trainable, require_room

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Feedback:
    """Human judgement of texts: their ratings, or which of two is the better one."""

    texts: tuple[Tokens, ...]
    ratings: Floats | None  # [n], mean rating of each text
    pairs: np.ndarray  # [p, 2] indices (chosen, rejected); empty for ratings
    margins: Floats  # [p]


@dataclass(frozen=True)
class Batch:
    """Texts that are read together, with what is known of them."""

    texts: Sequence[Tokens]
    ratings: mx.array | None  # [n]
    chosen: mx.array  # [p] index into texts
    rejected: mx.array  # [p]
    margins: mx.array  # [p]
    noise_parts: tuple[int, ...]


def train_reward_model(config: RewardConfig, run: Run, reporter: StepReporter, interrupts: Interrupts) -> Path:
    """Train a reward model and write it; returns its folder, which `[[reward]] path` takes.

    Raises:
        UserError: whatever is wrong with model or data, or went wrong.
    """
    seed, section = config.run.seed, config.reward_training
    trunk = load_trainable(config.model, seed)
    train, validation, test = load_data(config, trunk.tokenizer, reporter)
    require_room(trunk, config.model, config.lora, [len(text) for text in train.texts], section.batch_size)
    body = initial_weights(trunk, config.model, config.lora, key="reward", seed=seed)
    weights = body.holding({**body.arrays, **new_head(trunk.width)})
    longest = max((len(text) for part in (train, validation, test) if part for text in part.texts), default=0)
    for remark in (*trunk.remarks, *trunk.within(longest)):
        reporter.message(remark)
    plan = [_index_batches(train, config, epoch) for epoch in range(section.epochs)]
    optimizer = Optimizer(
        config.optimizer, learning_rate=config.optimizer.learning_rate, total_steps=sum(len(epoch) for epoch in plan)
    )

    def batches(epoch: int) -> list[Batch]:
        return [_batch(train, rows, config, (seed, epoch, at)) for at, rows in enumerate(plan[epoch])]

    def loss(weights: Weights, batch: Batch, key: mx.array) -> mx.array:
        return _loss(trunk, weights, batch, config, key)

    held_out = validation if validation is not None else train
    best = fit(
        Task(trunk.engine, batches, loss, lambda weights: measure(trunk, weights, held_out, config)),
        Fit(weights, optimizer),
        run,
        reporter,
        interrupts,
        Course(config.run, section.epochs, 0, trunk.blocks, validation is not None),
    )
    best = _rounded(best, config.model.save_dtype) if config.model.train == "full" else best
    facts = _facts(trunk, best, train, held_out, config)
    report = {"validation" if validation is not None else "training": measure(trunk, best, held_out, config)}
    if test is not None:
        report["test"] = measure(trunk, best, test, config)
    for name, figures in report.items():
        reporter.message(f"{name}: " + "  ".join(f"{key} {value:.4f}" for key, value in figures.items()))
    run.secure()
    replace_file(run.folder / "report.json", json.dumps(report, indent=2) + "\n")
    result = _write(run.folder / "reward", trunk, best, facts, config)
    run.note_files(run.folder / "report.json", result)
    return result


def load_data(
    config: RewardConfig, tokenizer: Tokenizer, reporter: StepReporter
) -> tuple[Feedback, Feedback | None, Feedback | None]:
    """Training, validation and test feedback."""
    section = config.data
    train = load_feedback(section.train, tokenizer, section, reporter)
    others = [
        load_feedback(path, tokenizer, section, reporter) if path is not None else None
        for path in (section.validation, section.test)
    ]
    if train.ratings is None and config.reward_training.objective != "pairs":
        raise ConfigError(
            f"reward_training.objective: {config.reward_training.objective!r} needs ratings, "
            f"but {section.train} has pairs; use 'pairs'"
        )
    for other, path in zip(others, (section.validation, section.test), strict=True):
        if other is not None and (other.ratings is None) != (train.ratings is None):
            raise DataError(f"{path}: has another kind of feedback than {section.train}; both need pairs, or ratings")
        if other is not None and other.ratings is not None:
            _require_clear_pair(other.ratings, config.reward_training.min_difference, path)
        shared = len(set(train.texts) & set(other.texts)) if other is not None else 0
        if shared and path is not None:
            reporter.message(f"warning: {shared} texts of {path.name} are also training texts")
    return train, others[0], others[1]


def _require_clear_pair(ratings: Floats, min_difference: float, path: Path | None) -> None:
    if np.ptp(ratings) < min_difference:
        raise DataError(
            f"{path}: no two ratings differ by min_difference = {min_difference:g}, so nothing can be measured on it"
        )


def load_feedback(path: Path, tokenizer: Tokenizer, section: FeedbackDataSection, reporter: StepReporter) -> Feedback:
    """Read pairs or ratings, whichever the file's first row has."""
    limits = {"max_tokens": section.max_tokens, "overlong": section.overlong, "columns": section.columns}
    if find(path, "pairs", "rated", columns=section.columns).kind == "pairs":
        found = load_pairs(path, tokenizer, **limits)  # type: ignore[arg-type]
        texts = [text for pair in found.pairs for text in (pair.chosen, pair.rejected)]
        index = np.arange(len(texts)).reshape(-1, 2)
        margins = np.array([pair.margin for pair in found.pairs], np.float32)
        feedback = Feedback(tuple(texts), None, index, margins)
        dropped, truncated, said = found.dropped, found.truncated, found.said
    else:
        rated = load_rated(path, tokenizer, **limits)  # type: ignore[arg-type]
        feedback = _from_ratings(rated.rated)
        dropped, truncated, said = rated.dropped, rated.truncated, rated.said
    if said:
        reporter.message(said)
    if dropped or truncated:
        reporter.message(f"{path.name}: {dropped} overlong dropped, {truncated} truncated")
    return feedback


def _from_ratings(rated: Sequence[Rated]) -> Feedback:
    ratings = np.array([item.rating for item in rated], np.float32)
    return Feedback(tuple(item.tokens for item in rated), ratings, np.zeros((0, 2), np.int64), np.zeros(0, np.float32))


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
    sides = 1 if section.objective == "regression" else 2
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
        ratings=mx.array(feedback.ratings[index]) if rated and feedback.ratings is not None else None,
        chosen=mx.arange(count) if paired else mx.zeros((0,), mx.int32),
        rejected=mx.arange(count) + count if paired else mx.zeros((0,), mx.int32),
        margins=mx.array(margins),
        noise_parts=parts,
    )


def _loss(trunk: Trunk, weights: Weights, batch: Batch, config: RewardConfig, key: mx.array) -> mx.array:
    section = config.reward_training
    texts = drop_tokens(batch.texts, section.token_dropout, trunk.tokenizer.vocab_size, *batch.noise_parts)
    raw = _outputs(trunk, weights, texts, section.pooling, Noise(section.dropout, key))
    total = mx.zeros(())
    if batch.chosen.size:
        chosen, rejected = raw[batch.chosen], raw[batch.rejected]
        total = total + pairwise_reward_loss(chosen, rejected, margin=batch.margins, centering=section.centering).mean()
    if batch.ratings is not None:
        total = total + mx.square(raw - batch.ratings).mean()
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


def raw_outputs(trunk: Trunk, weights: Weights, texts: Sequence[Tokens], pooling: str) -> Floats:
    """Raw outputs [n] for any number of texts, in their order."""
    found = np.zeros(len(texts), np.float32)
    for rows in length_batches([len(text) for text in texts], max_rows=64, max_tokens=None, seed_parts=None):
        found[rows] = np.array(_outputs(trunk, weights, [texts[row] for row in rows], pooling))
    return found


def measure(trunk: Trunk, weights: Weights, feedback: Feedback, config: RewardConfig) -> dict[str, float]:
    """Figures on held-out feedback; `loss` is the one that picks the best weights."""
    raw = raw_outputs(trunk, weights, feedback.texts, config.reward_training.pooling)
    if feedback.ratings is None:
        return pair_figures(raw[feedback.pairs[:, 0]], raw[feedback.pairs[:, 1]])
    objective, difference = config.reward_training.objective, config.reward_training.min_difference
    return rating_figures(raw, feedback.ratings, min_difference=difference, paired=objective == "pairs")


def _facts(trunk: Trunk, weights: Weights, train: Feedback, held_out: Feedback, config: RewardConfig) -> RewardFacts:
    """Normalisation over the training texts; rating points by least squares on the held-out ones."""
    pooling = config.reward_training.pooling
    reference = raw_outputs(trunk, weights, train.texts, pooling)
    slope = intercept = None
    if held_out.ratings is not None:
        raw = raw_outputs(trunk, weights, held_out.texts, pooling)
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
