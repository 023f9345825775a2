"""The feedback of a `reward` job: training, validation and test sets that go together."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_ppo.config.supervised import RewardConfig
from mlx_ppo.data.feedback import Feedback, Floats, load_feedback
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ConfigError, DataError
from mlx_ppo.supervised import StepReporter


class Sets(NamedTuple):
    """The feedback of a run."""

    train: Feedback
    validation: Feedback | None
    test: Feedback | None

    @property
    def held_out(self) -> Feedback:
        """On what the best weights are chosen: the validation feedback, where there is none the training's."""
        return self.train if self.validation is None else self.validation


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
