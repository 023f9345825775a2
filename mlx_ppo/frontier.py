"""How near a policy comes to the best one that its KL penalty allows, by samples of the reference and its own."""

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.best_of import best_of_kl, expected_best_of, powers
from mlx_ppo.algo.frontier import mixture_log_weights, tilted
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.data.prompts import Prompt
from mlx_ppo.data.random import philox
from mlx_ppo.errors import ConfigError, ModelError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.roles import Loading, Roles, load_roles
from mlx_ppo.prompting import Messages, load_data, tokenizer_of
from mlx_ppo.rewards.figures import Floats
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.folder import FRONTIER, SAMPLES, log_row, open_config, replace_file
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.runs.targets import newest_step, other_policy, parted, trained_weights
from mlx_ppo.stages.records import Rollout
from mlx_ppo.stages.rollout import Asked, distribution_of, generate, sampling
from mlx_ppo.stages.scoring import combined_scores, policy_logprobs, raw_scores

Document = dict[str, Any]

_ROWS = 256  # responses in memory together
_LEAST, _MOST = 1e-6, 1e6  # of a penalty
_RESAMPLED = 1000
_FEW = 10.0  # effective samples a prompt below which an estimate is mostly a bound
_PENALTIES = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)  # of the tilted curve, in units of the run's own


class Drawn(NamedTuple):
    """Samples of one policy: a row for each prompt."""

    scores: Floats  # [P, N], combined as the run combines them
    logprobs: Floats  # [P, N], of whole responses under the trained policy, nats
    reference: Floats  # [P, N], under the reference


class Question(NamedTuple):
    """What is asked of a run."""

    coef: float | None  # the penalty; None: the run's own
    samples: int  # of the reference and of the policy, for each prompt
    prompts: int  # of its evaluations, at most
    policy: Path | None = None  # another one than the run's, of the same model


class Listener(Messages, Protocol):
    """Who is told what happens."""

    def done(self, share: float) -> None:
        """So much more of all samples is there."""


def measured(path: Path, asked: Question, told: Listener) -> Document:
    """Sample a run's policy and its reference on the run's evaluation prompts, and say what `frontier` says.

    What is found is kept in the run's folder as well, unless another policy was asked about.

    Args:
        path: a run of `train`, or one of its checkpoints.
        asked: penalty, samples and prompts.
        told: hears of it.
    Raises:
        UserError: it isn't such a run, has no penalty, or can't be read.
    """
    real = Path(os.path.realpath(path))
    run, chosen = parted(real)
    config = open_config(run or real)
    if run is None or not isinstance(config, TrainConfig):
        raise ConfigError(f"{path}: a frontier is that of a run of `train`")
    if any(source.kind == "judge" and source.mode != "pointwise" and source.weight for source in config.reward):
        raise ConfigError(f"{path}: its judge compares completions; a score that isn't one by itself has no optimum")
    step = newest_step(run) if chosen is None else int(chosen.name) if chosen.name.isdecimal() else -1
    if step not in checkpoint.steps(run):
        raise ModelError(f"{path}: no such checkpoint")
    coef = _penalty(path, asked.coef if asked.coef is not None else checkpoint.read_state(run, step)["kl"]["coef"])
    _, held_out = load_data(config, tokenizer_of(config), told)
    prompts = held_out[: asked.prompts]
    roles, _, _ = load_roles(config, Loading(critic=False))
    try:
        roles.require_fields([prompt.record for prompt in prompts])
        for line in roles.remarks(max(len(prompt.tokens) for prompt in prompts) + config.rollout.max_tokens):
            told.message(line)
        policy = (
            trained_weights(checkpoint.folder_of(run, step), roles.trunk, full=config.model.train == "full")
            if asked.policy is None
            else other_policy(asked.policy, roles.trunk)
        )
        roles.trunk.share_below([])  # another policy may change any block
        policies = {"reference": roles.reference, "policy": policy}
        count = 2 * len(prompts) * asked.samples
        drawn = draw(config, roles, policies, prompts, asked.samples, lambda rows: told.done(rows / count))
        for line in roles.news():
            told.message(line)
    finally:
        roles.close()
    cut = distribution_of(config.rollout).truncates
    if cut:
        told.message(
            "the run draws from a part of the vocabulary: KL is that on the policy's part of it, and the optimum is "
            "estimated by samples of the reference alone"
        )
    measure = frontier(drawn, coef, mixed=not cut)
    if asked.policy is not None:
        return {"of": str(asked.policy), **measure, "evaluations": []}
    found = {"step": step, **measure, "evaluations": path_of(_rows(run / SAMPLES))}
    replace_file(run / FRONTIER, json.dumps(found, indent=2, allow_nan=False) + "\n")
    return found


