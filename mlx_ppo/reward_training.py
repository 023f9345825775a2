"""Reward models from human feedback: pairs, rankings or ratings into a folder with a calibrated, normalised score."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.losses import all_pairs_loss, pairwise_reward_loss, plackett_luce_loss
from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.config.supervised import RewardConfig
from mlx_ppo.data.feedback import Feedback, Floats, load_feedback
from mlx_ppo.data.random import mx_key
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ConfigError, DataError, RunError
from mlx_ppo.models.adapters import HEAD, Weights
from mlx_ppo.models.heads import (
    RewardFacts,
    apply_head,
    drawn_head,
    new_head,
    text_outputs,
    text_states,
    trunk_fingerprint,
)
from mlx_ppo.models.reward_folder import fill_with_reward
from mlx_ppo.models.roles import initial_weights
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.models.write import write_folder
from mlx_ppo.reward_batches import Batch, Ranked, index_batches, make_batch, ranked_batch
from mlx_ppo.rewards.breakdown import Judged, breakdown, clear_pairs, fitted_scale, lines
from mlx_ppo.rewards.figures import pair_figures, rating_figures
from mlx_ppo.runs.folder import Run, replace_file
from mlx_ppo.runtime.signals import Interrupts
from mlx_ppo.stages.optimizer import Optimizer
from mlx_ppo.supervised import (
    Course,
    Earlier,
    Fit,
    Noise,
    StepReporter,
    Task,
    drop_tokens,
    earlier_in,
    fit,
    load_trainable,
    require_room,
)


class Sets(NamedTuple):
    """The feedback of a run."""

    train: Feedback
    validation: Feedback | None
    test: Feedback | None

    @property
    def held_out(self) -> Feedback:
        """On what the best weights are chosen: the validation feedback, where there is none the training's."""
        return self.train if self.validation is None else self.validation


class _Follow(NamedTuple):
    """Who hears of the training, and where it is kept."""

    run: Run
    reporter: StepReporter
    interrupts: Interrupts


def train_reward_model(config: RewardConfig, run: Run, reporter: StepReporter, interrupts: Interrupts) -> Path:
    """Train a reward model, or an ensemble, and write it; returns its folder, which `[[reward]] path` takes.

    Raises:
        UserError: whatever is wrong with model or data, or went wrong.
    """
    section = config.reward_training
    trunk = load_trainable(config.model, config.run.seed)
    sets = load_data(config, trunk.tokenizer, reporter)
    lengths = [len(text) for text in sets.train.texts]
    require_room(trunk, config.model, config.lora, lengths, section.batch_size, members=section.members)
    longest = max((len(text) for part in sets if part for text in part.texts), default=0)
    for remark in (*trunk.remarks, *trunk.within(longest)):
        reporter.message(remark)
    members = _train_members(trunk, sets, config, _Follow(run, reporter, interrupts))
    facts = _facts(trunk, members, sets, config)
    report, table = _report(trunk, members, sets, config)
    for line in table:
        reporter.message(line)
    run.secure()
    replace_file(run.folder / "report.json", json.dumps(report, indent=2) + "\n")
    replace_file(run.folder / "report.txt", "\n".join(table) + "\n")
    result = write_folder(
        run.folder / "reward",
        lambda folder: fill_with_reward(folder, trunk, members, facts, dtype=config.model.save_dtype),
    )
    run.note_files(run.folder / "report.json", run.folder / "report.txt", result)
    return result


def load_data(config: RewardConfig, tokenizer: Tokenizer, reporter: StepReporter) -> Sets:
    """Training, validation and test feedback.

    Raises:
        ConfigError, DataError: a file can't be read, or doesn't go with the objective or with the others.
    """
    section, ranked = config.data, config.reward_training.rankings != "pairs"

    def read(path: Path | None) -> Feedback | None:
        if path is None:
            return None
        found, said = load_feedback(path, tokenizer, section, rankings=ranked)
        for line in said:
            reporter.message(line)
        return found

    train = read(section.train)
    assert train is not None
    others = [read(path) for path in (section.validation, section.test)]
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
    return Sets(train, *others)


def _require_clear_pair(ratings: Floats, min_difference: float, path: Path | None) -> None:
    if np.ptp(ratings) < min_difference:
        raise DataError(
            f"{path}: no two ratings differ by min_difference = {min_difference:g}, so nothing can be measured on it"
        )


