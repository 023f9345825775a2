"""`agreement`: how far a judge, or what else rewards, may be trusted, by people's own labels."""

import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from mlx_ppo.cli.options import KEY_ENV, Number, Place
from mlx_ppo.errors import ConfigError, DataError, printable

if TYPE_CHECKING:
    from mlx_ppo.config.rewards import RewardSource
    from mlx_ppo.data.jsonl import Record
    from mlx_ppo.rewards.judge_questions import Question, Value

    Ask = Callable[[Sequence[Question]], list[Value | None]]

_OF_ROWS = ("kind", "columns", "count", "seed")
_COLUMN = re.compile(r"[A-Za-z_]+=.+", re.DOTALL)


class _Text(NamedTuple):
    """A text of a row, and what a person thinks of it."""

    record: "Record"
    prompt: str  # nothing for a text alone
    text: str
    label: float


@click.command()
@click.argument("data", type=Place())
@click.option("--judge", "address", metavar="ADDRESS[#MODEL]", help="Server on this machine to ask.")
@click.option("--reward", metavar="FOLDER|FILE.py:NAME|rule:NAME", help="What scores instead of a judge.")
@click.option(
    "--model", metavar="NAME", help="The judge's name, as its server knows it; or the folder that adapters lie on."
)
@KEY_ENV
@click.option(
    "--mode", type=click.Choice(["pointwise", "pairwise"]), help="Default: pairs pairwise, ratings pointwise."
)
@click.option("--rubric", help="What is good, in words to the judge; default: as reward.rubric.")
@click.option("--scale", nargs=2, type=float, help="The worst and the best grade; default: as reward.scale.")
@click.option("--as", "kind", type=click.Choice(["pairs", "ratings"]), help="Read the rows as these.")
@click.option("--column", "columns", metavar="NAME=COLUMN", multiple=True, help="Where a name is in the file.")
@click.option("--count", type=click.IntRange(1), default=100, show_default=True, help="Rows taken, by chance.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Which rows, shown in which order.")
@click.option("--timeout", type=Number(0, min_open=True), help="Seconds for a question; default: as reward.timeout.")
@click.option("--parallel", type=click.IntRange(1, 64), help="Questions at the same time; default: as reward.parallel.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def agreement(data: Path, address: str | None, reward: str | None, as_json: bool, **options: Any) -> None:
    """How far a judge agrees with the people who made DATA, preferences or ratings; before it rewards anything.

    Preferences: share of the pairs on which both prefer the same, Cohen's kappa, and how often the judge prefers what
    it was shown first. Ratings: rank correlation. In any case how many answers were of no use, and seconds a question.
    With --reward the same of a reward model, a function or a rule, which scores each text by itself.

    \b
    Examples:
      mlx-ppo agreement pairs.jsonl --judge http://127.0.0.1:11434/v1 --model qwen3:8b
      mlx-ppo agreement ratings.csv --judge http://127.0.0.1:8080/v1#m --rubric "Is it kind?" --scale 1 5 --json
      mlx-ppo agreement pairs.jsonl --reward runs/NAME/reward --model models/reviews
    """
    wrong = next((column for column in options["columns"] if not _COLUMN.fullmatch(column)), None)
    if wrong is not None:
        raise ConfigError(f"--column: {wrong[:60]!r} must be NAME=COLUMN, such as prompt=question")
    if (address is None) == (reward is None):
        raise ConfigError("--judge: give either a judge's address or, by --reward, what scores")
    found = _by_judge(data, address, options) if address is not None else _by_reward(data, str(reward), options)
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(printable(line) for line in _said(found)))


def _by_judge(data: Path, address: str, options: dict[str, Any]) -> dict[str, Any]:
    from mlx_ppo.cli.judging import judge_at
    from mlx_ppo.rewards.judge import Judge, Surroundings

    if options["scale"] and not all(map(math.isfinite, options["scale"])):
        raise ConfigError("--scale: must be two finite numbers, the worst and the best grade")
    rows = {name: options.pop(name) for name in _OF_ROWS}
    judge_at(address, **options)  # what is wrong with it comes before what is wrong with the data
    records, read, said = _records(data, **rows)
    mode = options.pop("mode") or ("pairwise" if read == "pairs" else "pointwise")
    if read == "rated" and mode == "pairwise":
        raise ConfigError(f"--mode: {data} has ratings, which are compared with grades; take pointwise")
    source = judge_at(address, mode=mode, **options)
    judge = Judge(source, Surroundings(seed=rows["seed"]))

    def ask(questions: Sequence["Question"]) -> list["Value | None"]:
        """However many have no value, they are counted."""
        judge.start()
        click.echo(said, err=True)
        return judge.ask(questions, most=1.0)

    try:
        if mode == "pairwise":
            found = _pairs(ask, source, records, rows["seed"])
        else:
            found = _graded(ask, source, records, read)
    finally:
        judge.close()
    found = {"judge": judge.described, "data": str(data), "mode": mode, **found}
    return found | {"requests": judge.requests, "seconds_a_question": judge.spent / max(judge.requests, 1)}