def _penalty(path: Path, coef: float) -> float:
    """A penalty that there is an optimum for."""
    if not coef:
        raise ConfigError(
            f"{path}: trained without a penalty (kl.coef = 0), so there is no optimum; give one by --coef"
        )
    if not _LEAST <= coef <= _MOST:
        raise ConfigError(
            f"{path}: a penalty of {coef:g} tilts nothing that can be sampled; "
            f"give one by --coef, from {_LEAST:g} to {_MOST:g}"
        )
    return coef


def draw(
    config: TrainConfig,
    roles: Roles,
    policies: Mapping[str, Weights],
    prompts: Sequence[Prompt],
    samples: int,
    told: Callable[[int], None],
) -> dict[str, Drawn]:
    """Sample the policies "reference" and "policy" for each prompt, score, and read both under both.

    Args:
        config: the run's.
        roles: its models.
        policies: weights on the shared trunk.
        prompts: P of them.
        samples: N responses for each, of each policy.
        told: called with the number of responses that are done.
    Raises:
        RunError: a score is not finite, or a reward function failed.
    """
    size = Choices.pinned(config).score_batch or 32
    how = sampling(config.rollout, Choices.pinned(config), config.run.seed, "frontier")
    per, each = max(1, _ROWS // samples), min(samples, _ROWS)
    columns: dict[str, list[Drawn]] = {name: [] for name in policies}
    for start, first in itertools.product(range(0, len(prompts), per), range(0, samples, each)):
        chosen, count = prompts[start : start + per], min(each, samples - first)
        asked = Asked([one.tokens for one in chosen], range(start, start + len(chosen)), [one.record for one in chosen])
        for name, weights in policies.items():
            seeded = how._replace(samples_per_prompt=count, seed_parts=(*how.seed_parts, name, first))
            rollout = generate(roles.trunk, weights, asked, seeded)._replace(kept=None)
            raw = raw_scores(roles, rollout, batch_size=size)
            scores = combined_scores(raw, roles, rollout, config.score, config.rollout.max_tokens)
            read = [_whole(roles, policies[one], rollout, size) for one in ("policy", "reference")]
            columns[name].append(Drawn(*(np.array(one).ravel() for one in (scores, *read))))
            told(len(rollout.prompts))
    return {
        name: Drawn(*(np.concatenate(column).reshape(len(prompts), samples) for column in zip(*parts, strict=True)))
        for name, parts in columns.items()
    }


def _whole(roles: Roles, weights: Weights, rollout: Rollout, size: int) -> mx.array:
    """Log-probabilities [B] of whole responses."""
    roles.bring(roles.trunk)
    found = policy_logprobs(roles, weights, rollout, temperature=rollout.temperature, batch_size=size)
    return mx.where(rollout.mask, found, 0.0).sum(axis=1)


def frontier(drawn: Mapping[str, Drawn], coef: float, *, mixed: bool = True) -> Document:
    """What the samples say, as a document of numbers; gains are over the reference's mean score.

    Intervals are of 95 %, by 1000 resamplings of the prompts.

    Args:
        drawn: samples of "reference" and "policy".
        coef: the penalty.
        mixed: the policy's samples count for the optimum as well; their probability under the reference must be known.
    """
    ours, theirs = drawn["policy"], drawn["reference"]
    base = theirs.scores.mean(axis=1)
    count, prompts = theirs.scores.shape[1], len(base)
    order = philox("frontier", prompts).integers(0, prompts, (_RESAMPLED, prompts))

    def of(rows: Floats) -> list[float]:
        return [float(rows.mean()), *map(float, np.percentile(rows[order].mean(axis=1), [2.5, 97.5]))]

    gain = ours.scores.mean(axis=1) - base
    kl = (ours.logprobs - ours.reference).mean(axis=1)
    value = gain - coef * kl
    best = [(k, np.array(expected_best_of(mx.array(theirs.scores), k)) - base, best_of_kl(k)) for k in powers(count)]
    curve = {factor * coef: _optimum(drawn, factor * coef, base, mixed=mixed) for factor in _PENALTIES}
    optimum, effective = curve[coef]["value"], curve[coef]["effective"]
    others = [value, *(gains - coef * of_k for _, gains, of_k in best)]
    optimum = max((optimum, *others), key=lambda rows: float(rows.mean()))  # each bounds it from below
    shares = value[order].mean(axis=1) / np.maximum(optimum[order].mean(axis=1), 1e-9)
    share = float(value.mean() / optimum.mean()) if optimum.mean() > 0 else None
    return {
        "coef": coef,
        "prompts": prompts,
        "samples": count,
        "reference": {"score": float(base.mean()), "deviation": float(theirs.scores.std(axis=1).mean())},
        "policy": {"gain": of(gain), "kl": of(kl), "value": of(value)},
        "best_of": [
            {"k": k, "gain": float(g.mean()), "kl": of_k, "value": float(g.mean()) - coef * of_k} for k, g, of_k in best
        ],
        "tilted": [
            {"coef": one, **{name: float(rows.mean()) for name, rows in found.items()}} for one, found in curve.items()
        ],
        "optimum": {"value": of(optimum), "effective": float(effective.mean()), "few": bool(effective.mean() < _FEW)},
        "share": None if share is None else [share, *map(float, np.percentile(shares, [2.5, 97.5]))],
        "equal_kl": _at_equal_kl(float(gain.mean()), float(kl.mean()), best),
    }


def _optimum(drawn: Mapping[str, Drawn], coef: float, base: Floats, *, mixed: bool) -> dict[str, Floats]:
    """Of each prompt, the tilted reference's gain, KL, gain less penalty, and effective samples, by all samples."""
    scores, ours, theirs = (
        np.concatenate([getattr(drawn[name], field) for name in ("reference", "policy")[: 1 + mixed]], axis=1)
        for field in Drawn._fields
    )
    weights = mixture_log_weights(mx.array(theirs), mx.array(ours), ref_share=0.5 if mixed else 1)
    found = tilted(mx.array(scores), weights, coef=coef)
    return {
        "gain": np.array(found.score) - base,
        "kl": np.array(found.kl),
        "value": np.array(found.value) - base,
        "effective": np.array(found.effective),
    }


def _at_equal_kl(gain: float, kl: float, best: Sequence[tuple[int, Floats, float]]) -> Document | None:
    """What best-of-n gains at the policy's KL, and the policy's share of that; None beyond the largest n."""
    kls, gains = [of_k for _, _, of_k in best], [float(rows.mean()) for _, rows, _ in best]
    if not 0 < kl <= kls[-1]:
        return None
    there = float(np.interp(kl, kls, gains))
    return {"best_of_gain": there, "share": gain / there} if there > 0 else None


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [row for row in map(log_row, lines) if row is not None]


def path_of(rows: Sequence[Mapping[str, Any]]) -> list[Document]:
    """Gain and KL at each evaluation of a run, from its log of samples; over the evaluation before training."""
    summaries = [row for row in rows if row.get("kind") == "summary"]
    first = next((row["score"] for row in summaries if row["step"] == 0), None)
    if first is None:
        return []
    return [{"step": row["step"], "gain": row["score"] - first, "kl": row["kl"]} for row in summaries]
