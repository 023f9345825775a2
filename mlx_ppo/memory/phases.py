"""What each phase of an iteration needs, by tracing the run's own functions on roles without weights."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_ppo.compute.kv_cache import FULL, is_plain, new_caches, size_caches
from mlx_ppo.compute.sequences import Sequences, make_sequences
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.choices import Possible, Shapes
from mlx_ppo.memory.model import loading, reading
from mlx_ppo.memory.simulator import named, predict
from mlx_ppo.memory.supports import Supports
from mlx_ppo.memory.weightless import present, shapes_of_call
from mlx_ppo.models.adapters import Weights
from mlx_ppo.models.heads import RewardModel
from mlx_ppo.models.roles import Roles, evictable
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.stages.losses import CriticTargets, Pass, PolicyTargets, critic_loss, policy_loss
from mlx_ppo.stages.scoring import critic_values, logprob_column, policy_columns, raw_of

Terms = dict[str, int]
_CACHE = "keys and values (KV cache)"
_SETS = "sets of tokens that were sampled from"
_AHEAD = "work that mlx begins ahead"


@dataclass(frozen=True)
class Phase:
    """A phase's peak in bytes, and what it consists of."""

    name: str
    resident: Mapping[str, int]  # there before and after
    passing: Mapping[str, int]  # comes and goes, in mlx
    outside: int  # numpy's, at its largest
    factor: float = 1.0  # measured over predicted, where that is known

    @property
    def peak(self) -> int:
        """That of mlx."""
        return int(self.factor * (sum(self.resident.values()) + sum(self.passing.values())))

    @property
    def transient(self) -> int:
        """What of the peak comes and goes."""
        return self.peak - sum(self.resident.values())

    @property
    def ahead(self) -> int:
        """What of it mlx adds where it is to wait from the rest on: it waits for work only after having begun more."""
        return self.passing.get(_AHEAD, 0)


@dataclass(frozen=True)
class Cost:
    """What a phase needs beside what is there before and after it."""

    passing: Terms = field(default_factory=dict)
    outside: int = 0

    @property
    def transient(self) -> int:
        """What of it is mlx's."""
        return sum(self.passing.values())


