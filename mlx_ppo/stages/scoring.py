"""A rollout into scores, old and reference log-probabilities, and values."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.rewards import clip_scores, penalise_truncated, soft_overlong_penalty
from mlx_ppo.compute.sequences import Sequences
from mlx_ppo.config.rewards import ScoreSection
from mlx_ppo.data.batches import length_batches
from mlx_ppo.errors import RunError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.heads import RewardModel, joined
from mlx_ppo.models.roles import Critic, Roles, Source, token_statistics
from mlx_ppo.rewards.judge_scorer import JudgeScorer
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.runtime.group import Group
from mlx_ppo.runtime.phases import ASKING, phase
from mlx_ppo.stages.records import Rollout, Scored, number
from mlx_ppo.tokenizers.load import completion_text

Name = TypeVar("Name", bound=Hashable)


class RawScores(NamedTuple):
    """Scores of each source before weights, penalties and clipping."""

    normalised: dict[str, mx.array]  # [B] each: the model's normalised score, or the function's value
    points: dict[str, mx.array]  # [B] each: predicted ratings, for models trained on ratings
    members: Mapping[str, list[mx.array]] = MappingProxyType({})  # [B] for each member of an ensemble: its scores

    def disagreement(self) -> dict[str, mx.array]:
        """The deviation [B] of the scores of each ensemble's members."""
        return {name: mx.sqrt(mx.stack(scores).var(axis=0)) for name, scores in self.members.items()}


def raw_scores(roles: Roles, rollout: Rollout, *, batch_size: int) -> RawScores:
    """Ask every source; those on the shared trunk last, so that what reads it afterwards finds it in memory.

    Raises:
        RunError: a score is not finite, or a reward function failed.
        JudgeLost: a judge can't be reached, or too few of its answers can be used.
        ModelError: a text is longer in its own tokens than a reward model has positions.
    """
    normalised: dict[str, mx.array] = {}
    points: dict[str, mx.array] = {}
    members: dict[str, list[mx.array]] = {}
    parts, own, models = _parts(roles, rollout), list[mx.array](), list[tuple[str, int]]()
    for source in sorted(roles.sources, key=lambda source: _on_shared_trunk(source, roles)):
        if isinstance(source.scorer, RewardModel):
            model = source.scorer
            read = _read_anew(model, roles, rollout) if source.own_tokens else rollout
            model.trunk.within(max(map(sum, read.lengths), default=0))
            with phase("score reward"):
                roles.bring(model.trunk)
                rows = parts[roles.group.rank]
                for member in range(len(model.members)):
                    own += _by_rows(read, rows, batch_size, raw_of(model, member), sharing=model.shares_prompts)
                    models.append((source.name, member))
        else:
            asked = _ask_function(roles, source, rollout) if roles.group.leads else None
            normalised[source.name] = mx.array(roles.group.told(asked), mx.float32)
    whole = _of_all(roles.group, parts, models, own)
    for source in roles.sources:
        if isinstance(source.scorer, RewardModel):
            each = [whole[source.name, member] for member in range(len(source.scorer.members))]
            raw = joined(each)
            normalised[source.name] = source.scorer.normalised(raw)
            if len(each) > 1:
                members[source.name] = source.scorer.member_scores(each)
            in_points = source.scorer.points(raw)
            if in_points is not None:
                points[source.name] = in_points
        _require_finite(normalised[source.name], f"a score of the reward {source.name!r}", rollout, roles)
    return RawScores({source.name: normalised[source.name] for source in roles.sources}, points, members)


def _on_shared_trunk(source: Source, roles: Roles) -> bool:
    return isinstance(source.scorer, RewardModel) and source.scorer.trunk is roles.trunk


def raw_of(model: RewardModel, member: int = 0) -> Callable[[Sequences], list[mx.array]]:
    """The raw outputs [B] of a reward model, or of a member of an ensemble."""
    return lambda sequences: [model.raw_of(member, sequences)]


def _read_anew(model: RewardModel, roles: Roles, rollout: Rollout) -> Rollout:
    """The same texts in the tokens of a model of another family, chats in its own template."""
    tokenizer, own = roles.trunk.tokenizer, model.trunk.tokenizer
    rows: list[tuple[int, ...]] = []
    finished = np.array(rollout.finished).tolist()
    for prompt, response, record, ended in zip(
        rollout.prompts, rollout.responses, rollout.records, finished, strict=True
    ):
        answer = completion_text(tokenizer, prompt, response)
        said = record.get("prompt", record.get("messages"))
        if isinstance(said, list) and own.has_chat_template:
            turns = [*said, {"role": "assistant", "content": answer}]
            rows.append(tuple(own.render_chat(turns, add_generation_prompt=False)))
        else:
            tokens = own.encode(tokenizer.decode(prompt) + answer, bos=True)
            rows.append((*tokens, own.eos_id) if ended else tuple(tokens))
    mask = mx.zeros((len(rows), 1), mx.bool_)
    return rollout._replace(prompts=tuple(rows), responses=((),) * len(rows), mask=mask, kept=None, support=None)