def _by_reward(data: Path, reward: str, options: dict[str, Any]) -> dict[str, Any]:
    """A reward's scores beside the labels; a reward model reads a row's tokens as it does when it is trained."""
    from mlx_ppo.data.preferences import both_sides, rated_tokens
    from mlx_ppo.models.heads import load_reward_model
    from mlx_ppo.models.load import load_trunk
    from mlx_ppo.models.roles import started
    from mlx_ppo.rewards.judge import Surroundings
    from mlx_ppo.rewards.named import source_named

    rows = {name: options.pop(name) for name in _OF_ROWS}
    model = options.pop("model")
    source = source_named(reward)
    asked = [name for name, value in options.items() if value is not None]
    if model is not None and source.kind != "model":
        asked.append("model")
    if asked:
        raise ConfigError(f"--{asked[0].replace('_', '-')}: isn't read with --reward {printable(reward)}")
    records, read, said = _records(data, **rows)
    labelled = _labelled(records, read)
    if source.path is not None:
        scorer = load_reward_model(source.path, load_trunk(Path(model)) if model is not None else None)
        tokenizer = scorer.trunk.tokenizer
        texts: list[list[int]] = []
        for record in records:
            texts += both_sides(record, tokenizer) if read == "pairs" else [rated_tokens(record, tokenizer)[0]]
        for line in [said, *map(printable, scorer.trunk.within(max(map(len, texts))))]:
            click.echo(line, err=True)
        described, scores = f"the reward model {reward}", scorer.of_texts(texts).mean(axis=0).tolist()
    else:
        fields = [dict(text.record.fields) for text in labelled]
        with closing(started(source, Surroundings())) as judge:
            judge.require_fields(fields)
            click.echo(said, err=True)
            described = judge.described
            scores = judge.score([text.prompt for text in labelled], [text.text for text in labelled], fields)
            for line in judge.news():
                click.echo(line, err=True)
    return {"reward": described, "data": str(data), **_figures(labelled, scores, read)}


def _records(
    data: Path, *, kind: str | None, columns: Sequence[str], count: int, seed: int
) -> tuple[list["Record"], str, str]:
    """Rows by chance, whether they are "pairs" or "rated", and a line about them."""
    from mlx_ppo.data.layouts import find
    from mlx_ppo.data.random import philox

    wanted = {"pairs": ("pairs",), "ratings": ("rated",), None: ("pairs", "rated")}[kind]
    found = find(data, *wanted, columns=columns)  # type: ignore[arg-type]
    if found.bad:
        more = f" (one of {len(found.bad)} unusable rows of {found.rows})" if len(found.bad) > 1 else ""
        raise DataError(f"{found.bad[0]}{more}")
    if not found.records:
        raise DataError(f"{data}: none of the {found.rows} rows has a preference or a rating")
    order = philox("agreement rows", seed).permutation(len(found.records))[:count].tolist()
    taken = f"{len(order)} of them, by chance" if len(order) < len(found.records) else "all of them"
    return [found.records[row] for row in sorted(order)], found.kind, printable(f"{found.said(data)}; {taken}")


def _prompt(record: "Record") -> str:
    """What a row asks, as a person reads it; nothing for a text alone."""
    from mlx_ppo.data.sequences import prompt_field

    said = prompt_field(record, "prompt") if "prompt" in record.fields else ""
    return said if isinstance(said, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in said)


