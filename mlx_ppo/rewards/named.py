"""What scores, as a command line names it."""

import os
from pathlib import Path

from mlx_ppo.config.rewards import RewardSource
from mlx_ppo.errors import ConfigError
from mlx_ppo.rewards.functions import parse_reference
from mlx_ppo.rewards.rules import rule_named


def source_named(text: str) -> RewardSource:
    """`FOLDER` of a reward model, `FILE.py:NAME` of a function, or `rule:NAME`.

    Raises:
        ConfigError: it names none of these.
    """
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ConfigError(f"--reward: {text!r} can't be the name of anything") from None
    if not text or "\0" in text:
        raise ConfigError("--reward: names nothing; give a folder, FILE.py:NAME or rule:NAME")
    if text.startswith("rule:"):
        return rule_named(text.removeprefix("rule:"))
    if ".py:" in text:
        try:
            parse_reference(text)
        except ValueError as error:
            raise ConfigError(f"--reward: {error}") from None
        return RewardSource(kind="function", function=text)
    return RewardSource(kind="model", path=Path(os.path.realpath(text)))