def _ask_function(roles: Roles, source: Source, rollout: Rollout) -> list[float]:
    assert source.scorer is not None and not isinstance(source.scorer, RewardModel)
    tokenizer = roles.trunk.tokenizer
    prompts = [tokenizer.decode(prompt) for prompt in rollout.prompts]
    texts = [
        completion_text(tokenizer, prompt, response)
        for prompt, response in zip(rollout.prompts, rollout.responses, strict=True)
    ]
    with phase(ASKING) if isinstance(source.scorer, JudgeScorer) else nullcontext():
        return source.scorer.score(prompts, texts, list(rollout.records))


def combined_scores(raw: RawScores, roles: Roles, rollout: Rollout, section: ScoreSection, max_tokens: int) -> mx.array:
    """One score [B] for each response: the sources by weight (0: only logged), gates, penalties for length, clipping.

    In a sum an ensemble counts as one source, by its mean; for the lowest, and for mean less deviation, each of its
    members is a source.

    Source of the cautious combination: Coste et al. 2024, arXiv:2310.02743, section 3 (there the variance).
    """
    each = {name: [scores] for name, scores in raw.normalised.items()}
    if section.combine != "sum":
        each |= raw.members
    columns = [source.weight * scores for source in roles.sources if source.weight for scores in each[source.name]]
    weighted = mx.stack(columns or [mx.zeros((len(rollout.prompts),))])
    if section.combine == "worst":
        scores = weighted.min(axis=0)
    elif section.combine == "cautious":
        scores = weighted.mean(axis=0) - section.caution * mx.sqrt(weighted.var(axis=0))
    else:
        scores = weighted.sum(axis=0)
    for source in roles.sources:
        if source.gate:
            scores = mx.where(raw.normalised[source.name] == 0, 0.0, scores)
    scores = penalise_truncated(scores, rollout.finished, mode=section.truncated, value=section.truncated_value)
    if section.overlong_buffer:
        lengths = mx.array([len(response) for response in rollout.responses])
        scores = scores + soft_overlong_penalty(lengths, max_length=max_tokens, buffer=section.overlong_buffer)
    return clip_scores(scores, section.clip) if section.clip else scores


def score(
    roles: Roles,
    policy: Weights,
    critic: Weights | None,
    rollout: Rollout,
    section: ScoreSection,
    choices: Choices,
) -> Scored:
    """Everything the update needs to know of a rollout, by the training forward over response positions only.

    Raises:
        RunError: a score, log-probability or value is not finite.
    """
    size, temperature = choices.score_batch, rollout.temperature
    roles.trunk.positions = choices.positions
    head = critic if roles.critic is not None and roles.critic.kind == "head" else None

    parts = _parts(roles, rollout)
    rows = parts[roles.group.rank]
    with phase("score policy"):
        columns = policy_columns(roles, policy, head, temperature)
        names = ["old", "entropy"] + ["values"] * (head is not None)
        own = _by_rows(rollout, rows, size, columns, sharing=roles.trunk.capabilities.shares)
    if roles.critic is not None and critic is not None and head is None:
        with phase("score critic"):
            sharing = roles.critic.trunk.capabilities.shares
            own += _by_rows(rollout, rows, size, critic_values(roles.critic, critic), sharing=sharing)
            names.append("values")
    raw = raw_scores(roles, rollout, batch_size=size)
    scores = combined_scores(raw, roles, rollout, section, rollout.max_tokens)
    with phase("score reference"):
        roles.bring(roles.trunk)
        column = logprob_column(roles, roles.reference, temperature)
        own += _by_rows(rollout, rows, size, column, sharing=roles.trunk.capabilities.shares)
        names.append("reference")
    whole = _of_all(roles.group, parts, names, own)
    old, reference, entropy, values = whole["old"], whole["reference"], whole["entropy"], whole.get("values")
    roles.evict()
    _require_finite(old, "a log-probability of the policy", rollout, roles)
    _require_finite(reference, "a log-probability of the reference", rollout, roles)
    if values is not None:
        _require_finite(values, "a value of the critic", rollout, roles)
    return Scored(scores, raw.normalised, old, reference, entropy, values, raw.points, raw.disagreement())