def _sides(record: "Record") -> tuple[str, str, str]:
    """Prompt, chosen and rejected answer."""
    from mlx_ppo.data.preferences import margin_of
    from mlx_ppo.data.sequences import answer_field, prompt_field

    prompt = prompt_field(record, "prompt")
    margin_of(record)
    chosen, rejected = (answer_field(record, name, prompt, allow_empty=True) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError(f"{record.where}: 'chosen' and 'rejected' are the same; remove the line")
    return _prompt(record), chosen, rejected


def _pairs(ask: "Ask", source: "RewardSource", records: Sequence["Record"], seed: int) -> dict[str, Any]:
    """The judge is shown each pair in both orders; which one comes first is drawn."""
    from mlx_ppo.data.random import philox
    from mlx_ppo.rewards.agreement import Preferred, of_pairs
    from mlx_ppo.rewards.judge_questions import which

    sides = [_sides(record) for record in records]
    later = philox("agreement order", seed).integers(0, 2, len(sides)).tolist()  # 1: the chosen one comes second
    questions = []
    for (prompt, chosen, rejected), second in zip(sides, later, strict=True):
        one, other = (rejected, chosen) if second else (chosen, rejected)
        questions += [which(prompt, one, other, source.rubric), which(prompt, other, one, source.rubric)]
    values = [value if isinstance(value, float) else None for value in ask(questions)]
    pairs = [Preferred(float(second), *values[2 * at : 2 * at + 2]) for at, second in enumerate(later)]
    found = of_pairs(pairs)
    return {
        "pairs": len(pairs),
        "questions": len(values),
        "unusable": values.count(None),
        "agreement": found.agrees._asdict(),
        "ties": found.ties,
        "kappa": found.kappa,
        "first_shown_wins": found.first_wins._asdict(),
        "order_decides": found.contradicts,
    }


def _graded(ask: "Ask", source: "RewardSource", records: Sequence["Record"], read: str) -> dict[str, Any]:
    """The judge grades each text by itself."""
    from mlx_ppo.rewards.judge_questions import grade

    labelled = _labelled(records, read)
    values = ask([grade(each.prompt, each.text, source.rubric, source.scale) for each in labelled])
    grades = [value if isinstance(value, float) else None for value in values]
    found = _figures(labelled, grades, read)
    return found | {"questions": len(values), "unusable": values.count(None)}


def _labelled(records: Sequence["Record"], read: str) -> list[_Text]:
    """Every text by itself: of pairs the chosen one, then the rejected one, 1 and 0; of ratings their mean."""
    from mlx_ppo.data.jsonl import one_field, text_field
    from mlx_ppo.data.preferences import ratings_of
    from mlx_ppo.data.sequences import answer_field, prompt_field

    found = []
    for record in records:
        if read == "pairs":
            prompt, chosen, rejected = _sides(record)
            found += [_Text(record, prompt, chosen, 1.0), _Text(record, prompt, rejected, 0.0)]
            continue
        ratings = ratings_of(record)
        name = one_field(record, "text", "completion")
        if "prompt" in record.fields and name != "text":
            text = answer_field(record, name, prompt_field(record, "prompt"), allow_empty=True)
        else:
            text = text_field(record, name)
        found.append(_Text(record, _prompt(record), text, sum(ratings) / len(ratings)))
    return found


def _figures(labelled: Sequence[_Text], values: Sequence[float | None], read: str) -> dict[str, Any]:
    """How far the values of texts agree with their labels; None where a text has no value."""
    from mlx_ppo.rewards.agreement import ordered_alike, spearman
    from mlx_ppo.rewards.verdicts import Rate, verdict

    if read == "pairs":
        both = [(a, b) for a, b in zip(values[::2], values[1::2], strict=True) if a is not None and b is not None]
        said = [verdict(chosen - rejected) for chosen, rejected in both]
        ties = said.count(0.5) / max(len(said), 1)
        return {"pairs": len(values) // 2, "agreement": Rate.of(said)._asdict(), "ties": ties}
    known = [(each.label, value) for each, value in zip(labelled, values, strict=True) if value is not None]
    rated, graded = [label for label, _ in known], [value for _, value in known]
    alike = ordered_alike(rated, graded)
    return {
        "texts": len(labelled),
        "rank_correlation": spearman(rated, graded),
        "ordered_alike": alike if alike == alike else None,
    }


def _said(found: dict[str, Any]) -> list[str]:
    """The figures as lines."""
    what = f"{found['pairs']} pairs" if "pairs" in found else f"{found['texts']} rated texts"
    who = f"{found['judge']}, {found['mode']}" if "judge" in found else found["reward"]
    lines = [f"{what}, {who}"]
    if "agreement" in found:
        rate = found["agreement"]
        share = f"{rate['share']:.1%} (95 % interval {rate['low']:.1%} to {rate['high']:.1%})"
        lines.append(f"  agrees with the person on  {share} of {rate['pairs']} pairs; a tie counts half")
        lines.append(f"  prefers neither on         {found['ties']:.1%}")
    if "kappa" in found:
        first = found["first_shown_wins"]
        lines.append(f"  Cohen's kappa              {found['kappa']:+.3f} (0: as by chance, 1: always the same)")
        interval = f"(95 % interval {first['low']:.1%} to {first['high']:.1%}; 50 %: no bias)"
        lines.append(f"  prefers the first shown in {first['share']:.1%} of its answers {interval}")
        lines.append(f"  the order alone decides    {found['order_decides']:.1%} of the pairs")
    if "rank_correlation" in found:
        lines.append(f"  rank correlation           {found['rank_correlation']:+.3f} (Spearman's)")
        alike = "no two ratings differ" if found["ordered_alike"] is None else f"{found['ordered_alike']:.1%}"
        lines.append(f"  orders two texts alike     {alike}; of those of different rating, a tie counts half")
    if "judge" in found:
        lines.append(f"  unusable answers           {found['unusable']} of {found['questions']} questions")
        lines.append(f"  seconds a question         {found['seconds_a_question']:.2f}")
    return lines
