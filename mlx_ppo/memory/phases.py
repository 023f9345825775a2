"""What each phase of an iteration needs, by tracing the run's own functions on roles without weights."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_ppo.config import PPOSection, TrainConfig
from mlx_ppo.memory.model import width_of
from mlx_ppo.memory.replay import predict
from mlx_ppo.memory.trace import trace
from mlx_ppo.networks.adapters import HEAD, Weights, layer_of
from mlx_ppo.networks.heads import RewardModel
from mlx_ppo.networks.roles import Roles
from mlx_ppo.networks.trunk import Trunk
from mlx_ppo.records import Sequences, make_sequences
from mlx_ppo.rollout import size_caches
from mlx_ppo.scoring import critic_values, policy_columns, raw_of
from mlx_ppo.update import CriticTargets, PolicyTargets, critic_loss, policy_loss

Terms = dict[str, int]
_CHECKPOINTED = 1.5  # times what a block or the head needs by itself: measured, since the barriers can't be traced


@dataclass(frozen=True)
class Shapes:
    """The largest arrays of a run."""

    prompt: int  # tokens of the longest prompt
    response: int  # tokens of the longest response
    responses: int  # of an iteration
    distinct: int  # prompts of an iteration
    minibatch: int  # responses of an optimizer step


@dataclass(frozen=True)
class Choices:
    """What a plan may choose; each changes memory and speed, never what is computed."""

    rollout_batch: int
    score_batch: int
    micro_batch: int
    checkpointing: bool


@dataclass(frozen=True)
class Phase:
    """A phase's peak in bytes, and what it consists of."""

    name: str
    resident: Mapping[str, int]  # there before and after
    transient: int  # comes and goes, in mlx
    outside: int  # numpy's, at its largest

    @property
    def peak(self) -> int:
        """That of mlx."""
        return sum(self.resident.values()) + self.transient


@dataclass(frozen=True)
class _Cost:
    transient: int
    outside: int = 0


