"""The four roles as views of as few weights as possible; the one place that knows which arrays are shared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_ppo.compute.sequences import Sequences
from mlx_ppo.config.rewards import RewardSource
from mlx_ppo.config.sections import CriticSection, LoraSection, ModelSection, TrainConfig
from mlx_ppo.errors import ModelError
from mlx_ppo.models.adapters import HEAD, Weights, new_adapters
from mlx_ppo.models.heads import RewardModel, apply_head, load_reward_model, new_head, read_reward_facts
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.peft import given_adapters
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.rewards.functions import RewardFunction, parse_reference
from mlx_ppo.rewards.judge import Surroundings
from mlx_ppo.rewards.judge_scorer import JudgeScorer
from mlx_ppo.rewards.rules import RewardRule
from mlx_ppo.rewards.scorer import TextScorer
from mlx_ppo.runtime.group import ALONE, Group


@dataclass(frozen=True)
class Critic:
    """Where the values come from; its weights are in the training state."""

    kind: str  # "adapters", "head" or "model"
    trunk: Trunk

    def values(self, weights: Weights, states: mx.array) -> mx.array:
        """Values [N] of the states [N, D] that precede the counted tokens."""
        return apply_head(weights.arrays, states)

    def states(self, weights: Weights, sequences: Sequences, *, learning: bool = False) -> mx.array:
        """The critic's own states [N, D]; with kind "head" they are the policy's, taken with the policy's weights.

        `learning`: a gradient will be taken.
        """
        with self.trunk.using(weights):
            return self.trunk.response_states(sequences, learning=learning)


@dataclass
class Source:
    """One source of scores and its weight."""

    name: str
    weight: float
    scorer: RewardModel | TextScorer | None  # None: a function that a plan doesn't start
    own_tokens: bool = False  # a model with another tokenizer than the policy's: it reads the text anew
    gate: bool = False  # where it gives 0 the others count nothing

    @property
    def judges(self) -> bool:
        """Whether it is only logged, for the health rules."""
        return not self.weight and not self.gate


@dataclass
class Roles:
    """Everything that is loaded once and never changes: trunks, reward sources, the reference's weights."""

    trunk: Trunk
    reference: Weights
    critic: Critic | None
    sources: list[Source] = field(default_factory=list)
    evictable: list[Trunk] = field(default_factory=list)  # their frozen weights are in memory only while they are read
    group: Group = ALONE  # the processes that share the rows

    def add(self, source: RewardSource, dtype: str, loading: "Loading") -> None:
        """Load one more source of scores; of several with one name the later ones get a number.

        Raises:
            ModelError, ConfigError: whatever is wrong with it.
        """
        loaded = _load_source(source, self.trunk, dtype, loading)
        same = sum(other.name.rpartition("-")[0] == loaded.name or other.name == loaded.name for other in self.sources)
        loaded.name += f"-{same + 1}" if same else ""
        self.sources.append(loaded)

    def bring(self, trunk: Trunk) -> None:
        """Have a trunk's frozen weights in memory; of the evictable ones, only one is there at a time.

        Raises:
            ModelError: it can't be read any more.
        """
        for other in self.evictable:
            if other is not trunk:
                other.evict()
        trunk.restore()

    def evict(self) -> None:
        """Free what is evictable."""
        for trunk in self.evictable:
            trunk.evict()

    def require_fields(self, records: Sequence[dict[str, Any]]) -> None:
        """Refuse prompts without a field that a reward function has a parameter for.

        Raises:
            ConfigError: names it.
        """
        for source in self.sources:
            if isinstance(source.scorer, TextScorer):
                source.scorer.require_fields(records)

    def remarks(self, longest: int) -> list[str]:
        """What a person should know of the models, and of texts of so many tokens in them.

        Raises:
            ModelError: a model has no such positions.
        """
        models = [source.scorer.trunk for source in self.sources if isinstance(source.scorer, RewardModel)]
        others = {id(trunk): trunk for trunk in (*models, *([self.critic.trunk] if self.critic else []))}
        others.pop(id(self.trunk), None)
        found = [*self.trunk.remarks, *self.trunk.within(longest)]
        for source in self.sources:
            found += source.scorer.remarks() if isinstance(source.scorer, TextScorer) else []
        for trunk in others.values():
            found += [line for line in trunk.remarks if line.startswith("warning")] + trunk.within(longest)
        return list(dict.fromkeys(found))

    def reward_files(self) -> dict[str, str]:
        """SHA-256 of the files that reward functions have read so far, beside their own."""
        functions = [source.scorer for source in self.sources if isinstance(source.scorer, RewardFunction)]
        return {name: digest for function in functions for name, digest in function.files.items()}

    def news(self) -> list[str]:
        """What functions, rules and judges have to say of the completions since they were asked last."""
        scorers = [source.scorer for source in self.sources if isinstance(source.scorer, TextScorer)]
        return [line for scorer in scorers for line in scorer.news()]

    def close(self) -> None:
        """End the processes of reward functions and rules."""
        for source in self.sources:
            if isinstance(source.scorer, TextScorer):
                source.scorer.close()