class Accountant:
    """Predicts the phases of one configuration; what was traced once is remembered."""

    def __init__(
        self,
        config: TrainConfig,
        roles: Roles,
        policy: Weights,
        critic: Weights | None,
        shapes: Shapes,
        *,
        compact: "Callable[[], Accountant] | None" = None,
    ) -> None:
        """Keep what the phases read.

        Args:
            config: the run's.
            roles: with or without weights; see `memory.model.weightless_roles`.
            policy: its trained weights.
            critic: those of the critic.
            shapes: of the run.
            compact: makes another accountant, whose quantised model stays quantised; None where nothing is quantised.
        """
        self.config, self.roles, self.policy, self.critic, self.shapes = config, roles, policy, critic, shapes
        trunk = roles.trunk
        self.possible = Possible(evict=bool(evictable(roles, config)), compact=compact is not None)
        self._compact = functools.cache(compact) if compact is not None else None
        self._width = trunk.width
        self._dtype = trunk.dtype
        state = mx.zeros((1, 1, self._width), self._dtype)
        self._vocabulary = shapes_of_call(trunk.logits, state).shape[-1]
        self._supports = Supports(config.rollout, trunk.engine, self._vocabulary)
        self._seen: dict[tuple[object, ...], Cost] = {}

    def with_shapes(self, shapes: Shapes) -> "Accountant":
        """The same for other shapes."""
        other = self._compact
        compact = None if other is None else lambda: other().with_shapes(shapes)
        return Accountant(self.config, self.roles, self.policy, self.critic, shapes, compact=compact)

    def phases(self, choices: Choices) -> list[Phase]:
        """Every phase of an iteration that isn't the first: the optimizers have their states."""
        if choices.compact and self._compact is not None:
            return self._compact().phases(choices)
        self.roles.trunk.positions = choices.positions
        away = evictable(self.roles, self.config) if choices.evict else []
        responses = self.shapes.everywhere or self.shapes.responses
        resident = self._resident(away) | {_SETS: self._supports.of(responses * self.shapes.response)}
        if self.roles.trunk.split and choices.kv_cache == FULL:
            resident["states kept below the adapters"] = self._kept(responses)
        found = [self._load(away), _phase("rollout", resident, self._rollout(choices))]
        for name, trunk, cost in self._scores(choices):
            there, passing = (
                resident | self._taken(min(choices.score_batch, self.shapes.responses), choices),
                cost.passing,
            )
            if trunk is not None and any(trunk is other for other in away):
                there[f"weights of the {self._trunks()[id(trunk)][0]}"] = _bytes(trunk.base)
                passing = max(passing, {"a tensor as it is read": reading(trunk)}, key=lambda part: sum(part.values()))
            found.append(_phase(name, there, Cost(passing, cost.outside)))
        return found + self._update(resident, choices)

    def shared(self) -> tuple[list[str], int]:
        """The roles that one trunk serves, and the bytes that a copy for each of the others would take."""
        trunk, critic = self.roles.trunk, self.roles.critic
        served = ["policy", "reference"] if self.config.model.train == "lora" else ["reference"]
        if critic is not None and critic.trunk is trunk:
            served.append("critic")
        served += [
            f"reward model {source.name}"
            for source in self.roles.sources
            if isinstance(source.scorer, RewardModel) and source.scorer.trunk is trunk
        ]
        return served, (len(served) - 1) * _bytes(trunk.base)

    def _resident(self, away: Sequence[Trunk]) -> Terms:
        """What stays in memory all through training."""
        trunks = {what: trunk for what, trunk in self._trunks().values() if not any(trunk is one for one in away)}
        terms = {f"weights of the {what}": _bytes(trunk.base) for what, trunk in trunks.items()}
        terms["policy's trained weights"] = _bytes(self.policy.arrays)
        terms["critic's trained weights"] = _bytes(self._critic_arrays())
        terms["reward adapters"] = sum(_bytes(own.arrays) for model in self._rewards() for own in model.members)
        terms["optimizer states"] = 2 * (_bytes(self.policy.arrays) + _bytes(self._critic_arrays()))
        return {name: size for name, size in terms.items() if size}

    def _trunks(self) -> dict[int, tuple[str, Trunk]]:
        """Every trunk once, by what it is for; a critic's own has no frozen weights, all of them are trained."""
        named = {id(self.roles.trunk): ("shared trunk", self.roles.trunk)}
        for number, model in enumerate(self._rewards(), start=1):
            named.setdefault(id(model.trunk), (f"reward model {number}", model.trunk))
        return named

    def _rewards(self) -> list[RewardModel]:
        return [source.scorer for source in self.roles.sources if isinstance(source.scorer, RewardModel)]

    def _critic_arrays(self) -> Mapping[str, mx.array]:
        return self.critic.arrays if self.critic is not None else {}

    def _load(self, away: Sequence[Trunk]) -> Phase:
        """Model by model, and tensor by tensor."""
        weights = {name: size for name, size in self._resident(away).items() if name.startswith("weights")}
        gone = max((_bytes(trunk.base) for trunk in away), default=0)
        read = max(loading(trunk) for _, trunk in self._trunks().values())
        return _phase("load", weights, Cost({"weights that are evicted again": gone, "a tensor as it is read": read}))

    def _rollout(self, choices: Choices) -> Cost:
        """The largest of reading prompts, of a token at full length on top of the cache, and of rows joining it."""
        shapes, trunk = self.shapes, self.roles.trunk
        rows = min(choices.rollout_batch, shapes.responses) if trunk.capabilities.batches else 1

        def read(tokens: mx.array) -> list[Any]:
            caches = new_caches(trunk.model, choices.kv_cache, len(tokens))
            size_caches(caches, tokens.shape[1])
            with trunk.using(self.policy):
                if choices.kv_cache == FULL:
                    states, entering = trunk.hidden_and_entering(tokens, caches)
                else:
                    states, entering = trunk.hidden(tokens, caches), None
                logits = trunk.logits(states[:, -1])
            return [
                logits,
                entering,
                [[cache.keys, cache.values] if is_plain(cache) else cache.state for cache in caches],
            ]

        def tokens(rows: int, length: int) -> mx.array:
            return mx.zeros((rows, length), mx.int32)

        samples = max(1, shapes.responses // shapes.distinct)  # of a prompt; those that begin together read it once
        read_rows = min(rows, shapes.distinct, (rows - 2) // samples + 2)
        prompts = self._predict(("prefill", choices.kv_cache, read_rows), read, tokens(read_rows, shapes.prompt))
        step = self._predict(("step", choices.kv_cache, rows), read, tokens(rows, 1))
        (*_, caches) = shapes_of_call(read, tokens(1, shapes.prompt + shapes.response))
        full = [leaf for _, leaf in cast(list[Any], tree_flatten(caches)) if isinstance(leaf, mx.array)]
        cache = rows * sum(array.nbytes for array in full)
        # The cache is made in its full length; that of rows which are being decoded is there while others are read.
        before = read_rows if rows < shapes.responses else rows
        longer = cache - cache * before * shapes.prompt // (rows * (shapes.prompt + shapes.response))
        outside = max(rows * self._vocabulary * 4, prompts.outside) + self._supports.gathered(shapes)
        if prompts.transient + longer > cache + (passing := self._decoding(rows, step, full)).transient:
            return Cost({**prompts.passing, _CACHE: longer}, outside)
        return Cost({**passing.passing, _CACHE: cache}, outside)

    def _decoding(self, rows: int, step: Cost, caches: Sequence[Any]) -> Cost:
        """What decoding needs on top of the caches, whose arrays for one row are given: a token, or rows that join."""
        largest = max(caches, key=lambda tensor: tensor.nbytes)
        moving = 2 * rows * largest.nbytes  # a block's keys and values
        written = {"a block's, dequantised": moving * self._dtype.size} if largest.dtype == mx.uint32 else {}
        token = Cost({**step.passing, **written, **self._supports.sampling(rows)})
        return max(token, Cost({"a block's, as rows leave or join": moving}), key=lambda cost: cost.transient)

    def _scores(self, choices: Choices) -> list[tuple[str, Trunk | None, Cost]]:
        """Name, the trunk whose frozen weights are read (None: the role brings its own), and cost."""
        roles, critic, temperature = self.roles, self.critic, self.config.rollout.temperature
        head = critic if roles.critic is not None and roles.critic.kind == "head" else None
        of_policy = policy_columns(roles, self.policy, head, temperature)
        of_reference = logprob_column(roles, roles.reference, temperature)
        sharing = roles.trunk.capabilities.shares
        functions: list[tuple[str, Trunk | None, Callable[[Sequences], list[mx.array]], bool]]
        functions = [("score policy", None, of_policy, sharing)]
        if roles.critic is not None and critic is not None and head is None:
            of_critic = critic_values(roles.critic, critic)
            functions.append(("score critic", None, of_critic, roles.critic.trunk.capabilities.shares))
        anew = {id(source.scorer) for source in roles.sources if source.own_tokens}
        for model in self._rewards():
            functions.append(
                ("score reward", model.trunk, raw_of(model), model.shares_prompts and id(model) not in anew)
            )
        functions.append(("score reference", roles.trunk, of_reference, sharing))
        rows = min(choices.score_batch, self.shapes.responses)
        found = []
        for at, (name, trunk, function, sharing) in enumerate(functions):
            given = self._sequences(rows, choices, self.shapes.distinct if sharing else None)
            key = (name, at, rows, choices.positions, choices.kv_cache)
            found.append((name, trunk, self._predict(key, function, given)))
        return found

    def _update(self, resident: Terms, choices: Choices) -> list[Phase]:
        rows = min(choices.micro_batch, self.shapes.minibatch)
        resident = resident | self._taken(rows, choices)
        own, others = _bytes(self.policy.arrays), _bytes(self._critic_arrays())
        several = rows < self.shapes.minibatch
        before = {"gradients so far": own + others if several else 0}
        found = [_phase("update policy", resident | before, self._policy(rows, choices))]
        if self.critic is not None:
            states = {"gradients so far": own + (others if several else 0), "policy's states": self._states(rows)}
            found.append(_phase("update critic", resident | states, self._critic(rows, choices)))
        largest = max((array.nbytes for array in {**self.policy.arrays, **self._critic_arrays()}.values()), default=0)
        transposed = not self.roles.trunk.capabilities.rows  # as mlx makes a matrix's gradient
        stepping = self.roles.trunk.engine.step_needs(own, others, largest, transposed=transposed)
        there = {"gradients so far": own + others, "policy's states": self._states(rows)}
        return [*found, _phase("update step", resident | there, Cost(stepping))]

    def _policy(self, rows: int, choices: Choices) -> Cost:
        targets = PolicyTargets(present(rows, self.shapes.response), present(rows, self.shapes.response), 1.0)
        how = Pass(self.config.ppo, self.config.rollout.temperature, saving=choices.checkpointing)

        def loss(arrays: Mapping[str, mx.array]) -> mx.array:
            sequences = self._updated(rows, choices)
            return policy_loss(self.roles.trunk, self.policy, sequences, targets, how)(arrays)[0]

        return self._gradient("policy", rows, choices, loss, self.policy)

    def _critic(self, rows: int, choices: Choices) -> Cost:
        critic, weights = self.roles.critic, self.critic
        assert critic is not None and weights is not None
        targets = CriticTargets(present(rows, self.shapes.response), present(rows, self.shapes.response), 1.0)
        how = Pass(self.config.ppo, self.config.rollout.temperature, saving=choices.checkpointing)
        states = present(rows * self.shapes.response, self._width) if critic.kind == "head" else None

        def loss(arrays: Mapping[str, mx.array]) -> mx.array:
            return critic_loss(critic, weights, self._updated(rows, choices), targets, how, states)(arrays)

        return self._gradient("critic", rows, choices, loss, weights)

    def _gradient(
        self, role: str, rows: int, choices: Choices, loss: Callable[..., mx.array], weights: Weights
    ) -> Cost:
        key = (role, rows, choices.positions, choices.kv_cache, choices.checkpointing)
        return self._predict(key, mx.value_and_grad(loss), dict(weights.arrays))

    def _updated(self, rows: int, choices: Choices) -> Sequences:
        """The rows of a pass of the update. Those of one prompt lie side by side, so that few prompts are in a pass."""
        section, minibatch = self.config.rollout, self.shapes.minibatch
        trunks = {self.roles.trunk, *([self.roles.critic.trunk] if self.roles.critic is not None else [])}
        if not all(trunk.shares_learning(saving=choices.checkpointing) for trunk in trunks):
            return self._sequences(rows, choices, None)
        whole = -(-section.prompts * section.samples_per_prompt // self.config.ppo.minibatches)
        left_out = 1 - whole / (section.prompts * section.samples_per_prompt)
        prompts = section.prompts * (1 - left_out**section.samples_per_prompt)  # expected in a minibatch
        prompts *= minibatch / whole  # rows of one prompt are side by side
        return self._sequences(rows, choices, math.ceil(prompts * rows / minibatch) + (rows < minibatch))

    def _sequences(self, rows: int, choices: Choices, distinct: int | None) -> Sequences:
        """Rows of full length, of so many different prompts where these may be shared."""
        prompts = [[row % (distinct or rows), *[0] * (self.shapes.prompt - 1)] for row in range(rows)]
        responses = [[0] * self.shapes.response] * rows
        made = self._supports.on(make_sequences(prompts, responses, sharing=distinct is not None))
        if not self.roles.trunk.split or choices.kv_cache != FULL:
            return made
        if made.shared is None:
            return made._replace(kept=present(*made.tokens.shape, self._width, dtype=self._dtype))
        first, second = made.shared.prompts.shape, made.shared.responses.shape
        kept = present(*first, self._width, dtype=self._dtype), present(*second, self._width, dtype=self._dtype)
        return made._replace(shared=made.shared._replace(kept=kept))

    def _taken(self, rows: int, choices: Choices) -> Terms:
        """The rows of a batch, out of the kept states."""
        made = self._updated(rows, choices)
        kept = [made.kept] if made.shared is None else made.shared.kept
        sets = {"sets of this batch's tokens": self._supports.of(rows * self.shapes.response)}
        return sets | {"of them, this batch's": sum(part.nbytes for part in kept or [] if part is not None)}

    def _kept(self, responses: int) -> int:
        return responses * (self.shapes.prompt + self.shapes.response) * self._width * self._dtype.size

    def _states(self, rows: int) -> int:
        return rows * self.shapes.response * self._width * self._dtype.size

    @functools.cached_property
    def _trained(self) -> set[tuple[int, ...]]:
        return {array.shape for array in (*self.policy.arrays.values(), *self._critic_arrays().values())}

    def _predict(self, key: tuple[object, ...], function: Callable[..., Any], *arrays: Any) -> Cost:
        if key not in self._seen:
            peak = predict(function, *arrays, thorough=False, limited=self.roles.trunk.engine.runs_ahead)
            passing = named(peak, self._vocabulary, self._trained) | {_AHEAD: peak.ahead}
            self._seen[key] = Cost(passing, peak.outside)
        return self._seen[key]


def _phase(name: str, resident: Mapping[str, int], cost: Cost) -> Phase:
    there = {what: size for what, size in resident.items() if size}
    return Phase(name, there, {what: size for what, size in cost.passing.items() if size}, cost.outside)


def _bytes(arrays: Mapping[str, mx.array]) -> int:
    return sum(array.nbytes for array in arrays.values())
