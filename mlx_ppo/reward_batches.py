"""Feedback into the batches that a reward model learns from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.config.supervised import RewardConfig
from mlx_ppo.data.batches import length_batches
from mlx_ppo.data.feedback import Feedback, Numbers, Tokens
from mlx_ppo.data.preferences import derive_pairs


class Ranked(NamedTuple):
    """Rankings of the texts of a batch, of up to K each."""

    texts: mx.array  # [r, K] index into the texts
    goodness: mx.array  # [r, K]
    mask: mx.array  # [r, K] bool, True where there is a text


@dataclass(frozen=True)
class Batch:
    """Texts that are read together, with what is known of them."""

    texts: Sequence[Tokens]
    ratings: mx.array | None  # [n]
    chosen: mx.array  # [p] index into texts
    rejected: mx.array  # [p]
    margins: mx.array  # [p]
    ranked: Ranked | None
    noise_parts: tuple[int, ...]


def index_batches(feedback: Feedback, config: RewardConfig, seed: int, epoch: int) -> list[Numbers]:
    """An epoch's batches: rows of texts or rankings [n, 1], or of (chosen, rejected, number of the pair) [p, 3]."""
    section = config.reward_training
    if feedback.rankings:
        items = np.arange(len(feedback.rankings))[:, None]
        read = [ranks.texts for ranks in feedback.rankings]
    elif section.objective == "regression":
        items = np.arange(len(feedback.texts))[:, None]
        read = [(text,) for text in range(len(feedback.texts))]
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
        read = [(int(chosen), int(rejected)) for chosen, rejected in pairs]
    lengths = [max(len(feedback.texts[text]) for text in texts) for texts in read]
    groups = length_batches(lengths, max_rows=section.batch_size, max_tokens=None, seed_parts=(seed, epoch))
    return [items[rows] for rows in groups]


def make_batch(feedback: Feedback, rows: Numbers, config: RewardConfig, parts: tuple[int, ...]) -> Batch:
    """The batch of some rows of `index_batches`; `parts`: of the key for its dropped tokens."""
    count = len(rows)
    none = mx.zeros((0,), mx.int32)
    if feedback.rankings:
        return ranked_batch(feedback, rows, parts)
    paired = config.reward_training.objective != "regression"
    index = np.concatenate([rows[:, 0], rows[:, 1]]) if paired else rows[:, 0]
    rated = feedback.ratings is not None and config.reward_training.objective != "pairs"
    margins = feedback.margins[rows[:, 2]] if paired and feedback.ratings is None else np.zeros(count, np.float32)
    return Batch(
        texts=[feedback.texts[text] for text in index],
        ratings=mx.array(feedback.ratings[index]) if rated and feedback.ratings is not None else None,
        chosen=mx.arange(count) if paired else none,
        rejected=mx.arange(count) + count if paired else none,
        margins=mx.array(margins),
        ranked=None,
        noise_parts=parts,
    )


def ranked_batch(feedback: Feedback, rows: Numbers, parts: tuple[int, ...]) -> Batch:
    """The batch of the rankings with the numbers `rows` [n, 1]."""
    ranks = [feedback.rankings[row] for row in rows[:, 0]]
    sizes = np.array([len(one.texts) for one in ranks])
    mask = np.arange(sizes.max())[None, :] < sizes[:, None]
    texts, goodness = np.zeros(mask.shape, np.int32), np.zeros(mask.shape, np.float64)
    texts[mask] = np.arange(sizes.sum())
    # by their order: goodness of any size, in float32, could make ties
    goodness[mask] = np.concatenate([np.unique(one.goodness, return_inverse=True)[1] for one in ranks])
    none = mx.zeros((0,), mx.int32)
    return Batch(
        texts=[feedback.texts[text] for one in ranks for text in one.texts],
        ratings=None,
        chosen=none,
        rejected=none,
        margins=mx.zeros((0,)),
        ranked=Ranked(mx.array(texts), mx.array(goodness, mx.float32), mx.array(mask)),
        noise_parts=parts,
    )
