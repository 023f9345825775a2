"""`best-of`: the best of several completions, as examples to learn from and as what training has to beat."""

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import click

from mlx_ppo.algo.truncation import Distribution
from mlx_ppo.best_of import Drawing, Drawn, Interval, best_of_each, choose, choose_pairs, draw
from mlx_ppo.cli.look import prompts_for, said_of, sampling_for
from mlx_ppo.config.rewards import ScoreSection
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.data.prompts import Prompt
from mlx_ppo.errors import ConfigError, printable
from mlx_ppo.rewards.named import source_named
from mlx_ppo.runs.targets import Scorable, load_scorable

_OWN = 4  # completions a prompt by which a run's own score is taken


def best_of(model: Path, given: Mapping[str, Any]) -> None:
    """Print the table; the options are those of the command."""
    for name in ("only_finished", "pairs"):
        if given[name] and given["output"] is None:
            raise ConfigError(f"--{name.replace('_', '-')}: goes with --output")
    if given["temperature"] == 0:
        raise ConfigError("--temperature: at 0 every sample is the same; give one above 0")
    sources = [source_named(given["reward"])] if given["reward"] is not None else []
    with new_file(given["output"]) as output, closing(load_scorable(model, sources)) as subject:
        document = _measured(subject, model, given, output)
    if given["as_json"]:
        click.echo(json.dumps(document, indent=2))
    else:
        _print(document)


def _measured(subject: Scorable, model: Path, given: Mapping[str, Any], output: IO[str]) -> dict[str, Any]:
    """Sample, score, write the file; what is printed.

    Args:
        subject: who writes, and what scores.
        model: its name.
        given: the options.
        output: takes the best of each, where a file was asked for.
    """
    roles, target = subject.roles, subject.target
    roles.trunk.share_below([])  # no states are kept between passes: there may be many completions
    prompts = prompts_for(target, given["texts"], given["file"], given["count"])
    roles.require_fields([prompt.record for prompt in prompts])
    drawing = {name: given[name] for name in Distribution._fields}
    how = sampling_for(target, target, given["max_tokens"], given["seed"], drawing)
    how = how._replace(samples_per_prompt=given["samples"])
    click.echo(said_of(how, model), err=True)
    for line in roles.remarks(max(len(prompt.tokens) for prompt in prompts) + how.max_tokens):
        click.echo(printable(line), err=True)
    section = subject.config.score if isinstance(subject.config, TrainConfig) else ScoreSection()
    whole = len(prompts) * how.samples_per_prompt

    def part(done: int) -> None:
        if done < whole:
            click.echo(f"{done} of {whole} samples scored", err=True)

    from_reference = subject.trained and not given["of_policy"]
    drawn = draw(
        roles, roles.reference if from_reference else subject.policy, prompts, Drawing(how, section), on_part=part
    )
    document: dict[str, Any] = {
        "model": str(model),
        "samples_of": "reference" if from_reference else "policy",
        "prompts": len(prompts),
        "samples": how.samples_per_prompt,
        "temperature": how.temperature,
        **how.distribution.bounds,
        "max_tokens": how.max_tokens,
        "rewards": [source.name for source in roles.sources if not source.judges],
        "best_of": [
            {"k": best.k, "score": best.score.mean, **_bounds("score", best.score), "kl_bound": best.kl_bound}
            for best in best_of_each(drawn)
        ],
    }
    if from_reference:
        few = how._replace(samples_per_prompt=min(_OWN, how.samples_per_prompt), supports=True)
        own = draw(roles, subject.policy, prompts, Drawing(few, section, with_kl=True))
        score, kl = Interval.of(own.scores.mean(axis=1)), Interval.of(own.kl.mean(axis=1))
        document["policy"] = {"samples": few.samples_per_prompt, "score": score.mean, **_bounds("score", score)}
        document["policy"] |= {"kl": kl.mean, **_bounds("kl", kl)}
    for line in roles.news():
        click.echo(line, err=True)
    if given["output"] is not None:
        document["written"] = _write(output, prompts, drawn, given)
    return document


