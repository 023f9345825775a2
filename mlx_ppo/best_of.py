"""Best-of-n: several completions of each prompt, their scores, and what the best of fewer would have scored."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.best_of import best_of_kl, expected_best_of, powers
from mlx_ppo.config.rewards import ScoreSection
from mlx_ppo.data.prompts import Prompt
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.roles import Roles
from mlx_ppo.rewards.figures import Floats
from mlx_ppo.stages.rollout import Asked, Sampling, generate
from mlx_ppo.stages.scoring import combined_scores, policy_logprobs, raw_scores, reference_logprobs
from mlx_ppo.tokenizers.load import completion_text

_TOGETHER = 256  # responses that are in memory at once
_SCORED = 32  # and in one forward pass
_Z95 = 1.96


class Drawn(NamedTuple):
    """Completions of P prompts, N each."""

    texts: list[list[str]]
    finished: list[list[bool]]  # it ended by itself, before max_tokens
    scores: Floats  # [P, N]
    kl: Floats  # [P, N] nats a response from the reference; 0 where it wasn't asked for


class Drawing(NamedTuple):
    """How completions are drawn and scored."""

    sampling: Sampling  # the draws derive from it and from each prompt's place
    section: ScoreSection  # how scores of several sources are combined, and what truncated responses lose
    with_kl: bool = False  # log pi - log pi_ref of each response too, by the training forward


class Interval(NamedTuple):
    """A mean over prompts, with its 95 % interval by the spread between prompts; NaN from a single one."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Floats) -> "Interval":
        """Of one number for each prompt."""
        mean = float(np.mean(values))
        half = _Z95 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(mean, mean - half, mean + half)


class Best(NamedTuple):
    """What the best of k completions is expected to score, and how far that is from who writes them."""

    k: int
    score: Interval
    kl_bound: float  # nats a response


def draw(
    roles: Roles,
    weights: Weights,
    prompts: Sequence[Prompt],
    drawing: Drawing,
    *,
    on_part: Callable[[int], None] = lambda _: None,
) -> Drawn:
    """Sample and score completions of each prompt, a part of the prompts at a time, which changes no number.

    Args:
        roles: the trunk, the reference, and what scores.
        weights: who writes.
        prompts: what is asked.
        drawing: how.
        on_part: called with the number of completions that are done.
    Raises:
        RunError: a score is not finite, or a reward function failed.
    """
    how, section, with_kl = drawing
    drawn, samples = Drawn([], [], np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32)), how.samples_per_prompt
    scores, kl = list[Floats](), list[Floats]()
    for at in _parts(len(prompts), max(1, _TOGETHER // samples)):
        part = prompts[at.start : at.stop]
        asked = Asked([prompt.tokens for prompt in part], at, [prompt.record for prompt in part])
        rollout = generate(roles.trunk, weights, asked, how)
        raw = raw_scores(roles, rollout, batch_size=_SCORED)
        found = combined_scores(raw, roles, rollout, section, how.max_tokens)
        scores.append(np.array(found).reshape(len(part), samples))
        nats = mx.zeros(found.shape)
        if with_kl:
            now = policy_logprobs(roles, weights, rollout, temperature=how.temperature, batch_size=_SCORED)
            then = reference_logprobs(roles, rollout, temperature=how.temperature, batch_size=_SCORED)
            nats = mx.where(rollout.mask, now - then, 0.0).sum(axis=1)
        kl.append(np.array(nats).reshape(len(part), samples))
        pairs = zip(rollout.prompts, rollout.responses, strict=True)
        texts = [completion_text(roles.trunk.tokenizer, prompt, response) for prompt, response in pairs]
        ended = np.array(rollout.finished).tolist()
        for row in range(0, len(texts), samples):
            drawn.texts.append(texts[row : row + samples])
            drawn.finished.append(ended[row : row + samples])
        on_part(len(drawn.texts) * samples)
    return drawn._replace(scores=np.concatenate(scores), kl=np.concatenate(kl))


def best_of_each(drawn: Drawn) -> list[Best]:
    """For k = 1, 2, 4, ... and N."""
    count = drawn.scores.shape[1]
    return [
        Best(k, Interval.of(np.array(expected_best_of(mx.array(drawn.scores), k))), best_of_kl(k))
        for k in powers(count)
    ]


class Chosen(NamedTuple):
    """The best completion of a prompt."""

    prompt: int
    sample: int


def choose(drawn: Drawn, *, only_finished: bool) -> list[Chosen]:
    """The completion of each prompt with the highest score; of equal ones one that ended by itself, then the first.

    Those of nothing but white space are never chosen: nobody can learn from them. A prompt may be left without one.

    Args:
        drawn: the completions.
        only_finished: leave out those that `max_tokens` cut, from which a model would learn to stop in mid-sentence.
    """
    found = []
    for number, (texts, ended) in enumerate(zip(drawn.texts, drawn.finished, strict=True)):
        usable = [at for at, text in enumerate(texts) if text.strip() and (ended[at] or not only_finished)]
        row, done = drawn.scores[number].tolist(), ended
        if usable:
            best = max(row[at] for at in usable)
            equal = [at for at in usable if row[at] == best]
            found.append(Chosen(number, next((at for at in equal if done[at]), equal[0])))
    return found


def choose_pairs(drawn: Drawn, *, only_finished: bool) -> list[tuple[Chosen, Chosen]]:
    """The best completion of each prompt with the worst one, where that scores lower and is another text.

    Args:
        drawn: the completions.
        only_finished: leave out those that `max_tokens` cut.
    """
    best = choose(drawn, only_finished=only_finished)
    worst = choose(drawn._replace(scores=-drawn.scores), only_finished=only_finished)
    return [
        (first, last)
        for first, last in zip(best, worst, strict=True)
        if drawn.scores[first] > drawn.scores[last]
        and drawn.texts[first.prompt][first.sample] != drawn.texts[last.prompt][last.sample]
    ]


def _parts(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(count, start + size))
