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
from mlx_ppo.data.feedback import Feedback, Floats
from mlx_ppo.data.random import mx_key
from mlx_ppo.errors import RunError
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
from mlx_ppo.reporting import Silent
from mlx_ppo.reward_batches import Batch, Ranked, index_batches, make_batch, ranked_batch
from mlx_ppo.reward_feedback import load_data
from mlx_ppo.rewards.breakdown import Judged, breakdown, clear_pairs, fitted_scale, lines
from mlx_ppo.rewards.figures import pair_figures, rating_figures
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.folder import Run, replace_file
from mlx_ppo.runtime.group import ALONE, Group
from mlx_ppo.runtime.signals import Interrupts
from mlx_ppo.stages import orders
from mlx_ppo.stages.optimizer import Optimizer
from mlx_ppo.supervised import (
    Course,
    Earlier,
    Fit,
    StepReporter,
    Task,
    drop_tokens,
    earlier_in,
    fit,
    noise_of,
    shared_run,
)
from mlx_ppo.supervised_models import load_trainable, require_room, work_of


class _Follow(NamedTuple):
    """Who hears of the training, and where it is kept; no run in a process that follows another one's."""

    run: Run | None
    reporter: StepReporter
    interrupts: Interrupts


def train_reward_model(config: RewardConfig, run: Run, reporter: StepReporter, interrupts: Interrupts) -> Path:
    """Train a reward model, or an ensemble, and write it; returns its folder, which `[[reward]] path` takes.

    Raises:
        UserError: whatever is wrong with model or data, or went wrong.
    """
    job = _Job(config, reporter)
    with shared_run(config, run, job.work, reporter) as group:
        members = job.train(_Follow(run, reporter, interrupts), group)
        facts, report, table = job.results(members, group)
    for line in table:
        reporter.message(line)
    run.secure()
    replace_file(run.folder / "report.json", json.dumps(report, indent=2) + "\n")
    replace_file(run.folder / "report.txt", "\n".join(table) + "\n")
    result = write_folder(
        run.folder / "reward",
        lambda folder: fill_with_reward(folder, job.trunk, members, facts, dtype=config.model.save_dtype),
    )
    run.note_files(run.folder / "report.json", run.folder / "report.txt", result)
    return result


def follow(config: RewardConfig, group: Group) -> None:
    """Do the same steps as the process that leads, on this one's part of each batch.

    Raises:
        UserError: as `train_reward_model`.
    """
    job = _Job(config, Silent())
    job.results(job.train(_Follow(None, Silent(), Interrupts()), group), group)


