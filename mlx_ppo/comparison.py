"""Which of two completions of a prompt is better: by a reward model, a function, a model that is asked, or a person.

A judge gives a margin for each pair, above 0 where the second completion is the better one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_ppo.compute.sequences import make_sequences
from mlx_ppo.config.rewards import RewardSource
from mlx_ppo.data.batches import length_batches
from mlx_ppo.data.chat import Messages
from mlx_ppo.data.jsonl import Record
from mlx_ppo.data.prompts import asked
from mlx_ppo.data.sequences import answered_tokens, prompt_tokens
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ModelError
from mlx_ppo.models.heads import RewardModel
from mlx_ppo.models.roles import token_statistics
from mlx_ppo.rewards.figures import Floats
from mlx_ppo.rewards.functions import RewardFunction
from mlx_ppo.rewards.judge import Judge as Asking
from mlx_ppo.rewards.judge import Surroundings
from mlx_ppo.rewards.judge_questions import which
from mlx_ppo.runs.targets import Target

CRITERION = "Which of the two is the better one?"
_ROWS = 16  # questions that a model is asked together
_Question = tuple[tuple[int, ...], int, int]  # tokens up to where the letter stands, and the tokens of A and B there


class Pair(NamedTuple):
    """Two completions of a prompt."""

    prompt: str  # as a person reads it
    record: Mapping[str, object]  # its JSONL record
    first: str
    second: str


class Judge(Protocol):
    """What prefers one of two completions."""

    def margins(self, pairs: Sequence[Pair]) -> Floats:
        """For each pair [n] by how much the second completion is the better one."""


class ByReward:
    """A reward model, which scores each completion as a finished answer."""

    def __init__(self, model: RewardModel) -> None:
        """Keep the model."""
        self._model = model

    def margins(self, pairs: Sequence[Pair]) -> Floats:
        """Normalised score of the second less that of the first.

        Raises:
            DataError: a prompt can't be read.
        """
        model, tokenizer, rows = self._model, self._model.trunk.tokenizer, []
        for number, pair in enumerate(pairs, start=1):
            record = Record(Path("pairs"), number, dict(pair.record))
            said, where = asked(record), record.where
            prefix = prompt_tokens(said, tokenizer, where)
            for text in (pair.first, pair.second):
                rows.append(tuple(answered_tokens(said, prefix, text, tokenizer, where)[0]))
        raw = model.of_texts(rows).mean(axis=0).reshape(-1, 2)
        margins: Floats = (raw[:, 1] - raw[:, 0]) / np.float32(model.facts.deviation)
        return margins


class ByFunction:
    """A user's reward function, which must have been started."""

    def __init__(self, function: RewardFunction) -> None:
        """Keep the function."""
        self._function = function

    def margins(self, pairs: Sequence[Pair]) -> Floats:
        """Score of the second less that of the first.

        Raises:
            RunError: the function failed.
        """
        prompts, records = [pair.prompt for pair in pairs], [dict(pair.record) for pair in pairs]
        self._function.require_fields(records)
        first, second = (
            np.array(self._function.score(prompts, list(texts), records), np.float32)
            for texts in ([pair.first for pair in pairs], [pair.second for pair in pairs])
        )
        return second - first


