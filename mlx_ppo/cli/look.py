"""`sample` and `compare`: what models write, and which of two writes better."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from mlx_ppo.cli.display import harmless
from mlx_ppo.config.sections import RolloutSection, TrainConfig
from mlx_ppo.data.prompts import Prompt, load_prompts
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ConfigError, printable
from mlx_ppo.models.heads import REWARD_FILE, RewardModel, lies_on, load_reward_model, read_reward_facts
from mlx_ppo.rewards.figures import Floats
from mlx_ppo.runs.targets import Target, load_target
from mlx_ppo.stages.records import Rollout
from mlx_ppo.stages.rollout import Asked, Sampling, generate
from mlx_ppo.tokenizers.load import completion_text

_Z95 = 1.96
_LONGEST = 4096  # tokens of a prompt, where no run says it


def sample(
    model: Path,
    texts: Sequence[str],
    file: Path | None,
    count: int,
    *,
    samples: int,
    max_tokens: int | None,
    temperature: float | None,
    seed: int,
) -> None:
    """Print completions of given prompts, of a file's, or of those of the run; without numbers, by the run's own."""
    target = load_target(model)
    prompts = _prompts(target, texts, file, count)
    how = _sampling(target, target, max_tokens, temperature, seed)._replace(samples_per_prompt=samples)
    click.echo(_said(how, model), err=True)
    rollout = _write(target, prompts, how)
    for row, text in enumerate(_texts(target.trunk.tokenizer, rollout)):
        if row % samples == 0 and row:
            click.echo()
        click.echo(click.style(harmless(prompts[row // samples].text), bold=True) + harmless(text.rstrip()))


def compare(
    first: Path,
    second: Path,
    *,
    file: Path | None,
    reward: Path | None,
    count: int,
    max_tokens: int | None,
    temperature: float | None,
    seed: int,
) -> None:
    """Print the second model's win rate over the first on the same prompts, judged by a reward model.

    Without numbers, each writes by its run's own temperature, both by the length of the run that gives the prompts.
    """
    targets = [load_target(first), load_target(second)]
    configured = next((t.config for t in reversed(targets) if isinstance(t.config, TrainConfig)), None)
    judge = _judge(targets, reward, configured)
    source = next((t for t in reversed(targets) if isinstance(t.config, TrainConfig)), targets[1])
    prompts = _prompts(source, (), file, count)
    scores = []
    for path, target in zip((first, second), targets, strict=True):
        how = _sampling(target, source, max_tokens, temperature, seed)
        click.echo(_said(how, path), err=True)
        scores.append(_scores(judge, target, _write(target, prompts, how)))
    wins, low, high = win_rate(scores[0], scores[1])
    shown = "rating points" if judge.facts.slope is not None else "normalised score"
    click.echo(f"{len(prompts)} prompts, judged by {judge.facts.placement} reward model ({shown})")
    for path, values in zip((first, second), scores, strict=True):
        click.echo(f"  {printable(str(path))}: mean {values.mean():+.3f}, deviation {values.std():.3f}")
    click.echo(f"{printable(str(second))} wins {wins:.1%} (95 % interval {low:.1%} to {high:.1%}; ties count half)")


def win_rate(first: Floats, second: Floats) -> tuple[float, float, float]:
    """Share of wins of `second`, ties counting half, with Wilson's 95 % interval.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22(158), 209-212.
    """
    share = float(((second > first) + 0.5 * (second == first)).mean())
    n, square = len(first), _Z95**2
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return share, centre - half, centre + half


def _judge(targets: Sequence[Target], reward: Path | None, config: TrainConfig | None) -> RewardModel:
    if reward is None and config is not None:
        reward = next((source.path for source in config.reward if source.path is not None), None)
    if reward is None:
        raise ConfigError("--reward: name a reward model's folder; neither model is a run that used one")
    folder = Path(os.path.realpath(reward))
    trunk = targets[1].trunk
    if (folder / REWARD_FILE).is_file() and read_reward_facts(folder).placement == "adapters":
        trunk = next((target.trunk for target in reversed(targets) if lies_on(folder, target.trunk)), trunk)
    return load_reward_model(folder, trunk)


def _prompts(target: Target, texts: Sequence[str], file: Path | None, count: int) -> list[Prompt]:
    tokenizer = target.trunk.tokenizer
    if texts:
        empty = [text for text in texts if not text.strip()]
        if empty:
            raise ConfigError("--prompt: is empty; write some text")
        broken = next((text for text in texts if any("\ud800" <= c <= "\udfff" for c in text)), None)
        if broken is not None:
            raise ConfigError(f"--prompt: {broken!r} isn't UTF-8; write it in UTF-8, or give a file with --prompts")
        return [Prompt(tuple(tokenizer.encode(text, bos=True)), text, {"prompt": text}, "--prompt") for text in texts]
    run = target.config.data if isinstance(target.config, TrainConfig) else None
    if file is None and run is not None:
        file = run.eval_prompts or run.prompts
    if file is None:
        raise ConfigError("give --prompt or --prompts; only a run of `train` has prompts of its own")
    longest, overlong = (run.max_prompt_tokens, run.overlong) if run is not None else (_LONGEST, "drop")
    return list(load_prompts(file, tokenizer, max_tokens=longest, overlong=overlong).prompts[:count])


def _sampling(target: Target, source: Target, max_tokens: int | None, temperature: float | None, seed: int) -> Sampling:
    """What is given, else the target's own settings, else those of the run that gives the prompts."""
    runs = [one.config.rollout for one in (target, source) if isinstance(one.config, TrainConfig)]
    if temperature is None:
        temperature = runs[0].temperature if runs else RolloutSection().temperature
    if max_tokens is None:
        max_tokens = runs[-1].max_tokens if runs else RolloutSection().max_tokens
    return Sampling((seed, "sample"), max_tokens, temperature, 1, batch_size=64)


def _said(how: Sampling, path: Path) -> str:
    return printable(f"{path}: temperature {how.temperature:g}, up to {how.max_tokens} tokens")


def _write(target: Target, prompts: Sequence[Prompt], how: Sampling) -> Rollout:
    asked = Asked([prompt.tokens for prompt in prompts], range(len(prompts)), [prompt.record for prompt in prompts])
    for line in target.trunk.within(max((len(prompt.tokens) for prompt in prompts), default=0) + how.max_tokens):
        click.echo(printable(line), err=True)
    return generate(target.trunk, target.weights, asked, how)


def _texts(tokenizer: Tokenizer, rollout: Rollout) -> list[str]:
    pairs = zip(rollout.prompts, rollout.responses, strict=True)
    return [completion_text(tokenizer, prompt, response) for prompt, response in pairs]


def _scores(judge: RewardModel, target: Target, rollout: Rollout) -> Floats:
    if target.trunk.tokenizer.vocab_size != judge.trunk.tokenizer.vocab_size:
        raise ConfigError("both models and the reward model must share a tokenizer")
    raw = judge.raw(rollout.sequences())
    points = judge.points(raw)
    return np.array(points if points is not None else judge.normalised(raw))