def _train_members(trunk: Trunk, sets: Sets, config: RewardConfig, follow: _Follow) -> list[Weights]:
    """One model after the other, each with a seed of its own, on the one trunk; a resumed run goes on with its last."""
    count, earlier = config.reward_training.members, earlier_in(follow.run)
    if earlier.members >= count:
        raise RunError(
            f"{follow.run.folder}: {earlier.members} members are finished and another one is begun, "
            f"but reward_training.members is {count} now; set it to {earlier.members + 1} or more"
        )
    state = None
    while earlier.members < count:
        state, weights = _train_member(trunk, sets, config, earlier, follow)
        if config.model.train == "full":
            weights = _rounded(weights, config.model.save_dtype)
        earlier = earlier.then(state.optimizer.steps, state.epoch, weights)
    assert state is not None
    return [state.weights.holding(earlier.weights(number)) for number in range(count)]


def _train_member(
    trunk: Trunk, sets: Sets, config: RewardConfig, earlier: Earlier, follow: _Follow
) -> tuple[Fit, Weights]:
    """The state at the end, and the best weights."""
    section, number = config.reward_training, earlier.members
    run = config.run.model_copy(update={"seed": config.run.seed + number})
    plan = [index_batches(sets.train, config, run.seed, epoch) for epoch in range(section.epochs)]
    total = sum(len(epoch) for epoch in plan)
    optimizer = Optimizer(config.optimizer, learning_rate=config.optimizer.learning_rate, total_steps=total)

    def batches(epoch: int) -> list[Batch]:
        return [make_batch(sets.train, rows, config, (run.seed, epoch, at)) for at, rows in enumerate(plan[epoch])]

    def loss(weights: Weights, batch: Batch, key: mx.array) -> mx.array:
        return _loss(trunk, weights, batch, config, key)

    state = Fit(_first_weights(trunk, config, number), optimizer, earlier=earlier)
    best = fit(
        Task(trunk.engine, batches, loss, lambda weights: measure(trunk, [weights], sets.held_out, config)),
        state,
        follow.run,
        follow.reporter,
        follow.interrupts,
        Course(run, section.epochs, 0, trunk.blocks, sets.validation is not None, section.members),
    )
    return state, best


def _first_weights(trunk: Trunk, config: RewardConfig, number: int) -> Weights:
    """What a member starts from: adapters or random weights of its own seed; in an ensemble, a head drawn by it."""
    seed = config.run.seed + number
    drawn = number > 0 and config.model.initialise == "random"
    origin = load_trainable(config.model, seed) if drawn else trunk
    body = initial_weights(origin, config.model, config.lora, key="reward", seed=seed)
    ensemble = config.reward_training.members > 1
    head = drawn_head(trunk.width, mx_key(seed, "reward head")) if ensemble else new_head(trunk.width)
    return body.holding({**body.arrays, **head})


def _loss(trunk: Trunk, weights: Weights, batch: Batch, config: RewardConfig, key: mx.array) -> mx.array:
    section = config.reward_training
    texts = drop_tokens(batch.texts, section.token_dropout, trunk.tokenizer.vocab_size, *batch.noise_parts)
    sequences = make_sequences(texts, [()] * len(texts))
    with trunk.using(weights), trunk.noise(*Noise(section.dropout, key)):
        raw = apply_head(weights.arrays, text_states(trunk, sequences, section.pooling, learning=True))
    total = mx.zeros(())
    if batch.ranked is not None:
        total = total + _ranking_loss(raw, batch.ranked, config)
    if batch.chosen.size:
        chosen, rejected = raw[batch.chosen], raw[batch.rejected]
        total = total + pairwise_reward_loss(chosen, rejected, margin=batch.margins, centering=section.centering).mean()
    if batch.ratings is not None:
        total = total + mx.square(raw - batch.ratings).mean()
    return total


def _ranking_loss(raw: mx.array, ranked: Ranked, config: RewardConfig) -> mx.array:
    """Mean over the choices (plackett-luce) or prompts (all-pairs); centering is that of a pair with the same mean."""
    section = config.reward_training
    loss = plackett_luce_loss if section.rankings == "plackett-luce" else all_pairs_loss
    scores = raw[ranked.texts]
    losses, counts = loss(scores, ranked.goodness, ranked.mask)
    means = mx.where(ranked.mask, scores, 0.0).sum(axis=1) / ranked.mask.sum(axis=1)
    return losses.sum() / mx.maximum(counts.sum(), 1.0) + section.centering * mx.square(2 * means).mean()


def measure(trunk: Trunk, members: Sequence[Weights], feedback: Feedback, config: RewardConfig) -> dict[str, float]:
    """Figures of a reward model on held-out feedback; `loss` is the one that picks the best weights."""
    raw = _outputs(trunk, members, feedback, config).mean(axis=0)
    section = config.reward_training
    if feedback.ratings is None:
        figures = pair_figures(raw[feedback.pairs[:, 0]], raw[feedback.pairs[:, 1]])
        return figures | (_of_rankings(raw, feedback, config) if feedback.rankings else {})
    return rating_figures(
        raw, feedback.ratings, min_difference=section.min_difference, paired=section.objective == "pairs"
    )


