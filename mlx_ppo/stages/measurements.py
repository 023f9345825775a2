"""A finished iteration in numbers."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.diagnostics import explained_variance
from mlx_ppo.algo.kl import kl_estimate
from mlx_ppo.algo.masked import masked_mean, masked_sum
from mlx_ppo.data.random import philox
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.models.heads import RewardModel
from mlx_ppo.models.roles import Source
from mlx_ppo.rewards.scorer import TextScorer
from mlx_ppo.stages.records import PPOBatch, Rollout, Scored, UpdateStats, number
from mlx_ppo.tokenizers.load import completion_text


def iteration_metrics(
    step: int, kl_coef: float, rollout: Rollout, scored: Scored, batch: PPOBatch, stats: UpdateStats
) -> dict[str, float]:
    """The numbers of one iteration, by the keys of `mlx_ppo.runs.metrics`; times come from elsewhere."""
    mask = rollout.mask
    count = len(rollout.prompts)
    log_ratio = scored.old_logprobs - scored.ref_logprobs
    kl = number(masked_sum(log_ratio, mask)) / count
    score_mean = number(scored.scores.mean())
    metrics: dict[str, float] = {
        "step": step,
        "score": score_mean,
        "score_deviation": float(np.array(scored.scores).std()),
        "total_reward": score_mean - kl_coef * kl,
        "kl": kl,
        "kl_token": number(masked_mean(kl_estimate(scored.old_logprobs, scored.ref_logprobs, kind="k3"), mask)),
        "kl_coef": kl_coef,
        "entropy": number(masked_mean(scored.entropy, mask)),
        "length": number(mask.sum()) / count,
        "finished": number(rollout.finished.mean()),
        "repetition": repetition(rollout.responses),
        "distinct_2": distinct_pairs(rollout.responses),
        "clip_low": _mean(stats.clip_low),
        "clip_high": _mean(stats.clip_high),
        "kl_old": stats.kl_to_old[-1] if stats.kl_to_old else 0.0,
        "effective_samples": _mean(stats.effective_samples),
        "policy_loss": _mean(stats.policy_loss),
        "policy_norm": _mean(stats.policy_norm),
        "ratio_error": stats.first_ratio_error,
        "logprob_error": number(masked_mean(mx.abs(rollout.logprobs - scored.old_logprobs), mask)),
        "tokens": number(mask.sum()),
    }
    if batch.full_returns is not None and batch.old_values is not None:
        metrics["explained_variance"] = number(explained_variance(batch.old_values, batch.full_returns, mask))
        metrics["value_loss"] = _mean(stats.value_loss)
        metrics["critic_norm"] = _mean(stats.critic_norm)
    low, median, high = np.quantile(np.array(scored.scores), (0.1, 0.5, 0.9)).tolist()
    metrics |= {"score_low": low, "score_median": median, "score_high": high}
    metrics.update({f"points/{name}": number(values.mean()) for name, values in scored.points.items()})
    metrics.update({f"score/{name}": number(values.mean()) for name, values in scored.by_source.items()})
    metrics.update({f"disagreement/{name}": number(values.mean()) for name, values in scored.disagreement.items()})
    return metrics


def source_metrics(sources: Sequence[Source], scored: Scored) -> dict[str, float]:
    """Of each source the deviation of its scores; of reward models that tell their range, the share beyond it.

    Keys are `deviation/NAME`; `beyond/NAME`, responses with a score above all of the model's own training texts; and
    `unusable/NAME`, questions to a judge without an answer that could be used.
    """
    found: dict[str, float] = {}
    for source in sources:
        values = np.array(scored.by_source[source.name])
        found[f"deviation/{source.name}"] = float(values.std())
        highest = source.scorer.facts.highest if isinstance(source.scorer, RewardModel) else None
        if highest is not None:
            found[f"beyond/{source.name}"] = float((values > highest).mean())
        if isinstance(source.scorer, TextScorer):
            found |= {f"{key}/{source.name}": value for key, value in source.scorer.figures().items()}
    return found


def repetition(responses: Sequence[Sequence[int]]) -> float:
    """Share of the 4-grams of tokens that their own response had before; 0 where there are none."""
    found = [_ngrams(response, 4) for response in responses]
    count = sum(map(len, found))
    return 1 - sum(len(set(grams)) for grams in found) / count if count else 0.0


def distinct_pairs(responses: Sequence[Sequence[int]]) -> float:
    """Share of different pairs of neighbouring tokens among those of all responses; 0 where there are none."""
    found = [pair for response in responses for pair in _ngrams(response, 2)]
    return len(set(found)) / len(found) if found else 0.0


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]


def sample_rows(
    tokenizer: Tokenizer, prompts: Sequence[str], rollout: Rollout, scored: Scored, seed_and_step: tuple[int, int]
) -> list[dict[str, Any]]:
    """The responses of an iteration that are kept as texts, as rows of the log; that of the median score first.

    Args:
        tokenizer: the policy's.
        prompts: texts, of which each got as many responses.
        rollout: the responses.
        scored: their scores.
        seed_and_step: of the run, and the iteration's number.
    """
    seed, step = seed_and_step
    samples = len(rollout.prompts) // len(prompts)
    order = np.argsort(np.array(scored.scores)).tolist()
    by_chance = int(philox("sample", seed, step).integers(len(order)))
    kept = {"rollout": order[len(order) // 2], "best": order[-1], "worst": order[0], "chance": by_chance}
    return [
        {
            "step": step,
            "kind": kind,
            "prompt": prompts[row // samples],
            "completion": completion_text(tokenizer, rollout.prompts[row], rollout.responses[row]),
            "score": number(scored.scores[row]),
        }
        for kind, row in kept.items()
    ]


def response_columns(rollout: Rollout, scored: Scored) -> dict[str, list[float]]:
    """What is logged of every response of an iteration: a list for each column, in the rollout's order.

    The scores, by source too, predicted ratings, and how far the members of an ensemble disagree; tokens; 1 where it
    ended by itself; nats from the reference.
    """
    kl = mx.where(rollout.mask, scored.old_logprobs - scored.ref_logprobs, 0.0).sum(axis=1)
    columns = {
        "score": scored.scores,
        "length": rollout.mask.sum(axis=1),
        "finished": rollout.finished,
        "kl": kl,
        **{f"score/{name}": values for name, values in scored.by_source.items()},
        **{f"points/{name}": values for name, values in scored.points.items()},
        **{f"disagreement/{name}": values for name, values in scored.disagreement.items()},
    }
    return {name: [float(f"{value:.4g}") for value in np.array(column)] for name, column in columns.items()}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
