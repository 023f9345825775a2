"""What truncated sampling adds to a plan: the sets of tokens that a rollout carries, and what finding them needs."""

import mlx.core as mx

from mlx_ppo.algo.truncation import words_of
from mlx_ppo.compute.engine import Engine
from mlx_ppo.compute.sequences import Sequences
from mlx_ppo.config.sections import RolloutSection
from mlx_ppo.memory.choices import Shapes
from mlx_ppo.memory.weightless import present
from mlx_ppo.stages.rollout import distribution_of


class Supports:
    """Sizes in bytes; all 0 where a run samples from all tokens."""

    def __init__(self, section: RolloutSection, engine: Engine, vocabulary: int) -> None:
        """Keep what they depend on: how a run samples, what computes, and how many logits a token has."""
        self._words = words_of(vocabulary) if distribution_of(section).truncates else 0
        self._engine, self._vocabulary = engine, vocabulary

    def of(self, tokens: int) -> int:
        """The sets of so many tokens, a bit for each entry of the vocabulary."""
        return 4 * tokens * self._words

    def gathered(self, shapes: Shapes) -> int:
        """Those of a process's own responses, in numpy until all are there."""
        return self.of(shapes.responses * shapes.response)

    def sampling(self, rows: int) -> dict[str, int]:
        """What a step of some rows needs beside their logits, and what is kept of it."""
        return self._engine.truncation_needs(rows, self._vocabulary) if self._words else {}

    def on(self, sequences: Sequences) -> Sequences:
        """The same sequences with sets of their tokens, as far as a trace can see."""
        if not self._words:
            return sequences
        return sequences._replace(support=present(len(sequences.targets), self._words, dtype=mx.uint32))