def _of_rankings(raw: Floats, feedback: Feedback, config: RewardConfig) -> dict[str, float]:
    """`loss` by the loss that was trained, `best`: how often the highest score is that of one of the best answers."""
    batch = ranked_batch(feedback, np.arange(len(feedback.rankings))[:, None], ())
    assert batch.ranked is not None
    order = np.concatenate([ranks.texts for ranks in feedback.rankings])
    uncentred = config.model_copy(
        update={"reward_training": config.reward_training.model_copy(update={"centering": 0.0})}
    )
    loss = float(np.array(_ranking_loss(mx.array(raw[order]), batch.ranked, uncentred)))
    best = [ranks.goodness[int(raw[list(ranks.texts)].argmax())] == max(ranks.goodness) for ranks in feedback.rankings]
    return {"loss": loss, "best": float(np.mean(best))}


def _outputs(trunk: Trunk, members: Sequence[Weights], feedback: Feedback, config: RewardConfig) -> Floats:
    """Every member's raw outputs [M, n] for all texts."""
    pooling = config.reward_training.pooling
    return np.stack([text_outputs(trunk, member, feedback.texts, pooling) for member in members])


def _report(
    trunk: Trunk, members: Sequence[Weights], sets: Sets, config: RewardConfig
) -> tuple[dict[str, Any], list[str]]:
    """Figures of the whole on the held-out sets, of each member on the first of them, and what they consist of.

    The lines say the same to a person.
    """
    first = "training" if sets.validation is None else "validation"
    parts = {first: sets.held_out} | ({} if sets.test is None else {"test": sets.test})
    report: dict[str, Any] = {name: measure(trunk, members, part, config) for name, part in parts.items()}
    table = [f"{name}: {_shown(figures)}" for name, figures in report.items()]
    if len(members) > 1:
        report["members"] = [measure(trunk, [member], sets.held_out, config) for member in members]
        table += [f"member {at}, {first}: {_shown(figures)}" for at, figures in enumerate(report["members"], 1)]
    report["breakdown"], scale = {}, 1.0
    for name, part in parts.items():
        judged = _judged(trunk, members, part, config)
        if config.reward_training.objective == "regression" and name == first:
            scale = fitted_scale(judged.lead)
        report["breakdown"][name] = breakdown(judged, scale)
        table += lines(name, report["breakdown"][name])
    return report, table


def _shown(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{key} {value:.4f}" for key, value in figures.items())


def _judged(trunk: Trunk, members: Sequence[Weights], feedback: Feedback, config: RewardConfig) -> Judged:
    raw = _outputs(trunk, members, feedback, config).mean(axis=0).astype(np.float64)
    pairs = feedback.pairs
    if feedback.ratings is not None:
        pairs = clear_pairs(feedback.ratings.tolist(), config.reward_training.min_difference)
    return Judged(raw, np.array([len(text) for text in feedback.texts]), feedback.sources, pairs)


def _facts(trunk: Trunk, members: Sequence[Weights], sets: Sets, config: RewardConfig) -> RewardFacts:
    """Normalisation over the training texts; rating points by least squares on the held-out ones."""
    each = _outputs(trunk, members, sets.train, config)
    reference = each.mean(axis=0)
    slope = intercept = None
    if sets.held_out.ratings is not None:
        raw = _outputs(trunk, members, sets.held_out, config).mean(axis=0)
        slope, intercept = (float(value) for value in np.polyfit(raw, sets.held_out.ratings, 1))
    mean, deviation = float(reference.mean()), max(float(reference.std()), math.sqrt(np.finfo(np.float32).eps))
    return RewardFacts(
        placement="adapters" if config.model.train == "lora" else "folder",
        pooling=config.reward_training.pooling,
        mean=mean,
        deviation=deviation,
        slope=slope,
        intercept=intercept,
        trunk=trunk_fingerprint(trunk) if config.model.train == "lora" else None,
        lowest=(float(reference.min()) - mean) / deviation,
        highest=(float(reference.max()) - mean) / deviation,
        format=1 if len(members) == 1 else 2,
        member_means=tuple(float(own.mean()) for own in each) if len(members) > 1 else (),
    )


def _rounded(weights: Weights, dtype: str) -> Weights:
    """Weights as they will be read back from a folder of that type, so that the figures are those of the folder."""
    kinds = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
    rounded: Mapping[str, mx.array] = {
        name: array if name.startswith(HEAD) else array.astype(kinds[dtype]).astype(mx.float32)
        for name, array in weights.arrays.items()
    }
    return weights.holding(rounded)
