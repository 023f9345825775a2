"""What a policy writes for a fixed set of prompts, and what is measured of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_ppo.algo.masked import masked_sum
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.data.prompts import Prompt
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.roles import Roles
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.stages.records import Rollout, number
from mlx_ppo.stages.rollout import Asked, generate_together, sampling
from mlx_ppo.stages.scoring import combined_scores, policy_logprobs, raw_scores, reference_logprobs
from mlx_ppo.tokenizers.load import completion_text


class Completion(NamedTuple):
    """One answered prompt."""

    prompt: str
    text: str
    score: float
    points: dict[str, float]  # predicted ratings, by source


class Evaluation(NamedTuple):
    """Measurements over a set of prompts."""

    completions: tuple[Completion, ...]
    score: float
    points: dict[str, float]  # mean predicted rating, by source
    kl: float  # nats a sequence from the reference
    distinct_2: float  # different word pairs over all word pairs
    length: float
    finished: float

    def figures(self) -> dict[str, float]:
        """The numbers, for a log line."""
        named = {f"points/{name}": value for name, value in self.points.items()}
        rest = {name: getattr(self, name) for name in ("score", "kl", "distinct_2", "length", "finished")}
        return {**rest, **named}


def evaluate(
    roles: Roles, policy: Weights, prompts: Sequence[Prompt], config: TrainConfig, choices: Choices
) -> Evaluation:
    """Answer prompts with the same random draws at every call, so that differences come from the policy alone."""
    asked = Asked([prompt.tokens for prompt in prompts], range(len(prompts)), [prompt.record for prompt in prompts])
    how = sampling(config.rollout, choices, config.run.seed, "evaluate")._replace(samples_per_prompt=1)
    rollout = generate_together(roles, policy, asked, how)
    raw = raw_scores(roles, rollout, batch_size=choices.score_batch)
    scores = combined_scores(raw, roles, rollout, config.score, config.rollout.max_tokens)
    texts = [
        completion_text(roles.trunk.tokenizer, prompt, response)
        for prompt, response in zip(rollout.prompts, rollout.responses, strict=True)
    ]
    points = {name: np.array(values) for name, values in raw.points.items()}
    completions = tuple(
        Completion(prompt.text, text, value, {name: float(column[row]) for name, column in points.items()})
        for row, (prompt, text, value) in enumerate(zip(prompts, texts, np.array(scores).tolist(), strict=True))
    )
    return Evaluation(
        completions,
        score=number(scores.mean()),
        points={name: float(values.mean()) for name, values in points.items()},
        kl=sequence_kl(roles, policy, rollout, choices),
        distinct_2=distinct_ngrams(texts, 2),
        length=float(np.mean([len(response) for response in rollout.responses])),
        finished=number(rollout.finished.mean()),
    )


def evaluation_rows(step: int, evaluation: Evaluation) -> list[dict[str, Any]]:
    """An evaluation as rows of the log of samples."""
    rows = [
        {"step": step, "kind": "evaluation", "prompt": c.prompt, "completion": c.text, "score": c.score}
        | {f"points/{name}": value for name, value in c.points.items()}
        for c in evaluation.completions
    ]
    return [*rows, {"step": step, "kind": "summary", **evaluation.figures()}]


def sequence_kl(roles: Roles, policy: Weights, rollout: Rollout, choices: Choices) -> float:
    """Mean over sequences of the summed log pi - log pi_ref, in nats: an unbiased estimate of the KL divergence."""
    temperature, size = rollout.temperature, choices.score_batch
    roles.trunk.positions = choices.positions
    now = policy_logprobs(roles, policy, rollout, temperature=temperature, batch_size=size)
    reference = reference_logprobs(roles, rollout, temperature=temperature, batch_size=size)
    roles.evict()
    return number(masked_sum(now - reference, rollout.mask)) / len(rollout.prompts)


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams of words among all of them; 0 where there are none."""
    found = [tuple(words[at : at + n]) for words in map(str.split, texts) for at in range(len(words) - n + 1)]
    return len(set(found)) / len(found) if found else 0.0
