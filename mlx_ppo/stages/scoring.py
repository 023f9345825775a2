"""A rollout into scores, old and reference log-probabilities, and values."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ppo.algo.rewards import clip_scores, penalise_truncated, soft_overlong_penalty
from mlx_ppo.compute.sequences import Sequences
from mlx_ppo.config.sections import ScoreSection
from mlx_ppo.data.batches import length_batches
from mlx_ppo.errors import RunError
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.heads import RewardModel
from mlx_ppo.models.roles import Critic, Roles, Source, token_statistics
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.runtime.phases import phase
from mlx_ppo.stages.records import Rollout, Scored, number
from mlx_ppo.tokenizers.load import completion_text


class RawScores(NamedTuple):
    """Scores of each source before weights, penalties and clipping."""

    normalised: dict[str, mx.array]  # [B] each: the model's normalised score, or the function's value
    points: dict[str, mx.array]  # [B] each: predicted ratings, for models trained on ratings


def raw_scores(roles: Roles, rollout: Rollout, *, batch_size: int) -> RawScores:
    """Ask every source; those on the shared trunk last, so that what reads it afterwards finds it in memory.

    Raises:
        RunError: a score is not finite, or a reward function failed.
    """
    normalised: dict[str, mx.array] = {}
    points: dict[str, mx.array] = {}
    for source in sorted(roles.sources, key=lambda source: _on_shared_trunk(source, roles)):
        if isinstance(source.scorer, RewardModel):
            model = source.scorer
            read = _read_anew(model, roles, rollout) if source.own_tokens else rollout
            with phase("score reward"):
                roles.bring(model.trunk)
                raw = _by_rows(read, batch_size, raw_of(model), sharing=model.shares_prompts)[0]
            values = model.normalised(raw)
            in_points = model.points(raw)
            if in_points is not None:
                points[source.name] = in_points
        else:
            values = mx.array(_ask_function(roles, source, rollout), mx.float32)
        _require_finite(values, f"a score of the reward {source.name!r}", rollout, roles)
        normalised[source.name] = values
    return RawScores({source.name: normalised[source.name] for source in roles.sources}, points)


def _on_shared_trunk(source: Source, roles: Roles) -> bool:
    return isinstance(source.scorer, RewardModel) and source.scorer.trunk is roles.trunk


def raw_of(model: RewardModel) -> Callable[[Sequences], list[mx.array]]:
    """A reward model's raw outputs [B]."""
    return lambda sequences: [model.raw(sequences)]


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
    return rollout._replace(prompts=tuple(rows), responses=((),) * len(rows), mask=mask, kept=None)


def _ask_function(roles: Roles, source: Source, rollout: Rollout) -> list[float]:
    assert source.scorer is not None and not isinstance(source.scorer, RewardModel)
    tokenizer = roles.trunk.tokenizer
    prompts = [tokenizer.decode(prompt) for prompt in rollout.prompts]
    texts = [
        completion_text(tokenizer, prompt, response)
        for prompt, response in zip(rollout.prompts, rollout.responses, strict=True)
    ]
    return source.scorer.score(prompts, texts, list(rollout.records))


def combined_scores(raw: RawScores, roles: Roles, rollout: Rollout, section: ScoreSection, max_tokens: int) -> mx.array:
    """One score [B] for each response: the sources by weight, penalties for length, clipping.

    Source of the cautious combination: Coste et al. 2024, arXiv:2310.02743, section 3 (there the variance).
    """
    columns = [source.weight * raw.normalised[source.name] for source in roles.sources]
    weighted = mx.stack(columns or [mx.zeros((len(rollout.prompts),))])
    if section.combine == "worst":
        scores = weighted.min(axis=0)
    elif section.combine == "cautious":
        scores = weighted.mean(axis=0) - section.caution * mx.sqrt(weighted.var(axis=0))
    else:
        scores = weighted.sum(axis=0)
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

    with phase("score policy"):
        columns = policy_columns(roles, policy, head, temperature)
        old, entropy, *rest = _by_rows(rollout, size, columns, sharing=roles.trunk.capabilities.shares)
    values = rest[0] if rest else None
    if roles.critic is not None and critic is not None and head is None:
        with phase("score critic"):
            of_critic = critic_values(roles.critic, critic)
            values = _by_rows(rollout, size, of_critic, sharing=roles.critic.trunk.capabilities.shares)[0]
    raw = raw_scores(roles, rollout, batch_size=size)
    scores = combined_scores(raw, roles, rollout, section, rollout.max_tokens)
    with phase("score reference"):
        reference = reference_logprobs(roles, rollout, temperature=temperature, batch_size=size)
    roles.evict()
    _require_finite(old, "a log-probability of the policy", rollout, roles)
    _require_finite(reference, "a log-probability of the reference", rollout, roles)
    if values is not None:
        _require_finite(values, "a value of the critic", rollout, roles)
    return Scored(scores, raw.normalised, old, reference, entropy, values)


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

    def under_weights(sequences: Sequences) -> list[mx.array]:
        with roles.trunk.using(weights):
            states = roles.trunk.response_states(sequences)
            return [token_statistics(roles.trunk, states, sequences, temperature=temperature)[0]]

    return _by_rows(rollout, batch_size, under_weights, sharing=roles.trunk.capabilities.shares)[0]


def reference_logprobs(roles: Roles, rollout: Rollout, *, temperature: float, batch_size: int) -> mx.array:
    """Log-probabilities [B, T] of the responses under the reference."""
    roles.bring(roles.trunk)
    return policy_logprobs(roles, roles.reference, rollout, temperature=temperature, batch_size=batch_size)


def _by_rows(
    rollout: Rollout, batch_size: int, function: Callable[[Sequences], list[mx.array]], *, sharing: bool
) -> list[mx.array]:
    """Apply a function to batches of rows of similar length, and put its results back in the rollout's order.

    `sharing`: the function may be given shared prompts.
    """
    order: list[int] = []
    parts: list[list[mx.array]] = []
    for rows in _row_batches(rollout, batch_size):
        found = function(rollout.sequences(rows, sharing=sharing))
        mx.eval(found)
        parts.append(found)
        order.extend(rows)
    back = mx.array(np.argsort(np.array(order)).astype(np.int32))
    return [mx.concatenate(list(column))[back] for column in zip(*parts, strict=True)]


def _row_batches(rollout: Rollout, batch_size: int) -> Iterator[list[int]]:
    lengths = [sum(pair) for pair in rollout.lengths]
    yield from length_batches(lengths, max_rows=batch_size or len(lengths), max_tokens=None, seed_parts=None)


def _require_finite(values: mx.array, what: str, rollout: Rollout, roles: Roles) -> None:
    finite = mx.isfinite(values) if values.ndim == 1 else mx.where(rollout.mask, mx.isfinite(values), True).all(axis=1)
    if finite.all().item():
        return
    row = int(number(mx.argmin(finite.astype(mx.int32))))
    text = roles.trunk.tokenizer.decode([*rollout.prompts[row], *rollout.responses[row]])
    raise RunError(f"{what} is not finite, for the response {text[:120]!r}; nothing was updated")
