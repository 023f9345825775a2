"""`sample` and `compare`: what models write, and which of two writes better."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import click
import numpy as np

from mlx_ppo.cli.judging import judge_at
from mlx_ppo.comparison import CRITERION, ByModel, ByServer, Pair
from mlx_ppo.config.rewards import RewardSource
from mlx_ppo.config.sections import RolloutSection, TrainConfig
from mlx_ppo.data.prompts import Prompt, load_prompts
from mlx_ppo.data.tokenizer import Tokenizer
from mlx_ppo.errors import ConfigError, harmless, printable
from mlx_ppo.models.heads import REWARD_FILE, RewardModel, lies_on, load_reward_model, read_reward_facts
from mlx_ppo.rewards.figures import Floats
from mlx_ppo.rewards.functions import RewardFunction, parse_reference
from mlx_ppo.rewards.rules import RewardRule, rule_named
from mlx_ppo.rewards.scorer import TextScorer
from mlx_ppo.rewards.verdicts import Rate, agreement, verdicts
from mlx_ppo.runs.targets import Target, load_target
from mlx_ppo.stages.records import Rollout
from mlx_ppo.stages.rollout import Asked, Sampling, distribution_of
from mlx_ppo.tokenizers.load import completion_text
from mlx_ppo.writing import Writers

_SECONDS = 60.0  # that a reward function may take
_LONGEST = 4096  # tokens of a prompt, where no run says it


def sample(
    model: Path,
    texts: Sequence[str],
    file: Path | None,
    count: int,
    *,
    samples: int,
    max_tokens: int | None,
    seed: int,
    processes: int,
    **drawing: float | None,
) -> None:
    """Print completions of given prompts, of a file's, or of those of the run; without numbers, by the run's own.

    `drawing`: temperature, top_k, top_p, min_p.
    """
    target = load_target(model)
    prompts = prompts_for(target, texts, file, count)
    how = sampling_for(target, target, max_tokens, seed, drawing)._replace(samples_per_prompt=samples)
    click.echo(said_of(how, model), err=True)
    with Writers(processes) as writers:
        rollout = _write(writers, model, target, prompts, how)
    for row, text in enumerate(_texts(target.trunk.tokenizer, rollout)):
        if row % samples == 0 and row:
            click.echo()
        click.echo(click.style(harmless(prompts[row // samples].text), bold=True) + harmless(text.rstrip()))


def compare(
    first: Path,
    second: Path,
    *,
    file: Path | None,
    reward: str | None,
    judge: Path | str | None,
    key_env: str | None,
    criterion: str | None,
    count: int,
    max_tokens: int | None,
    seed: int,
    processes: int,
    **drawing: float | None,
) -> None:
    """Print the second model's win rate over the first on the same prompts, by a reward or by a model that is asked.

    Without numbers, each samples as its run does, both by the length of the run that gives the prompts.
    """
    question = criterion or CRITERION
    if key_env is not None and not isinstance(judge, str):
        raise ConfigError("--key-env: goes with --judge ADDRESS#MODEL; a run's own judge has its key_env in the run")
    named = judge_at(judge, rubric=question, key_env=key_env) if isinstance(judge, str) else judge
    targets = [load_target(first), load_target(second)]
    configured = next((t.config for t in reversed(targets) if isinstance(t.config, TrainConfig)), None)
    asked = _asked(named, question, configured if reward is None else None)
    scorer = None if asked is not None and reward is None else _scorer(targets, reward, configured)
    source = next((t for t in reversed(targets) if isinstance(t.config, TrainConfig)), targets[1])
    prompts = prompts_for(source, (), file, count)
    with scorer if isinstance(scorer, TextScorer) else nullcontext(), Writers(processes) as writers:
        if isinstance(scorer, TextScorer):
            scorer.require_fields([prompt.record for prompt in prompts])
        rollouts = []
        for path, target in zip((first, second), targets, strict=True):
            how = sampling_for(target, source, max_tokens, seed, drawing)
            click.echo(said_of(how, path), err=True)
            rollouts.append(_write(writers, path, target, prompts, how))
        written = [_texts(target.trunk.tokenizer, rollout) for target, rollout in zip(targets, rollouts, strict=True)]
        found = []
        if scorer is not None:
            each = zip(targets, rollouts, written, strict=True)
            scores = [_scores(scorer, target, rollout, texts) for target, rollout, texts in each]
            click.echo(f"{len(prompts)} prompts, judged by {_name(scorer)}")
            for path, values in zip((first, second), scores, strict=True):
                click.echo(f"  {printable(str(path))}: mean {values.mean():+.3f}, deviation {values.std():.3f}")
            for line in scorer.news() if isinstance(scorer, TextScorer) else ():
                click.echo(line, err=True)
            found.append(_won(second, scores[1] - scores[0]))
    if asked is not None:
        rows = zip(prompts, *written, strict=True)
        margins = asked.margins([Pair(prompt.text, prompt.record, one, other) for prompt, one, other in rows])
        name, question = (asked.described, asked.question) if isinstance(asked, ByServer) else (judge, question)
        click.echo(printable(f"{len(prompts)} prompts, judged by {name}, asked in both orders: {question}"))
        if isinstance(asked, ByServer) and asked.unusable:
            click.echo(f"  {asked.unusable} of its {2 * len(prompts)} answers can't be used; their pairs count as ties")
        click.echo(f"  the order alone decides {asked.by_place:.1%} of its answers; the mean of both is taken")
        found.append(_won(second, margins))
    if len(found) == 2:
        one, other = (dict(enumerate(each)) for each in found)
        click.echo(f"both judges prefer the same one in {agreement(one, other)}")


def _asked(source: Path | RewardSource | None, question: str, config: TrainConfig | None) -> ByModel | ByServer | None:
    """The model that is asked: here, at an address, or where none is named and the run had no other reward its own."""
    if isinstance(source, Path):
        return ByModel(load_target(source), question)
    if source is None and config is not None and all(each.kind in ("judge", "function") for each in config.reward):
        source = next((each for each in config.reward if each.kind == "judge"), None)
    if source is None:
        return None
    found = ByServer(source)
    found.start()
    return found


def _won(second: Path, margins: Floats) -> list[float]:
    """Print how often the second won; the verdicts."""
    found = verdicts(margins)
    rate = Rate.of(found)
    shown = f"{rate.share:.1%} (95 % interval {rate.low:.1%} to {rate.high:.1%}; ties count half)"
    click.echo(f"{printable(str(second))} wins {shown}")
    return found


def _scorer(targets: Sequence[Target], reward: str | None, config: TrainConfig | None) -> RewardModel | TextScorer:
    """What was named: a folder, a function or a rule; else the first reward model of a run, or its first rule."""
    if reward is not None and ".py:" in reward:
        try:
            file, name = parse_reference(reward)
        except ValueError as error:
            raise ConfigError(f"--reward: {error}") from None
        return RewardFunction(Path(file), name, timeout=_SECONDS)
    if reward is not None and reward.startswith("rule:"):
        return RewardRule(rule_named(reward.removeprefix("rule:")))
    if reward is None and config is not None:
        reward = next((str(source.path) for source in config.reward if source.path is not None), None)
        rule = next((source for source in config.reward if source.kind == "rule"), None)
        if reward is None and rule is not None:
            return RewardRule(rule)
    if reward is None:
        raise ConfigError("--reward: name a reward model's folder; neither model is a run that used one, or a rule")
    folder = Path(os.path.realpath(reward))
    trunk = targets[1].trunk
    if (folder / REWARD_FILE).is_file() and read_reward_facts(folder).placement == "adapters":
        trunk = next((target.trunk for target in reversed(targets) if lies_on(folder, target.trunk)), trunk)
    return load_reward_model(folder, trunk)


def prompts_for(target: Target, texts: Sequence[str], file: Path | None, count: int) -> list[Prompt]:
    """The prompts that are written out, else the first ones of a file, else of the run's evaluations.

    Raises:
        ConfigError: there are none.
        DataError: the file is wrong.
    """
    tokenizer = target.trunk.tokenizer
    if texts:
        if file is not None:
            raise ConfigError("--prompt and --prompts exclude each other; put the texts into the file")
        empty = [text for text in texts if not text.strip()]
        if empty:
            raise ConfigError("--prompt: is empty; write some text")
        broken = next((text for text in texts if any("\ud800" <= c <= "\udfff" for c in text)), None)
        if broken is not None:
            raise ConfigError(f"--prompt: {broken!r} isn't UTF-8; write it in UTF-8, or give a file with --prompts")
        found = [Prompt(tuple(tokenizer.encode(text, bos=True)), text, {"prompt": text}, "--prompt") for text in texts]
        longest = max(len(prompt.tokens) for prompt in found)
        if longest > _LONGEST:
            raise ConfigError(f"--prompt: {longest} tokens, more than {_LONGEST}, which are read at once; shorten it")
        return found
    run = target.config.data if isinstance(target.config, TrainConfig) else None
    own = file is None
    if file is None and run is not None:
        file = run.eval_prompts or run.prompts
    if file is None:
        raise ConfigError("give --prompt or --prompts; only a run of `train` has prompts of its own")
    longest, overlong = (run.max_prompt_tokens, run.overlong) if run is not None else (_LONGEST, "drop")
    columns = run.columns if run is not None and own else ()
    read = load_prompts(file, tokenizer, max_tokens=longest, overlong=overlong, columns=columns)
    if read.said:
        click.echo(printable(read.said), err=True)
    return list(read.prompts[:count])


def sampling_for(
    target: Target, source: Target, max_tokens: int | None, seed: int, drawing: Mapping[str, float | None]
) -> Sampling:
    """What is given, else the target's own settings, else those of the run that gives the prompts."""
    runs = [one.config.rollout for one in (target, source) if isinstance(one.config, TrainConfig)]
    given = {name: value for name, value in drawing.items() if value is not None}
    drawn = distribution_of(runs[0] if runs else RolloutSection()).changed(given)
    if max_tokens is None:
        max_tokens = runs[-1].max_tokens if runs else RolloutSection().max_tokens
    how = Sampling((seed, "sample"), max_tokens, batch_size=64, supports=False)
    return how._replace(**drawn._asdict())


