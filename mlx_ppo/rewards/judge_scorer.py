"""A judge's judgements as scores, from 0 to 1.

A completion of which the judge says nothing that can be used gets the mean of the others of its prompt or, where there
are none, of the rollout: beside these it can teach nothing.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from mlx_ppo.config.rewards import RewardSource
from mlx_ppo.errors import printable
from mlx_ppo.rewards.judge import Judge, Surroundings
from mlx_ppo.rewards.judge_questions import Question, Value, grade, ranking, which
from mlx_ppo.rewards.scorer import TextScorer

_MIDDLE = 0.5
Scores = list[float | None]  # None: nothing is known


class JudgeScorer(TextScorer):
    """Grades, shares of comparisons that were won, or places in a ranking."""

    name = "judge"

    def __init__(self, source: RewardSource, surroundings: Surroundings) -> None:
        """Nothing is asked yet.

        Raises:
            RunError: the answers that are kept can't be read.
        """
        self._judge = Judge(source, surroundings)
        self._source = source
        self._around = surroundings
        self._news: list[str] = []
        self._questions = self._useless = 0  # of the last call

    @property
    def described(self) -> str:
        """What judges, in words."""
        return self._judge.described

    def start(self) -> None:
        """Find out whether the judge is there.

        Raises:
            JudgeLost: it isn't.
        """
        self._judge.start()

    def require_fields(self, records: Iterable[dict[str, Any]]) -> None:
        """It reads prompts and completions only."""

    def close(self) -> None:
        """Ask nothing more."""
        self._judge.close()

    def remarks(self) -> list[str]:
        """Who judges, and what the scores don't say."""
        said = [*self._judge.damaged, f"scores: {self.described}, {self._source.mode}"]
        if self._source.mode != "pointwise":
            said.append(
                "a judge that compares a prompt's completions gives 0.5 on average, and to each completion of an "
                "evaluation, which has one of each prompt: neither shows progress; `mlx-ppo compare` with --judge does"
            )
        return said

    def score(self, prompts: list[str], completions: list[str], records: list[dict[str, Any]]) -> list[float]:
        """A score from 0 to 1 for each completion.

        Raises:
            JudgeLost: the judge can't be reached, or too few of its answers can be used.
        """
        if not len(prompts) == len(completions) == len(records):
            raise ValueError(f"{len(prompts)} prompts, {len(completions)} completions, {len(records)} records")
        texts = [_as_read(prompt, record) for prompt, record in zip(prompts, records, strict=True)]
        groups = self._groups(texts)
        found = {"pointwise": self._grades, "pairwise": self._wins, "groupwise": self._places}[self._source.mode](
            texts, completions, groups
        )
        if self._useless:
            what = f"{self.described} gave no usable answer to {self._useless} of {self._questions} questions"
            without = sum(value is None for value in found)
            neutral = f"; {without} completions have the mean score of others" if without else ""
            self._news.append(printable(f"warning: {what}{neutral}; the first: {self._judge.first_useless}"))
        return filled(found, groups)

    def news(self) -> list[str]:
        """How many questions had no usable answer since this was asked last."""
        said, self._news = self._news, []
        return said

    def figures(self) -> dict[str, float]:
        """`unusable`: share of the last call's questions without a usable answer."""
        return {"unusable": self._useless / max(self._questions, 1)}

    def _asked(self, questions: Sequence[Question]) -> list[Value | None]:
        found = self._judge.ask(questions, most=self._source.unusable)
        self._questions, self._useless = len(found), sum(value is None for value in found)
        return found

    def _groups(self, prompts: Sequence[str]) -> list[range]:
        """Rows of each prompt: as many as are sampled; an evaluation has one of each."""
        size, count = self._around.samples, len(prompts)
        found = [range(start, start + size) for start in range(0, count, size)]
        if count % size or any(len({prompts[row] for row in rows}) > 1 for rows in found):
            found = [range(row, row + 1) for row in range(count)]
        return found

    def _grades(self, prompts: Sequence[str], completions: Sequence[str], _: Sequence[range]) -> Scores:
        rubric, scale = self._source.rubric, self._source.scale
        pairs = zip(prompts, completions, strict=True)
        found = self._asked([grade(prompt, completion, rubric, scale) for prompt, completion in pairs])
        return [value if isinstance(value, float) else None for value in found]

    def _wins(self, prompts: Sequence[str], completions: Sequence[str], groups: Sequence[range]) -> Scores:
        """Of each completion the share of the others of its prompt that it is better than; equal texts are a tie."""
        pairs = [pair for rows in groups for pair in combinations(rows, 2)]
        unequal = [(a, b) for a, b in pairs if completions[a] != completions[b]]
        questions = [
            which(prompts[a], completions[one], completions[other], self._source.rubric)
            for a, b in unequal
            for one, other in ((a, b), (b, a))
        ]
        found = self._asked(questions)
        second = {pair: _MIDDLE for pair in pairs if completions[pair[0]] == completions[pair[1]]}
        for pair, plain, swapped in zip(unequal, found[::2], found[1::2], strict=True):
            if isinstance(plain, float) and isinstance(swapped, float):
                second[pair] = (plain + 1 - swapped) / 2
        won: list[list[float]] = [[] for _ in prompts]
        for (a, b), value in second.items():
            won[a].append(1 - value)
            won[b].append(value)
        alone = {rows[0] for rows in groups if len(rows) == 1}
        return [sum(each) / len(each) if each else (_MIDDLE if row in alone else None) for row, each in enumerate(won)]

    def _places(self, prompts: Sequence[str], completions: Sequence[str], groups: Sequence[range]) -> Scores:
        """Of each completion its place in its prompt's ranking: 1 the first, 0 the last; equal texts share it."""
        different = [sorted({completions[row] for row in rows}) for rows in groups]
        asked = [at for at, texts in enumerate(different) if len(texts) > 1]
        rubric, seed = self._source.rubric, self._around.seed
        found = self._asked([ranking(prompts[groups[at][0]], different[at], rubric, seed) for at in asked])
        scores: Scores = [_MIDDLE] * len(prompts)
        for at, value in zip(asked, found, strict=True):
            for row in groups[at]:
                scores[row] = None
                if isinstance(value, tuple):
                    place = value.index(different[at].index(completions[row]))
                    scores[row] = 1 - place / (len(value) - 1)
        return scores


def _as_read(prompt: str, record: dict[str, Any]) -> str:
    """A prompt as a person reads it: a chat without the marks of its template."""
    said = record.get("prompt", record.get("messages"))
    if isinstance(said, list):
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in said)
    return prompt


def filled(scores: Scores, groups: Sequence[range]) -> list[float]:
    """Scores with the mean of the others of the prompt or, without these, of all, where there is none.

    Args:
        scores: of each row.
        groups: rows of each prompt, in their order.
    """
    known = [value for value in scores if value is not None] or [_MIDDLE]
    found: list[float] = []
    for rows in groups:
        own = [value for value in (scores[row] for row in rows) if value is not None] or known
        mean = sum(own) / len(own)
        found += [mean if value is None else value for value in (scores[row] for row in rows)]
    return found
