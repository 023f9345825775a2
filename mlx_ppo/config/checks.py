"""Keys of a configuration that are right alone and wrong together."""

from mlx_ppo.config.sections import Job, RewardSource, TrainConfig
from mlx_ppo.config.supervised import RewardConfig, SFTConfig, TrainableModelSection

Problem = tuple[str, str]  # `section.key`; what is wrong and the mend


def contradictions(config: Job) -> list[Problem]:
    """Keys that don't go together."""
    if isinstance(config, TrainConfig):
        sources = enumerate(config.reward)
        by_source = [(f"reward.{i}.{key}", text) for i, source in sources for key, text in _source_problems(source)]
        return [*_train_problems(config), *by_source]
    if isinstance(config, SFTConfig | RewardConfig):
        return _trainable_problems(config.model)
    return []


def _train_problems(config: TrainConfig) -> list[Problem]:
    ppo, critic, kl, rollout = config.ppo, config.critic, config.kl, config.rollout
    responses = rollout.prompts * rollout.samples_per_prompt
    critic_free = ppo.advantage != "gae"
    checks = (
        (
            critic_free and rollout.samples_per_prompt < 2,
            "ppo.advantage",
            f"{ppo.advantage!r} compares a prompt's responses; set rollout.samples_per_prompt to 2 or more",
        ),
        (
            ppo.minibatches > responses,
            "ppo.minibatches",
            f"more than the {responses} responses of an iteration (rollout.prompts * rollout.samples_per_prompt)",
        ),
        (
            kl.controller == "adaptive" and 0 < kl.horizon <= responses / 5,
            "kl.horizon",
            f"must be above a fifth of the {responses} responses of an iteration",
        ),
        (
            kl.controller == "adaptive" and kl.coef == 0,
            "kl.coef",
            "the adaptive controller multiplies it, so 0 stays 0; start above 0",
        ),
        (0 < ppo.dual_clip <= 1, "ppo.dual_clip", "must be 0 (off) or above 1"),
        (
            config.score.overlong_buffer > rollout.max_tokens,
            "score.overlong_buffer",
            f"more than the {rollout.max_tokens} tokens of rollout.max_tokens",
        ),
        (
            critic.path is not None and critic.kind != "model",
            "critic.path",
            f"is read only with critic.kind = 'model', not {critic.kind!r}",
        ),
        (
            config.critic_warmup >= config.run.iterations,
            "critic.warmup_iterations",
            f"leaves none of the {config.run.iterations} iterations of run.iterations for the policy",
        ),
    )
    return [(key, text) for wrong, key, text in checks if wrong]


def _source_problems(source: RewardSource) -> list[Problem]:
    wanted, other = ("path", "function") if source.kind == "model" else ("function", "path")
    problems: list[Problem] = []
    if getattr(source, wanted) is None:
        problems.append((wanted, f"missing: a reward of kind {source.kind!r} needs it"))
    if getattr(source, other) is not None:
        problems.append((other, f"belongs to another kind of reward, not {source.kind!r}"))
    if source.function is not None and not all(source.function.rpartition(":")[::2]):
        problems.append(("function", f"must be 'file.py:name', not {source.function!r}"))
    return problems


def _trainable_problems(model: TrainableModelSection) -> list[Problem]:
    if model.initialise == "random" and model.train != "full":
        return [("model.initialise", "'random' needs model.train = 'full': adapters on random weights learn nothing")]
    if model.embeddings is not None and model.initialise != "random":
        return [("model.embeddings", "is read only with model.initialise = 'random'")]
    return []