class ByModel:
    """A language model that is shown both completions and asked for a letter, in both orders.

    What it would write is never read, so it can't be misread: its answer is log P(letter) of the one less that of the
    other, from one forward pass for each order. The mean of both orders is the margin; what a model gives to a place
    or a letter alone cancels.
    """

    def __init__(self, target: Target, criterion: str = CRITERION) -> None:
        """Keep the model.

        Args:
            target: a model folder or a run, loaded.
            criterion: the question.
        """
        self._target = target
        self._criterion = criterion
        self.by_place = 0.0  # share of the pairs, at the last call, in which the order decided

    def margins(self, pairs: Sequence[Pair]) -> Floats:
        """Mean over both orders of the log-probability of the second less that of the first, in nats.

        Raises:
            ModelError: the tokenizer can't tell the letters apart, or the model can't read texts of that length.
        """
        tokenizer = self._target.trunk.tokenizer
        questions = [self._question(pair, tokenizer, swapped) for swapped in (False, True) for pair in pairs]
        for_b = self._asked(questions)
        plain, swapped = for_b[: len(pairs)], -for_b[len(pairs) :]
        self.by_place = float((plain * swapped < 0).mean()) if len(pairs) else 0.0
        margins: Floats = np.mean([plain, swapped], axis=0, dtype=np.float32)
        return margins

    def _question(self, pair: Pair, tokenizer: Tokenizer, swapped: bool) -> _Question:
        one, other = (pair.second, pair.first) if swapped else (pair.first, pair.second)
        text = (
            f"A text begins like this:\n\n{pair.prompt.strip()}\n\nTwo writers went on.\n\n"
            f"A:\n{one.strip()}\n\nB:\n{other.strip()}\n\n{self._criterion} Answer with one letter, A or B."
        )
        chat = tokenizer.has_chat_template
        said: str | Messages = [{"role": "user", "content": text}] if chat else f"{text}\n\nAnswer:"
        prefix = prompt_tokens(said, tokenizer, "the judge's question")
        a, b = (
            answered_tokens(said, prefix, letter if chat else f" {letter}", tokenizer, "the judge's question")[0]
            for letter in "AB"
        )
        at = next((place for place, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), 0)
        if not at:
            raise ModelError(f"{self._target.trunk.name}: its tokenizer can't tell A from B; take another judge")
        return tuple(a[:at]), a[at], b[at]

    def _asked(self, questions: Sequence[_Question]) -> Floats:
        """Log P(B) - log P(A) of each question."""
        trunk, found = self._target.trunk, np.zeros(len(questions), np.float32)
        lengths = [len(tokens) for tokens, _, _ in questions]
        trunk.within(max(lengths, default=0) + 1)
        for rows in length_batches(lengths, max_rows=_ROWS, max_tokens=None, seed_parts=None):
            prompts, a, b = zip(*(questions[row] for row in rows), strict=True)
            sequences = make_sequences(prompts, [(token,) for token in a])
            with trunk.using(self._target.weights):
                states = trunk.response_states(sequences)
                of_a, _ = token_statistics(trunk, states, sequences, temperature=1.0)
                other = sequences._replace(targets=mx.array(b, mx.int32))
                of_b, _ = token_statistics(trunk, states, other, temperature=1.0)
            found[rows] = np.array((of_b - of_a)[:, 0])
        return found


class ByServer:
    """A model in another process that is shown both completions and answers with a letter, in both orders."""

    def __init__(self, source: RewardSource) -> None:
        """Nothing is asked yet.

        Args:
            source: a reward of kind "judge"; its rubric is the question.
        """
        self._source = source
        self._judge = Asking(source, Surroundings())
        self.described, self.question = self._judge.described, source.rubric
        self.by_place = 0.0  # share of the pairs, at the last call, in which the order decided
        self.unusable = 0  # answers, at the last call

    def start(self) -> None:
        """Find out whether it is there; JudgeLost where it isn't."""
        self._judge.start()

    def margins(self, pairs: Sequence[Pair]) -> Floats:
        """From -1 to 1, the mean over both orders; 0 where one of the two answers can't be used.

        Raises:
            JudgeLost: the server can't be reached, or too few of its answers can be used.
        """
        rubric = self._source.rubric
        questions = [
            which(pair.prompt, one, other, rubric)
            for pair in pairs
            for one, other in ((pair.first, pair.second), (pair.second, pair.first))
        ]
        found = self._judge.ask(questions, most=self._source.unusable)
        self.unusable = found.count(None)
        both = [
            (plain, swapped) if isinstance(plain, float) and isinstance(swapped, float) else (0.5, 0.5)
            for plain, swapped in zip(found[::2], found[1::2], strict=True)
        ]
        self.by_place = sum(plain == swapped != 0.5 for plain, swapped in both) / max(len(both), 1)
        return np.array([plain - swapped for plain, swapped in both], np.float32)