class Accountant:
    """Predicts the phases of one configuration; what was traced once is remembered."""

    def __init__(
        self, config: TrainConfig, roles: Roles, policy: Weights, critic: Weights | None, shapes: Shapes
    ) -> None:
        """Keep what the phases read; see `memory.model.weightless_roles` for the roles."""
        self.config, self.roles, self.policy, self.critic, self.shapes = config, roles, policy, critic, shapes
        trunk = roles.trunk
        self._width = width_of(trunk)
        self._dtype = next(array.dtype for array in trunk.base.values() if mx.issubdtype(array.dtype, mx.floating))
        state = mx.zeros((1, 1, self._width), self._dtype)
        self._vocabulary = trace(trunk.logits, state).outputs[0].shape[-1]
        self._seen: dict[tuple[str, int], _Cost] = {}

    def with_response(self, response: int) -> "Accountant":
        """The same for responses of another length."""
        shapes = replace(self.shapes, response=response)
        return Accountant(self.config, self.roles, self.policy, self.critic, shapes)

    def phases(self, choices: Choices) -> list[Phase]:
        """Every phase of an iteration that isn't the first: the optimizers have their states."""
        resident = self.resident()
        kept = {"states kept below the adapters": self._kept(self.shapes.responses)} if self.roles.trunk.split else {}
        found = [self._load(), _phase("rollout", resident | kept, self._rollout(choices.rollout_batch))]
        found += [_phase(name, resident | kept, cost) for name, cost in self._scores(choices.score_batch)]
        return found + self._update(resident | kept, choices)

    def resident(self) -> Terms:
        """What stays in memory all through training."""
        terms = {f"weights of the {what}": _bytes(trunk.base) for what, trunk in self._trunks().items()}
        terms["policy's trained weights"] = _bytes(self.policy.arrays)
        terms["critic's trained weights"] = _bytes(self._critic_arrays())
        terms["reward adapters"] = sum(_bytes(model.weights.arrays) for model in self._rewards())
        terms["optimizer states"] = 2 * (_bytes(self.policy.arrays) + _bytes(self._critic_arrays()))
        return {name: size for name, size in terms.items() if size}

    def _trunks(self) -> dict[str, Trunk]:
        """Every trunk once, by what it is for."""
        named: dict[int, tuple[str, Trunk]] = {id(self.roles.trunk): ("shared trunk", self.roles.trunk)}
        if self.roles.critic is not None:
            named.setdefault(id(self.roles.critic.trunk), ("critic", self.roles.critic.trunk))
        for number, model in enumerate(self._rewards(), start=1):
            named.setdefault(id(model.trunk), (f"reward model {number}", model.trunk))
        return dict(named.values())

    def _rewards(self) -> list[RewardModel]:
        return [source.scorer for source in self.roles.sources if isinstance(source.scorer, RewardModel)]

    def _critic_arrays(self) -> Mapping[str, mx.array]:
        return self.critic.arrays if self.critic is not None else {}

    def _load(self) -> Phase:
        """Tensor by tensor: what is loaded so far, and a tensor as stored, cast, and looked at for NaN."""
        weights = {name: size for name, size in self.resident().items() if name.startswith("weights")}
        return Phase("load", weights, 2 * max(array.nbytes for array in self.roles.trunk.base.values()), 0)

    def _rollout(self, batch: int) -> _Cost:
        """The larger of reading the prompts, and of a token at full length on top of the cache."""
        from mlx_lm.models.cache import make_prompt_cache  # here, since mlx-lm lowers the limit of open files

        shapes, trunk = self.shapes, self.roles.trunk
        rows = min(batch, shapes.responses)

        def read(tokens: mx.array) -> list[Any]:
            caches = make_prompt_cache(trunk.model)
            size_caches(caches, tokens.shape[1])
            with trunk.using(self.policy):
                states, entering = trunk.hidden_and_entering(tokens, caches)
                logits = trunk.logits(states[:, -1])
            return [logits, entering, [cache.state for cache in caches]]

        def tokens(rows: int, length: int) -> mx.array:
            return mx.zeros((rows, length), mx.int32)

        prompts = self._predict("prefill", min(rows, shapes.distinct), read, lambda n: [tokens(n, shapes.prompt)])
        step = self._predict("step", rows, read, lambda n: [tokens(n, 1)])
        full = trace(lambda t: read(t)[2], tokens(1, shapes.prompt + shapes.response))
        cache = rows * sum(tensor.nbytes for tensor in full.outputs)
        longer = cache * shapes.response // (shapes.prompt + shapes.response)  # the cache is made in its full length
        outside = rows * self._vocabulary * 4
        return _Cost(max(prompts.transient + longer, cache + step.transient), max(outside, prompts.outside))

    def _scores(self, batch: int) -> list[tuple[str, _Cost]]:
        roles, critic, temperature = self.roles, self.critic, self.config.rollout.temperature
        head = critic if roles.critic is not None and roles.critic.kind == "head" else None
        functions = [("score reward", raw_of(model)) for model in self._rewards()]
        functions.append(("score policy", policy_columns(roles, self.policy, head, temperature)))
        functions.append(("score reference", policy_columns(roles, roles.reference, None, temperature)))
        if roles.critic is not None and critic is not None and head is None:
            functions.append(("score critic", critic_values(roles.critic, critic)))
        rows = min(batch, self.shapes.responses)
        return [
            (name, self._predict(f"{name} {at}", rows, function, lambda n: [self._sequences(n)]))
            for at, (name, function) in enumerate(functions)
        ]

    def _update(self, resident: Terms, choices: Choices) -> list[Phase]:
        rows = min(choices.micro_batch, self.shapes.minibatch)
        several = rows < self.shapes.minibatch
        own, others = _bytes(self.policy.arrays), _bytes(self._critic_arrays())
        before = {"gradients": own + others if several else 0}
        found = [_phase("update policy", resident | before, self._policy(rows, choices.checkpointing))]
        if self.critic is not None:
            states = {"gradients": own + (others if several else 0), "policy's states": self._states(rows)}
            found.append(_phase("update critic", resident | states, self._critic(rows, choices.checkpointing)))
        largest = max((array.nbytes for array in {**self.policy.arrays, **self._critic_arrays()}.values()), default=0)
        return [*found, Phase("update step", resident | {"gradients": own + others}, 2 * max(own, others) + largest, 0)]

    def _policy(self, rows: int, checkpointing: bool) -> _Cost:
        targets = PolicyTargets(_there(rows, self.shapes.response), _there(rows, self.shapes.response), 1.0)
        temperature = self.config.rollout.temperature

        def loss(arrays: Mapping[str, mx.array], kept: mx.array | None = None) -> mx.array:
            sequences = self._sequences(rows) if kept is None else self._sequences(rows)._replace(kept=kept)
            section = _plain(self.config.ppo)
            found = policy_loss(self.roles.trunk, self.policy, sequences, targets, section, temperature)(arrays)
            return found[0]

        return self._gradient("policy", rows, loss, self.roles.trunk, self.policy, checkpointing)

    def _critic(self, rows: int, checkpointing: bool) -> _Cost:
        critic, weights = self.roles.critic, self.critic
        assert critic is not None and weights is not None
        targets = CriticTargets(_there(rows, self.shapes.response), _there(rows, self.shapes.response), 1.0)
        states = _there(rows * self.shapes.response, self._width) if critic.kind == "head" else None

        def loss(arrays: Mapping[str, mx.array], kept: mx.array | None = None) -> mx.array:
            sequences = self._sequences(rows) if kept is None else self._sequences(rows)._replace(kept=kept)
            return critic_loss(critic, weights, sequences, targets, _plain(self.config.ppo), states)(arrays)

        return self._gradient("critic", rows, loss, critic.trunk, weights, checkpointing and critic.kind != "head")

    def _gradient(
        self,
        role: str,
        rows: int,
        loss: Callable[..., mx.array],
        trunk: Trunk,
        weights: Weights,
        checkpointing: bool,
    ) -> _Cost:
        """A forward and backward pass; with checkpointing, each block's inputs, and the head or one block at a time."""
        if not checkpointing:
            return self._predict(role, rows, mx.value_and_grad(loss), lambda _: [dict(weights.arrays)])
        entering = rows * (self.shapes.prompt + self.shapes.response) * self._width * self._dtype.size
        lowest = trunk.split
        parts = []
        for name, split in (("head", trunk.blocks), ("block", trunk.blocks - 1)):
            top = {n: a for n, a in weights.arrays.items() if n.startswith(HEAD) or _block(n) >= split}
            trunk.split = split
            try:
                gradient = mx.value_and_grad(loss, argnums=(0, 1))
                kept = mx.zeros((rows, self.shapes.prompt + self.shapes.response, self._width), self._dtype)
                parts.append(self._predict(f"{role} {name}", rows, gradient, functools.partial(_both, top, kept)))
            finally:
                trunk.split = lowest
        most = int(_CHECKPOINTED * max(part.transient for part in parts))
        return _Cost((trunk.blocks - lowest + 2) * entering + most, max(part.outside for part in parts))

    def _sequences(self, rows: int) -> Sequences:
        made = make_sequences([[0] * self.shapes.prompt] * rows, [[0] * self.shapes.response] * rows)
        if not self.roles.trunk.split:
            return made
        return made._replace(kept=_there(*made.tokens.shape, self._width, dtype=self._dtype))

    def _kept(self, responses: int) -> int:
        return responses * (self.shapes.prompt + self.shapes.response) * self._width * self._dtype.size

    def _states(self, rows: int) -> int:
        return rows * self.shapes.response * self._width * self._dtype.size

    def _predict(
        self, name: str, rows: int, function: Callable[..., Any], arguments: Callable[[int], list[Any]]
    ) -> _Cost:
        if (name, rows) not in self._seen:
            peak = predict(function, *arguments(rows), sequential=False, thorough=False)
            self._seen[name, rows] = _Cost(peak.transient, peak.outside)
        return self._seen[name, rows]


def _there(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """An array that is in memory already, as far as a trace can see; it takes no more than an element."""
    array = mx.broadcast_to(mx.zeros((), dtype), shape)
    mx.eval(array)
    return array


def _both(arrays: Mapping[str, mx.array], kept: mx.array, _: int) -> list[Any]:
    return [arrays, kept]


def _phase(name: str, resident: Mapping[str, int], cost: _Cost) -> Phase:
    return Phase(name, {what: size for what, size in resident.items() if size}, cost.transient, cost.outside)


def _plain(section: PPOSection) -> PPOSection:
    """Without checkpointing, which mlx cannot trace."""
    return section.model_copy(update={"gradient_checkpointing": "off"})


def _block(name: str) -> int:
    try:
        return layer_of(name)[0]
    except StopIteration:  # it lies before or after the blocks
        return -1


def _bytes(arrays: Mapping[str, mx.array]) -> int:
    return sum(array.nbytes for array in arrays.values())
