"""Human feedback for reward models, read from files: ratings, or pairs of texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_ppo.config.supervised import FeedbackDataSection, RewardConfig
from mlx_ppo.data.layouts import find
from mlx_ppo.data.preferences import Rated, load_pairs, load_rated
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ConfigError, DataError
from mlx_ppo.rewards.figures import Floats
from mlx_ppo.supervised import StepReporter

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Feedback:
    """Human judgement of texts: their ratings, or which of two is the better one."""

    texts: tuple[Tokens, ...]
    ratings: Floats | None  # [n], mean rating of each text
    pairs: np.ndarray  # [p, 2] indices (chosen, rejected); empty for ratings
    margins: Floats  # [p]


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
