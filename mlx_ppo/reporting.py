"""What a person is told of a run while it lasts."""

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
