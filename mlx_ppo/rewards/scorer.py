"""What scores completions as texts, in another process: a person's function, a rule, or a model that judges."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self


class TextScorer(ABC):
    """Scores by text. A context manager: what is wrong with it comes up at its start, before training."""

    name: str

    def __enter__(self) -> Self:
        """Start its process."""
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End its process."""
        self.close()

    @property
    @abstractmethod
    def described(self) -> str:
        """What judges, in words."""

    @abstractmethod
    def start(self) -> None:
        """Start its process, unless that is done."""

    @abstractmethod
    def score(self, prompts: list[str], completions: list[str], records: list[dict[str, Any]]) -> list[float]:
        """One finite score per completion."""

    @abstractmethod
    def require_fields(self, records: Iterable[dict[str, Any]]) -> None:
        """Refuse prompts whose records lack what it reads; ConfigError names it."""

    @abstractmethod
    def close(self) -> None:
        """End its process; does nothing the second time."""

    def remarks(self) -> list[str]:
        """Lines that a person should know before training."""
        return []

    def news(self) -> list[str]:
        """Lines about the completions since this was asked last."""
        return []

    def figures(self) -> dict[str, float]:
        """Numbers of the last call for the log, beside its scores."""
        return {}
