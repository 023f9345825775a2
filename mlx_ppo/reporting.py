"""What a person is told of a run while it lasts."""

from collections.abc import Mapping
from typing import Protocol

Sample = tuple[str, str, float]  # prompt, completion, score


class Reporter(Protocol):
    """What a person sees of a run."""

    def message(self, text: str) -> None:
        """One line of information or warning."""

    def phase(self, name: str, iteration: int, iterations: int) -> None:
        """A phase begins."""

    def tokens(self, count: int) -> None:
        """Tokens have been sampled."""

    def iteration(self, metrics: dict[str, float], iterations: int, sample: Sample) -> None:
        """An iteration is done; the sample is a prompt, its completion and its score."""


class Silent:
    """Nobody watches: a process that follows, whose leader says everything."""

    def message(self, text: str) -> None:
        """Nothing is shown."""

    def stage(self, name: str) -> None:
        """Nothing is shown."""

    def tokens(self, count: int) -> None:
        """Nothing is shown."""

    def step(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Nothing is shown."""