def token_statistics(
    trunk: Trunk, states: mx.array, sequences: Sequences, *, temperature: float, learning: bool = False
) -> tuple[mx.array, mx.array]:
    """Log-probabilities and entropies [B, T] of the counted tokens, from the states [N, D] that predict them.

    Where the sequences have sets of tokens that could be drawn, they are those of the distribution on these sets.
    `learning`: a gradient by the log-probabilities will be taken, and no entropy read, see `OutputHead.statistics`.
    """
    logprobs, entropies = trunk.engine.statistics(
        trunk,
        states,
        sequences.targets,
        temperature=temperature,
        support=sequences.support,
        learning=learning,
    )
    return sequences.spread(logprobs), sequences.spread(entropies)


def started(source: RewardSource, surroundings: Surroundings) -> TextScorer:
    """A reward function or a rule in its process, or a judge that answers."""
    if source.kind == "rule":
        return RewardRule(source).__enter__()
    if source.kind == "judge":
        return JudgeScorer(source, surroundings).__enter__()
    assert source.function is not None
    file, name = parse_reference(source.function)
    return RewardFunction(Path(file), name, timeout=source.timeout).__enter__()


class Loading(NamedTuple):
    """How models come into being: from their folders or, for a plan, without their weights."""

    trunk: Callable[..., Trunk] = load_trunk
    reward: Callable[..., RewardModel] = load_reward_model
    function: Callable[[RewardSource, Surroundings], TextScorer | None] = started
    compact: bool = False  # quantised models stay so on a CPU
    evict: bool = False  # weights that only some phases read are in memory only while they are read
    surroundings: Surroundings = Surroundings()  # of judges, by the run
    critic: bool = True  # where the configuration has one


def load_roles(config: TrainConfig, loading: Loading = Loading()) -> tuple[Roles, Weights, Weights | None]:  # noqa: B008
    """Load every model that a run needs.

    Returns:
        The roles, the policy's initial weights, and the critic's (None without a critic).
    Raises:
        ModelError, ConfigError: whatever is wrong, before anything is trained.
    """
    trunk = loading.trunk(config.model.path, dtype=config.model.dtype, compact=loading.compact)
    policy = initial_weights(trunk, config.model, config.lora, key="policy", seed=config.run.seed)
    reference = policy if config.model.adapter is not None else Weights({})
    roles = Roles(trunk, reference, None)
    around = loading.surroundings._replace(samples=config.rollout.samples_per_prompt, seed=config.run.seed)
    loading = loading._replace(surroundings=around)
    try:
        for source in config.reward:
            roles.add(source, config.model.dtype, loading)
            if loading.evict:
                roles.evictable = evictable(roles, config)
                roles.evict()  # before the next one is loaded
        critic_weights = None
        if config.ppo.advantage == "gae" and loading.critic:
            roles.critic, critic_weights = _load_critic(config, roles, loading)
        trunk.share_below(_on_trunk(roles, policy, critic_weights))
        if loading.evict:
            roles.evictable = evictable(roles, config)
            roles.evict()
    except BaseException:
        roles.close()
        raise
    return roles, policy, critic_weights


def evictable(roles: Roles, config: TrainConfig) -> list[Trunk]:
    """Trunks whose frozen weights only some phases of an iteration read.

    Those of reward models in folders of their own; and, under full fine-tuning, the shared one, which then is the
    reference's, unless the critic's adapters lie on it.
    """
    models = [source.scorer for source in roles.sources if isinstance(source.scorer, RewardModel)]
    found = {id(model.trunk): model.trunk for model in models if model.trunk is not roles.trunk}
    if config.model.train == "full" and (config.ppo.advantage != "gae" or config.critic.kind != "adapters"):
        found[id(roles.trunk)] = roles.trunk
    return list(found.values())