class _Job:
    """Model and feedback, loaded."""

    def __init__(self, config: RewardConfig, reporter: StepReporter) -> None:
        """Load them."""
        self.config, section = config, config.reward_training
        self.trunk = trunk = load_trainable(config.model, config.run.seed)
        self.sets = sets = load_data(config, trunk.tokenizer, reporter)
        lengths = [len(text) for text in sets.train.texts]
        size, members = section.batch_size, section.members
        kept = require_room(trunk, config.model, config.lora, lengths, size, members=members)
        longest = max((len(text) for part in sets if part for text in part.texts), default=0)
        for remark in (*trunk.remarks, *trunk.within(longest)):
            reporter.message(remark)
        first = [
            make_batch(sets.train, rows, config, ()) for rows in index_batches(sets.train, config, config.run.seed, 0)
        ]
        texts = [len(text) for batch in first for text in batch.texts]
        each = max(-(-len(batch.texts) // len(batch.units)) for batch in first)  # texts judged at once
        weights = _first_weights(trunk, config, 0)
        self.work = work_of(trunk, weights, texts, section.epochs * members, size, each * kept)

    def train(self, who: _Follow, group: Group) -> list[Weights]:
        """One member after the other, each with a seed of its own, on the one trunk; resumed, the last goes on."""
        config, count = self.config, self.config.reward_training.members
        newest = checkpoint.newest(who.run.folder) if who.run is not None else None
        earlier = earlier_in(orders.shared(group, newest))
        if earlier.members >= count and who.run is not None:
            raise RunError(
                f"{who.run.folder}: {earlier.members} members are finished and another one is begun, "
                f"but reward_training.members is {count} now; set it to {earlier.members + 1} or more"
            )
        state = None
        while earlier.members < count:
            state, weights = self._train_member(earlier, who, group)
            if config.model.train == "full":
                weights = _rounded(weights, config.model.save_dtype)
            earlier = earlier.then(state.optimizer.steps, state.epoch, weights)
        assert state is not None
        return [state.weights.holding(earlier.weights(number)) for number in range(count)]

    def _train_member(self, earlier: Earlier, who: _Follow, group: Group) -> tuple[Fit, Weights]:
        """The state at the end, and the best weights."""
        config, sets, trunk, section = self.config, self.sets, self.trunk, self.config.reward_training
        run = config.run.model_copy(update={"seed": config.run.seed + earlier.members})
        plan = [index_batches(sets.train, config, run.seed, epoch) for epoch in range(section.epochs)]
        total = sum(len(epoch) for epoch in plan)
        optimizer = Optimizer(config.optimizer, learning_rate=config.optimizer.learning_rate, total_steps=total)

        def batches(epoch: int) -> list[Batch]:
            return [make_batch(sets.train, rows, config, (run.seed, epoch, at)) for at, rows in enumerate(plan[epoch])]

        def loss(weights: Weights, batch: Batch, own: Sequence[int], key: mx.array) -> mx.array:
            return _loss(trunk, weights, batch, own, config, key)

        def validate(weights: Weights) -> dict[str, float]:
            return measure(trunk, [weights], sets.held_out, config, group)

        state = Fit(_first_weights(trunk, config, earlier.members), optimizer, earlier=earlier)
        task = Task(trunk.engine, batches, Batch.sizes, loss, validate, group)
        course = Course(run, section.epochs, 0, trunk.blocks, sets.validation is not None, section.members)
        return state, fit(task, state, who.run, who.reporter, who.interrupts, course)

    def results(self, members: Sequence[Weights], group: Group) -> tuple[RewardFacts, dict[str, Any], list[str]]:
        """What the finished folder says of itself, its report, and that as lines; each member reads a text once."""
        sets = self.sets
        first = "training" if sets.validation is None else "validation"
        parts = {first: sets.held_out} | ({} if sets.test is None else {"test": sets.test})
        found = {name: _outputs(self.trunk, members, part, self.config, group) for name, part in parts.items()}
        trained = (
            found[first] if sets.validation is None else _outputs(self.trunk, members, sets.train, self.config, group)
        )
        return self._facts(trained, found[first]), *self._report(parts, found)

    def _report(self, parts: Mapping[str, Feedback], found: Mapping[str, Floats]) -> tuple[dict[str, Any], list[str]]:
        """Figures of the whole on the held-out sets, of each member on the first of them, and what they consist of.

        The lines say the same to a person.

        Args:
            parts: the sets by name.
            found: outputs [M, n] of the members for each.
        """
        config, first = self.config, next(iter(parts))
        report: dict[str, Any] = {
            name: _figures(found[name].mean(axis=0), part, config) for name, part in parts.items()
        }
        table = [f"{name}: {_shown(figures)}" for name, figures in report.items()]
        if len(found[first]) > 1:
            report["members"] = [_figures(own, parts[first], config) for own in found[first]]
            table += [f"member {at}, {first}: {_shown(figures)}" for at, figures in enumerate(report["members"], 1)]
        report["breakdown"], scale = {}, 1.0
        for name, part in parts.items():
            judged = self._judged(found[name].mean(axis=0).astype(np.float64), part)
            if config.reward_training.objective == "regression" and name == first:
                scale = fitted_scale(judged.lead)
            report["breakdown"][name] = breakdown(judged, scale)
            table += lines(name, report["breakdown"][name])
        return report, table

    def _judged(self, raw: np.ndarray[Any, np.dtype[np.float64]], feedback: Feedback) -> Judged:
        pairs = feedback.pairs
        if feedback.ratings is not None:
            pairs = clear_pairs(feedback.ratings.tolist(), self.config.reward_training.min_difference)
        return Judged(raw, np.array([len(text) for text in feedback.texts]), feedback.sources, pairs)

    def _facts(self, each: Floats, held_out: Floats) -> RewardFacts:
        """Normalisation over the training texts; rating points by least squares on the held-out ones.

        Args:
            each: outputs [M, n] of the members for the training texts.
            held_out: for the held-out ones.
        """
        trunk, sets, config = self.trunk, self.sets, self.config
        reference = each.mean(axis=0)
        slope = intercept = None
        if sets.held_out.ratings is not None:
            raw = held_out.mean(axis=0)
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
            format=1 if len(each) == 1 else 2,
            member_means=tuple(float(own.mean()) for own in each) if len(each) > 1 else (),
        )


def _first_weights(trunk: Trunk, config: RewardConfig, number: int) -> Weights:
    """What a member starts from: adapters or random weights of its own seed; in an ensemble, a head drawn by it."""
    seed = config.run.seed + number
    drawn = number > 0 and config.model.initialise == "random"
    origin = load_trainable(config.model, seed) if drawn else trunk
    body = initial_weights(origin, config.model, config.lora, key="reward", seed=seed)
    ensemble = config.reward_training.members > 1
    head = drawn_head(trunk.width, mx_key(seed, "reward head")) if ensemble else new_head(trunk.width)
    return body.holding({**body.arrays, **head})


def _loss(
    trunk: Trunk, weights: Weights, batch: Batch, own: Sequence[int], config: RewardConfig, key: mx.array
) -> mx.array:
    """What some units of a batch add to the mean loss of the whole batch."""
    section = config.reward_training
    rows = sorted(text for unit in own for text in batch.units[unit])
    texts = drop_tokens(batch.texts, section.token_dropout, trunk.tokenizer.vocab_size, *batch.noise_parts)
    noise = noise_of(section.dropout, key, [len(text) for text in texts], rows)
    sequences = make_sequences([texts[row] for row in rows], [()] * len(rows))
    with trunk.using(weights), trunk.noise(*noise):
        raw = apply_head(weights.arrays, text_states(trunk, sequences, section.pooling, learning=True))
    total = mx.zeros(())
    if batch.ranked is not None:
        total = total + _ranking_loss(raw, batch.ranked, config, own)
    if batch.pairs:
        margins = mx.array(batch.margins[list(own)])
        losses = pairwise_reward_loss(raw[: len(own)], raw[len(own) :], margin=margins, centering=section.centering)
        total = total + losses.sum() * (1 / batch.pairs)
    if batch.ratings is not None:
        total = total + mx.square(raw - mx.array(batch.ratings[rows])).sum() * (1 / len(texts))
    return total


def _ranking_loss(raw: mx.array, ranked: Ranked, config: RewardConfig, own: Sequence[int]) -> mx.array:
    """Mean over the choices (plackett-luce) or prompts (all-pairs); centering is that of a pair with the same mean.

    Args:
        raw: outputs of the texts of some rankings, in their order.
        ranked: all rankings of the batch.
        config: the loss.
        own: which of them; the sum is divided by the number for all.
    """
    section = config.reward_training
    loss = plackett_luce_loss if section.rankings == "plackett-luce" else all_pairs_loss
    _, counts = loss(mx.zeros(ranked.mask.shape), ranked.goodness, ranked.mask)
    goodness, mask = ranked.goodness[mx.array(list(own))], ranked.mask[mx.array(list(own))]
    sizes = np.array(mask.sum(axis=1))
    places = np.cumsum(sizes)[:, None] - sizes[:, None] + np.arange(mask.shape[1])[None, :]
    scores = raw[mx.array(np.where(np.array(mask), places, 0))]
    losses, _ = loss(scores, goodness, mask)
    means = mx.where(mask, scores, 0.0).sum(axis=1) / mask.sum(axis=1)
    centred = section.centering * mx.square(2 * means).sum() / len(ranked.mask)
    return losses.sum() / mx.maximum(counts.sum(), 1.0) + centred


def measure(
    trunk: Trunk, members: Sequence[Weights], feedback: Feedback, config: RewardConfig, group: Group = ALONE
) -> dict[str, float]:
    """Figures of a reward model on held-out feedback; `loss` is the one that picks the best weights."""
    return _figures(_outputs(trunk, members, feedback, config, group).mean(axis=0), feedback, config)


def _figures(raw: Floats, feedback: Feedback, config: RewardConfig) -> dict[str, float]:
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
    loss = float(np.array(_ranking_loss(mx.array(raw[order]), batch.ranked, uncentred, range(len(feedback.rankings)))))
    best = [ranks.goodness[int(raw[list(ranks.texts)].argmax())] == max(ranks.goodness) for ranks in feedback.rankings]
    return {"loss": loss, "best": float(np.mean(best))}


def _outputs(
    trunk: Trunk, members: Sequence[Weights], feedback: Feedback, config: RewardConfig, group: Group
) -> Floats:
    """Every member's raw outputs [M, n] for all texts."""
    pooling = config.reward_training.pooling
    return np.stack([text_outputs(trunk, member, feedback.texts, pooling, group) for member in members])


def _shown(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{key} {value:.4f}" for key, value in figures.items())


def _rounded(weights: Weights, dtype: str) -> Weights:
    """Weights as they will be read back from a folder of that type, so that the figures are those of the folder."""
    kinds = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
    rounded: Mapping[str, mx.array] = {
        name: array if name.startswith(HEAD) else array.astype(kinds[dtype]).astype(mx.float32)
        for name, array in weights.arrays.items()
    }
    return weights.holding(rounded)