def said_of(how: Sampling, path: Path) -> str:
    """How a model writes, in a line."""
    return printable(f"{path}: {how.distribution.said}, up to {how.max_tokens} tokens")


def _write(writers: Writers, path: Path, target: Target, prompts: Sequence[Prompt], how: Sampling) -> Rollout:
    asked = Asked([prompt.tokens for prompt in prompts], range(len(prompts)), [prompt.record for prompt in prompts])
    for line in target.trunk.within(max((len(prompt.tokens) for prompt in prompts), default=0) + how.max_tokens):
        click.echo(printable(line), err=True)
    return writers.write(path, target, asked, how)


def _texts(tokenizer: Tokenizer, rollout: Rollout) -> list[str]:
    pairs = zip(rollout.prompts, rollout.responses, strict=True)
    return [completion_text(tokenizer, prompt, response) for prompt, response in pairs]


def _name(scorer: RewardModel | TextScorer) -> str:
    if isinstance(scorer, TextScorer):
        return scorer.described
    shown = "rating points" if scorer.facts.slope is not None else "normalised score"
    return f"{scorer.facts.placement} reward model ({shown})"


def _scores(judge: RewardModel | TextScorer, target: Target, rollout: Rollout, texts: Sequence[str]) -> Floats:
    if isinstance(judge, TextScorer):
        prompts, records = [target.trunk.tokenizer.decode(prompt) for prompt in rollout.prompts], list(rollout.records)
        return np.array(judge.score(prompts, list(texts), records), np.float32)
    if target.trunk.tokenizer.vocab_size != judge.trunk.tokenizer.vocab_size:
        raise ConfigError("both models and the reward model must share a tokenizer")
    raw = judge.raw(rollout.sequences())
    points = judge.points(raw)
    return np.array(points if points is not None else judge.normalised(raw))