def _on_trunk(roles: Roles, policy: Weights, critic: Weights | None) -> list[Weights]:
    """The weights of every role that lies on the shared trunk."""
    rewards = [source.scorer for source in roles.sources if isinstance(source.scorer, RewardModel)]
    found = [policy, roles.reference]
    found += [weights for model in rewards if model.trunk is roles.trunk for weights in model.members]
    if critic is not None and roles.critic is not None and roles.critic.trunk is roles.trunk:
        found.append(critic)
    return found


def initial_weights(trunk: Trunk, model: ModelSection, lora: LoraSection, *, key: str, seed: int) -> Weights:
    """The trained weights at the start: fresh or given adapters, or all of the trunk's own weights in float32.

    Raises:
        ModelError: given adapters that don't fit.
    """
    given = given_adapters(model.adapter, trunk.adapted) if model.adapter is not None else None
    if model.train == "full":
        if given is not None:
            raise ModelError(f"{model.adapter}: model.adapter goes with model.train = 'lora'; fuse the adapters first")
        return Weights(_trainable(trunk))
    if given is not None:
        return given
    return new_adapters(trunk.adapted, lora, key=key, seed=seed)


def _trainable(trunk: Trunk) -> Mapping[str, mx.array]:
    """The trunk's floating-point parameters, in float32 so that small steps aren't lost.

    Raises:
        ModelError: the trunk is quantised.
    """
    if any(array.dtype == mx.uint32 for array in trunk.base.values()):
        raise ModelError(f"{trunk.name}: a quantised model cannot be trained in full; use model.train = 'lora'")
    return {name: mx.array(array).astype(mx.float32) for name, array in trunk.base.items() if _is_trained(array)}


def _is_trained(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def _load_source(source: RewardSource, trunk: Trunk, dtype: str, loading: Loading) -> Source:
    if source.kind == "model":
        assert source.path is not None
        model = loading.reward(source.path, trunk, dtype=dtype)
        return Source(source.path.name, source.weight, model, own_tokens=not same_tokens(model.trunk, trunk))
    name = "judge" if source.kind == "judge" else source.rule or parse_reference(source.function or "")[1]
    return Source(name, source.weight, loading.function(source, loading.surroundings), gate=source.gate)


def same_tokens(other: Trunk, trunk: Trunk) -> bool:
    """Whether a model reads texts as the same tokens as another one."""
    probe = "The film is a moving, 90-minute story — of two friends.\n\tdef f(x): return x**2  # 好的"
    mine, theirs = trunk.tokenizer, other.tokenizer
    return other is trunk or (
        theirs.encode(probe, bos=True) == mine.encode(probe, bos=True) and theirs.eos_id == mine.eos_id
    )


def _load_critic(config: TrainConfig, roles: Roles, loading: Loading) -> tuple[Critic, Weights]:
    critic: CriticSection = config.critic
    trunk = roles.trunk
    if critic.kind == "head":
        return Critic("head", trunk), Weights(new_head(trunk.width))
    if critic.kind == "model":
        return _separate_critic(config, roles, loading)
    body = _adapters_of_reward(roles) if critic.initialise == "reward" else None
    if body is None:
        body = new_adapters(trunk.adapted, config.lora, key="critic", seed=config.run.seed)
    return Critic("adapters", trunk), body.holding({**_body(body), **new_head(trunk.width)})


def _separate_critic(config: TrainConfig, roles: Roles, loading: Loading) -> tuple[Critic, Weights]:
    """A critic with all weights of its own: from a folder, a reward model in its own folder, or the policy's."""
    path = config.critic.path
    if path is None and config.critic.initialise == "reward":
        for source in config.reward:
            if source.path is not None and read_reward_facts(source.path).placement == "folder":
                path = source.path
                break
    trunk = loading.trunk(path or config.model.path, dtype=config.model.dtype)
    if not same_tokens(trunk, roles.trunk):
        raise ModelError(f"{trunk.name}: its tokenizer differs from the policy's; a critic must share it")
    weights = Weights({**_trainable(trunk), **new_head(trunk.width)})
    trunk.evict()  # for good: the critic brings all of them itself
    return Critic("model", trunk), weights


def _adapters_of_reward(roles: Roles) -> Weights | None:
    for source in roles.sources:
        if isinstance(source.scorer, RewardModel) and source.scorer.facts.placement == "adapters":
            return source.scorer.weights
    return None


def _body(weights: Weights) -> dict[str, mx.array]:
    return {name: array for name, array in weights.arrays.items() if not name.startswith(HEAD)}
