"""A finished iteration in numbers."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.diagnostics import explained_variance
from mlx_ppo.algo.kl import kl_estimate
from mlx_ppo.algo.masked import masked_mean, masked_sum
from mlx_ppo.stages.records import PPOBatch, Rollout, Scored, number
from mlx_ppo.stages.update import UpdateStats


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
        "reward": score_mean - kl_coef * kl,
        "kl": kl,
        "kl_token": number(masked_mean(kl_estimate(scored.old_logprobs, scored.ref_logprobs, kind="k3"), mask)),
        "kl_coef": kl_coef,
        "entropy": number(masked_mean(scored.entropy, mask)),
        "length": number(mask.sum()) / count,
        "finished": number(rollout.finished.mean()),
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
    metrics.update({f"score/{name}": number(values.mean()) for name, values in scored.by_source.items()})
    return metrics


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