def _write(output: IO[str], prompts: Sequence[Prompt], drawn: Drawn, given: Mapping[str, Any]) -> dict[str, Any]:
    """The best of each prompt, or pairs; how many rows there are, and in how many the bound on tokens cut one."""
    rows, cut = list[dict[str, Any]](), 0
    if given["pairs"]:
        for best, worst in choose_pairs(drawn, only_finished=given["only_finished"]):
            row: dict[str, Any] = {"prompt": _asked(prompts[best.prompt].record)}
            for name, one in (("chosen", best), ("rejected", worst)):
                row |= {name: drawn.texts[one.prompt][one.sample], f"{name}_score": float(drawn.scores[one])}
            rows.append(row)
            cut += not all(drawn.finished[one.prompt][one.sample] for one in (best, worst))
    else:
        for number, sample in choose(drawn, only_finished=given["only_finished"]):
            rows.append(
                {
                    "prompt": _asked(prompts[number].record),
                    "completion": drawn.texts[number][sample],
                    "score": float(drawn.scores[number, sample]),
                    "finished": drawn.finished[number][sample],
                }
            )
            cut += not drawn.finished[number][sample]
    output.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    what = "the best and the worst" if given["pairs"] else "the best"
    return {"file": str(given["output"]), "what": what, "rows": len(rows), "cut": cut}


def _asked(record: Mapping[str, Any]) -> object:
    return record["prompt"] if "prompt" in record else record["messages"]


def _bounds(name: str, interval: Interval) -> dict[str, float | None]:
    known = interval.low == interval.low
    return {f"{name}_low": interval.low if known else None, f"{name}_high": interval.high if known else None}


@contextmanager
def new_file(path: Path | None) -> Iterator[IO[str]]:
    """A file that appears complete or not at all; that it can't be written comes up before anything is computed."""
    if path is None:
        yield io.StringIO()
        return
    if os.path.lexists(path):
        raise ConfigError(f"--output: {path} exists; name a new file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        file = temporary.open("x", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: {path} can't be written ({error.strerror}); name another file") from None
    try:
        with file:
            yield file
        if os.path.lexists(path):
            raise ConfigError(f"--output: {path} was made by somebody else meanwhile; name a new file")
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _print(document: Mapping[str, Any]) -> None:
    writer = {"reference": "its reference", "policy": "itself"}[document["samples_of"]]
    prompts = "1 prompt" if document["prompts"] == 1 else f"{document['prompts']} prompts"
    shown = f"{prompts}, {document['samples']} samples each of {writer}"
    click.echo(printable(f"{document['model']}: {shown}, scored by {', '.join(document['rewards'])}"))
    click.echo(f"{'best of':>9}  {'score':>8}  {'95 % interval':>20}  {'KL at most':>10}")
    for row in document["best_of"]:
        click.echo(f"{row['k']:9}  {row['score']:+8.3f}  {_interval(row, 'score'):>20}  {row['kl_bound']:10.3f}")
    if own := document.get("policy"):
        click.echo(f"{'the run':>9}  {own['score']:+8.3f}  {_interval(own, 'score'):>20}  {own['kl']:10.3f}")
        click.echo(f"the run's own KL is an estimate from {own['samples']} samples a prompt, {_interval(own, 'kl')}")
    click.echo("KL in nats a response from who wrote the samples; log k - (k - 1) / k is a bound on best-of-k's")
    if written := document.get("written"):
        left = document["prompts"] - written["rows"]
        said = f"{written['file']}: {written['what']} of {written['rows']} of {document['prompts']} prompts"
        said += f"; {left} had none that can be used" if left else ""
        said += f"; {written['cut']} were cut at {document['max_tokens']} tokens" if written["cut"] else ""
        click.echo(printable(said + (" (--only-finished leaves such out)" if written["cut"] else "")))


def _interval(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "from one prompt" if low is None else f"{low:+.3f} to {high:+.3f}"
