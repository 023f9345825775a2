"""Keys of a configuration that are right alone and wrong together."""

import re

from mlx_ppo.config.addresses import parse_address
from mlx_ppo.config.rewards import RewardSource
from mlx_ppo.config.sections import Job, TrainConfig
from mlx_ppo.config.supervised import (
    WRITERS,
    DPOConfig,
    DPOSection,
    RewardConfig,
    RewardTrainingSection,
    TrainableModelSection,
)

# What each rule reads, beside `limit`.
RULE_KEYS: dict[str, tuple[str, ...]] = {
    "exact": ("field", "pattern"),
    "number": ("field", "pattern", "tolerance"),
    "regex": ("pattern",),
    "length": ("unit", "least", "most"),
    "format": ("tags",),
    "json": ("pattern", "json_schema"),
    "math": ("field", "pattern"),
    "code": ("field", "pattern"),
}
JUDGE_KEYS = (
    *("address", "model", "key_env", "mode", "rubric", "scale", "retries", "answer_tokens", "parallel", "unusable"),
)
_TAG = re.compile(r"[A-Za-z0-9_-]{1,100}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
Problem = tuple[str, str]  # `section.key`; what is wrong and the mend


def contradictions(config: Job) -> list[Problem]:
    """Keys that don't go together."""
    if isinstance(config, TrainConfig):
        sources = enumerate(config.reward)
        by_source = [(f"reward.{i}.{key}", text) for i, source in sources for key, text in source_problems(source)]
        return [*_train_problems(config), *_health_problems(config), *_comparing_problems(config), *by_source]
    if isinstance(config, RewardConfig):
        return [*_trainable_problems(config.model), *_feedback_problems(config.reward_training)]
    if isinstance(config, DPOConfig):
        return [*_trainable_problems(config.model), *_preference_problems(config.dpo)]
    return _trainable_problems(config.model) if isinstance(config, WRITERS) else []


def _preference_problems(dpo: DPOSection) -> list[Problem]:
    readers = {"label_smoothing": "sigmoid", "good_above": "kto", "bad_weight": "kto"}
    return [
        (f"dpo.{key}", f"is read only with dpo.loss = {loss!r}")
        for key, loss in readers.items()
        if dpo.loss != loss and getattr(dpo, key) != type(dpo).model_fields[key].default
    ]


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
            rollout.top_k == 1,
            "rollout.top_k",
            "1 leaves one token, whose probability is 1 whatever is learned; set it to 2 or more, or 0 (off)",
        ),
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


def _health_problems(config: TrainConfig) -> list[Problem]:
    back = [key for key, level in config.health if level == "best" and not config.run.evaluate_every]
    return [(f"health.{key}", "'best' goes back to an evaluation; set run.evaluate_every above 0") for key in back]


def source_problems(source: RewardSource) -> list[Problem]:
    """What is wrong with one source of scores; the keys without section."""
    wanted = {"model": "path", "function": "function", "rule": "rule", "judge": "address"}[source.kind]
    problems: list[Problem] = []
    if getattr(source, wanted) is None:
        problems.append((wanted, f"missing: a reward of kind {source.kind!r} needs it"))
    for other in ("path", "function", "rule", *JUDGE_KEYS):
        mine = other == wanted or (source.kind == "judge" and other in JUDGE_KEYS)
        if not mine and getattr(source, other) != _default(other):
            problems.append((other, f"belongs to another kind of reward, not {source.kind!r}"))
    if source.gate and source.kind in ("model", "judge"):
        problems.append(("gate", f"a {source.kind}'s 0 is a score like any other; a rule or a function can be a gate"))
    problems += _rule_problems(source)
    problems += _judge_problems(source) if source.kind == "judge" else []
    if source.function is not None and not all(source.function.rpartition(":")[::2]):
        problems.append(("function", f"must be 'file.py:name', not {source.function!r}"))
    return problems