def policy_columns(
    roles: Roles, policy: Weights, head: Weights | None, temperature: float
) -> Callable[[Sequences], list[mx.array]]:
    """Log-probabilities and entropies [B, T] under the policy, and values where a critic's head reads its states."""

    def columns(sequences: Sequences) -> list[mx.array]:
        with roles.trunk.using(policy):
            states = roles.trunk.response_states(sequences)
            found = list(token_statistics(roles.trunk, states, sequences, temperature=temperature))
        if head is not None and roles.critic is not None:
            found.append(sequences.spread(roles.critic.values(head, states)))
        return found

    return columns


def critic_values(critic: Critic, weights: Weights) -> Callable[[Sequences], list[mx.array]]:
    """Values [B, T] of a critic that has states of its own."""
    return lambda sequences: [sequences.spread(critic.values(weights, critic.states(weights, sequences)))]


def policy_logprobs(
    roles: Roles, weights: Weights, rollout: Rollout, *, temperature: float, batch_size: int
) -> mx.array:
    """Log-probabilities [B, T] of the responses under some weights on the shared trunk, such as the reference's."""
    parts, column = _parts(roles, rollout), logprob_column(roles, weights, temperature)
    found = _by_rows(rollout, parts[roles.group.rank], batch_size, column, sharing=roles.trunk.capabilities.shares)
    return _of_all(roles.group, parts, ["logprobs"], found)["logprobs"]


def logprob_column(roles: Roles, weights: Weights, temperature: float) -> Callable[[Sequences], list[mx.array]]:
    """Log-probabilities [B, T] alone."""

    def column(sequences: Sequences) -> list[mx.array]:
        with roles.trunk.using(weights):
            states = roles.trunk.response_states(sequences)
            return [token_statistics(roles.trunk, states, sequences, temperature=temperature)[0]]

    return column


def reference_logprobs(roles: Roles, rollout: Rollout, *, temperature: float, batch_size: int) -> mx.array:
    """Log-probabilities [B, T] of the responses under the reference."""
    roles.bring(roles.trunk)
    return policy_logprobs(roles, roles.reference, rollout, temperature=temperature, batch_size=batch_size)


def _parts(roles: Roles, rollout: Rollout) -> list[list[int]]:
    """The rows that each process of the group reads; those of one prompt stay together where they may share it."""
    group, count = roles.group, len(rollout.prompts)
    if group.size == 1 or (roles.trunk.capabilities.shares and len(set(rollout.prompts)) < count):
        return [list(group.part(count, rank=rank)) for rank in range(group.size)]
    return group.deal([sum(pair) for pair in rollout.lengths])


def _by_rows(
    rollout: Rollout,
    own: Sequence[int],
    batch_size: int,
    function: Callable[[Sequences], list[mx.array]],
    *,
    sharing: bool,
) -> list[mx.array]:
    """Apply a function to batches of rows of similar length, and put its results back in the order of the rows.

    Args:
        rollout: the rows.
        own: those to look at, in their order.
        batch_size: rows together, 0: all.
        function: gives columns [B] or [B, T], in float32.
        sharing: the function may be given shared prompts.
    Returns:
        The columns; none where there are no rows.
    """
    order: list[int] = []
    parts: list[list[mx.array]] = []
    lengths = [sum(rollout.lengths[row]) for row in own]
    for rows in length_batches(lengths, max_rows=batch_size or len(lengths), max_tokens=None, seed_parts=None):
        found = function(rollout.sequences([own[row] for row in rows], sharing=sharing))
        mx.eval(found)
        parts.append(found)
        order.extend(rows)
    back = mx.array(np.argsort(np.array(order)).astype(np.int32))
    return [mx.concatenate(list(column))[back] for column in zip(*parts, strict=True)]


def _of_all(
    group: Group, parts: Sequence[Sequence[int]], names: Sequence[Name], own: Sequence[mx.array]
) -> dict[Name, mx.array]:
    """Columns of all rows by name, from each process's of its own part; a process without rows gives none."""
    if group.size == 1:
        return dict(zip(names, own, strict=True))
    given = [part for part in group.gather([np.asarray(column) for column in own]) if part]
    back = np.argsort(np.array([row for part in parts for row in part]))
    return {name: mx.array(np.concatenate([part[at] for part in given])[back]) for at, name in enumerate(names)}


def _require_finite(values: mx.array, what: str, rollout: Rollout, roles: Roles) -> None:
    finite = mx.isfinite(values) if values.ndim == 1 else mx.where(rollout.mask, mx.isfinite(values), True).all(axis=1)
    if finite.all().item():
        return
    row = int(number(mx.argmin(finite.astype(mx.int32))))
    text = roles.trunk.tokenizer.decode([*rollout.prompts[row], *rollout.responses[row]])
    raise RunError(f"{what} is not finite, for the response {text[:120]!r}; nothing was updated")
