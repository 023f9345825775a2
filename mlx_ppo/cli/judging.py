"""Judges that a command line names."""

from mlx_ppo.config.checks import source_problems
from mlx_ppo.config.rewards import RewardSource
from mlx_ppo.errors import ConfigError


def is_address(text: str) -> bool:
    """Whether what was named as a judge is a server, not a folder."""
    return text.startswith(("http://", "https://"))


def judge_at(text: str, model: str | None = None, **settings: object) -> RewardSource:
    """A judge by `ADDRESS#MODEL`, or by its address where the model is named beside it.

    Args:
        text: what was given by --judge.
        model: what was given by --model, if anything.
        settings: other keys of a reward of kind "judge"; None leaves the default.
    Raises:
        ConfigError: what is wrong with any of it.
    """
    address, _, named = text.partition("#")
    if model is not None and named and model != named:
        raise ConfigError(f"--judge: names the model {named!r}, and --model {model!r}; name one")
    if model is None and not named:
        raise ConfigError("--judge: which model? Write ADDRESS#MODEL, such as http://127.0.0.1:11434/v1#qwen3:8b")
    given = {key: value for key, value in settings.items() if value is not None}
    try:
        document = {"kind": "judge", "address": address, "model": model or named, **given}
        source = RewardSource.model_validate(document)
    except ValueError as error:
        raise ConfigError(f"--judge: {error}") from None
    problems = source_problems(source)
    if problems:
        raise ConfigError([f"--judge: {key}: {problem}" for key, problem in problems])
    return source