def _comparing_problems(config: TrainConfig) -> list[Problem]:
    """Judges that compare need something to compare; they say nothing of one completion alone."""
    comparing = [i for i, source in enumerate(config.reward) if source.kind == "judge" and source.mode != "pointwise"]
    found: list[Problem] = []
    if config.rollout.samples_per_prompt < 2:
        mend = "compares a prompt's completions; set rollout.samples_per_prompt to 2 or more"
        found += [(f"reward.{i}.mode", f"{config.reward[i].mode!r} {mend}") for i in comparing]
    alone = comparing and not any(source.weight for i, source in enumerate(config.reward) if i not in comparing)
    back = [key for key, level in config.health if level == "best"]
    return found + [
        (f"health.{key}", "'best' goes back to an evaluation, of which a judge that compares says nothing")
        for key in (back if alone else ())
    ]


def _judge_problems(source: RewardSource) -> list[Problem]:
    problems: list[Problem] = []
    if source.address is not None:
        try:
            parse_address(source.address)
        except ValueError as error:
            problems.append(("address", str(error)))
    problems += [("model", problem) for problem in model_problems(source.model)]
    if source.key_env is not None and not _VARIABLE.fullmatch(source.key_env):  # it isn't shown: it may be the key
        problems.append(("key_env", "must be the name of an environment variable with the key, never the key itself"))
    if not source.rubric.strip():
        problems.append(("rubric", "is empty; say what is good"))
    if source.mode != "pointwise" and source.scale != _default("scale"):
        problems.append(("scale", f"isn't read by a judge of mode {source.mode!r}"))
    if not source.scale[0] < source.scale[1]:
        problems.append(("scale", "must be the worst and the best grade, the first below the second"))
    return problems


def model_problems(model: str | None) -> list[str]:
    """What is wrong with a judge's name, if anything."""
    if model is None or not model.strip():
        return ["missing: name the judge as its server knows it"]
    if re.search(r"[:-]cloud$", model):  # how Ollama names what it sends away
        return [f"{model!r} is a model that Ollama runs elsewhere; take one that runs on this machine"]
    return []


def _rule_problems(source: RewardSource) -> list[Problem]:
    """Keys that the rule doesn't read, or lacks; where there is no rule, keys of any."""
    read = RULE_KEYS.get(source.rule or "", ())
    of = f"rule {source.rule!r}" if source.rule else f"a reward of kind {source.kind!r}"
    others = dict.fromkeys(key for keys in (*RULE_KEYS.values(), ("limit",)) for key in keys)
    if source.rule is not None:
        others.pop("limit")
    unread = [key for key in others if key not in read and getattr(source, key) != _default(key)]
    problems = [(key, f"isn't read by {of}") for key in unread]
    if source.rule is not None and source.timeout != _default("timeout"):
        problems.append(("timeout", "is for functions; a rule has 'limit', for each completion"))
    if source.rule == "regex" and source.pattern is None:
        problems.append(("pattern", "missing: rule 'regex' needs it"))
    if source.pattern is not None:
        try:
            re.compile(source.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(("pattern", f"isn't a regular expression: {error}"))
    if source.rule == "length" and not source.least and not source.most:
        problems.append(("most", "missing: rule 'length' needs 'least', 'most' or both"))
    if source.most and source.least > source.most:
        problems.append(("least", f"more than the {source.most} of 'most'"))
    if not source.tags or len({*source.tags}) < len(source.tags) or not all(map(_TAG.fullmatch, source.tags)):
        problems.append(("tags", "must be different names of letters, digits, '_' or '-'"))
    return problems


def _default(key: str) -> object:
    return RewardSource.model_fields[key].default


def _feedback_problems(section: RewardTrainingSection) -> list[Problem]:
    if section.rankings != "pairs" and section.objective != "pairs":
        why = f"{section.rankings!r} is for ranked answers; {section.objective!r} of the objective is for ratings"
        return [("reward_training.rankings", f"{why}. Set one of the two to 'pairs'")]
    if section.objective != "regression" and section.min_difference == 0:
        return [("reward_training.min_difference", "must be above 0: texts of equal ratings make no pair")]
    return []


def _trainable_problems(model: TrainableModelSection) -> list[Problem]:
    if model.initialise == "random" and model.train != "full":
        return [("model.initialise", "'random' needs model.train = 'full': adapters on random weights learn nothing")]
    if model.embeddings is not None and model.initialise != "random":
        return [("model.embeddings", "is read only with model.initialise = 'random'")]
    return []
