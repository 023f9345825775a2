"""`plan`: what a run would need, before anything is loaded."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from mlx_ppo.bench.dry_run import Measured, dry_run
from mlx_ppo.compute.choose import chosen_engine, engine_for, using
from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.data.model_files import json_object
from mlx_ppo.errors import ConfigError, ModelError, UserError
from mlx_ppo.memory.phases import Accountant, Phase
from mlx_ppo.memory.plan import GIB, RESERVE, Plan, longest_response, make_plan, needed, plan_of, require_fit, smallest
from mlx_ppo.memory.processes import most_processes
from mlx_ppo.memory.starting import accountant_of, budget_of, require_countable
from mlx_ppo.runtime.device_errors import needing_gradients

_BAR = 18
_MB = 1e6
_VARIANTS: tuple[tuple[str, dict[str, dict[str, Any]]], ...] = (
    ("no critic (ppo.advantage = 'rloo')", {"ppo": {"advantage": "rloo"}}),
    ("critic.kind = 'head'", {"critic": {"kind": "head"}}),
    ("critic.kind = 'model'", {"critic": {"kind": "model", "path": None}}),
    ("lora.layers = 8", {"lora": {"layers": 8}}),
)
_CHOICES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ppo.gradient_checkpointing = 'on'", {"checkpointing": True}),
    ("ppo.micro_batch = 1", {"micro_batch": 1}),
)


def show(
    path: Path,
    overrides: tuple[str, ...],
    *,
    memory_gb: float | None,
    model_config: Path | None,
    device: str | None,
    measure: bool,
    as_json: bool,
) -> None:
    """Print a plan.

    Raises:
        ConfigError, ModelError: what is wrong with the files.
    """
    config = read_config(TrainConfig, path, overrides)
    given = json_object(model_config) if model_config is not None else None
    budget = int(memory_gb * GIB) if memory_gb is not None else budget_of(config)
    engine = engine_for(device)
    if measure and (given is not None or engine.name != chosen_engine().name):
        raise ConfigError("--measure runs the model of the configuration on this machine; leave out the other options")
    with using(engine), needing_gradients():
        longest = config.data.max_prompt_tokens if given is not None else longest_prompt(config)
        require_countable(config, longest, budget)
        accountant = _accountant(config, model_config, given, longest)
        plan = make_plan(accountant, config, budget)
        served, saved = accountant.shared()
        processes = config.parallel.processes or most_processes(config, accountant)
        facts = {
            "engine": engine.name,
            "fits": plan.fits,
            "needs_gib": round(plan.process / GIB, 3),
            "budget_gib": round(budget / GIB, 3),
            "processes": processes if given is None and device is None else 1,
            "prompt_tokens": longest,
            "longest_response_that_fits": longest_response(accountant, config, budget),
            "most_responses_in_a_pass": _most(accountant, config, budget),
            "shared": {"by": served, "saved_gib": round(saved / GIB, 3)},
            "made_smaller": [{"what": what, "saved_gib": round(size / GIB, 3)} for what, size in plan.concessions],
            "variants_gib": _variants(config, accountant, given, plan),
        }
    measured = None
    if measure:
        require_fit(plan, accountant, config)
        measured = dry_run(config, plan, accountant.shapes, iterations=2)[-1]
        facts["measured"] = {"peaks_bytes": measured.peaks, "seconds": measured.seconds}
        facts["tokens_per_second"] = _speeds(config, measured)
    if as_json:
        phases = [{**asdict(phase), "peak": phase.peak} for phase in plan.phases]
        click.echo(json.dumps({**facts, "choices": asdict(plan.choices), "phases": phases}, indent=2))
        return
    _print(plan, facts, measured)


def _accountant(config: TrainConfig, file: Path | None, given: dict[str, Any] | None, longest: int) -> Accountant:
    """For the model of the configuration, or of another config.json, whose errors name that file."""
    try:
        return accountant_of(config, given, longest)
    except ModelError as error:
        if file is None:
            raise
        raise ModelError(str(error).replace(f"{config.model.path}: ", f"{file}: ", 1)) from None


def longest_prompt(config: TrainConfig) -> int:
    """Tokens of the longest prompt; the configured bound where the tokenizer or the prompts aren't there."""
    from mlx_ppo.prompting import load_data, tokenizer_of
    from mlx_ppo.reporting import Silent

    try:
        data, held_out = load_data(config, tokenizer_of(config), Silent())
    except UserError:
        return config.data.max_prompt_tokens
    return max(len(prompt.tokens) for prompt in (*data.prompts, *held_out))


def _most(accountant: Accountant, config: TrainConfig, budget: int) -> int:
    """About the most responses in one update pass that would fit; memory is a linear function of their number."""
    choices = smallest(config, accountant.shapes, accountant.possible)
    sizes = []
    for count in (1, 5):
        other = accountant.with_shapes(accountant.shapes._replace(minibatch=count))
        plan = plan_of(other, replace(choices, micro_batch=count), budget)
        sizes.append(plan.overhead + max(needed(phase) for phase in plan.phases if phase.name.startswith("update")))
    room, each = budget * (1 - RESERVE) - sizes[0], (sizes[1] - sizes[0]) / 4
    return int(1 + room / each) if room >= 0 else 0


def _variants(
    config: TrainConfig, accountant: Accountant, given: dict[str, Any] | None, plan: Plan
) -> dict[str, float]:
    """GiB that other configurations would need, by what is changed; those that are the same already are left out.

    The rest is as chosen, and smaller where the variant would not fit.
    """
    found: dict[str, float] = {}
    for name, change in _VARIANTS:
        sections = {key: getattr(config, key).model_copy(update=values) for key, values in change.items()}
        if all(section == getattr(config, key) for key, section in sections.items()):
            continue
        other = config.model_copy(update=sections)
        try:
            variant = make_plan(
                accountant_of(other, given, accountant.shapes.prompt), other, plan.budget, start=plan.choices
            )
        except (ConfigError, ModelError):
            continue
        found[name] = round(variant.process / GIB, 3)
    for name, chosen in _CHOICES:
        choices = replace(plan.choices, **chosen)
        if choices != plan.choices:
            found[name] = round(plan_of(accountant, choices, plan.budget).process / GIB, 3)
    return found


def _speeds(config: TrainConfig, measured: Measured) -> dict[str, float]:
    """Tokens a second: sampled, and trained (response tokens times epochs over the time of the updates)."""
    tokens = config.rollout.prompts * config.rollout.samples_per_prompt * config.rollout.max_tokens
    times = {"rollout": 1, "score": 1, "update": config.ppo.epochs}
    seconds = {name: sum(took for phase, took in measured.seconds.items() if phase.startswith(name)) for name in times}
    speeds = {name: round(tokens * count / seconds[name], 1) for name, count in times.items()}
    return {**speeds, "iteration": round(tokens / sum(seconds.values()), 1)}


def _print(plan: Plan, facts: Mapping[str, Any], measured: Measured | None) -> None:
    console = Console()
    _print_phases(console, plan, facts, measured)
    if plan.concessions:
        told = (f"{what} ({-saved / GIB:+.2f} GiB)" if saved > 0 else what for what, saved in plan.concessions)
        console.print(f"made smaller to fit: {', '.join(told)}")
    served = facts["shared"]["by"]
    if len(served) > 1:
        console.print(f"one trunk serves {', '.join(served)}: {facts['shared']['saved_gib']:.2f} GiB of copies saved")
    if facts["processes"] > 1:
        console.print(f"`train` shares the run between {facts['processes']} processes; this is the plan of one alone")
    choices = plan.choices
    console.print(
        f"decoded together {choices.rollout_batch}, scored {choices.score_batch}, updated {choices.micro_batch}; "
        f"gradient checkpointing {'on' if choices.checkpointing else 'off'}, keys and values {choices.kv_cache}, "
        f"separate models {'evicted between phases' if choices.evict else 'resident'}"
        + (", the model kept quantised" if choices.compact else "")
    )
    console.print(
        f"longest response that would fit: {facts['longest_response_that_fits']} tokens; "
        f"most responses in one update pass: {facts['most_responses_in_a_pass']}"
    )
    for name, size in facts["variants_gib"].items():
        console.print(f"  with {name}: {size:.2f} GiB ({size - plan.process / GIB:+.2f})")
    for name, speed in facts.get("tokens_per_second", {}).items():
        console.print(f"  {name}: {speed:.0f} tokens a second")
    verdict = "fits" if plan.fits else "does NOT fit"
    console.print(f"[bold]{plan.process / GIB:.2f} GiB of {facts['budget_gib']:.2f}: {verdict}[/bold]")


def _print_phases(console: Console, plan: Plan, facts: Mapping[str, Any], measured: Measured | None) -> None:
    """A row and a bar a phase, and under the table what the largest consists of."""
    most = max(needed(phase) for phase in plan.phases) + plan.overhead
    table = Table(title=f"memory by phase, MB, engine {facts['engine']}, computed")
    for column in ("phase", "stays", "comes and goes", "process", *(["measured"] if measured else [])):
        table.add_column(column, justify="left" if column == "phase" else "right")
    table.add_column("")
    for phase in plan.phases:
        total = plan.overhead + needed(phase)
        stays, passing = sum(phase.resident.values()) / _MB, (phase.transient + phase.outside) / _MB
        cells = [phase.name, f"{stays:.0f}", f"{passing:.0f}", f"{total / _MB:.0f}"]
        if measured is not None:
            peak = measured.peaks.get(phase.name)
            cells.append(f"{(plan.overhead + peak + phase.outside) / _MB:.0f}" if peak else "")
        table.add_row(*cells, _bar(phase, plan.overhead, most))
    console.print(table)
    largest = plan.largest
    console.print(f"at its largest ({largest.name}):")
    parts = {"Python and libraries": plan.overhead, **largest.resident, **largest.passing, "numpy": largest.outside}
    for what, size in sorted(parts.items(), key=lambda item: -item[1]):
        if size:
            console.print(f"  {size / _MB:8.1f} MB  {what}")
    console.print(f"  {plan.freed / _MB:8.1f} MB  of freed buffers may be kept besides")


def _bar(phase: Phase, overhead: int, most: int) -> str:
    stays = round(_BAR * (overhead + sum(phase.resident.values())) / most)
    total = max(1, round(_BAR * (overhead + needed(phase)) / most))
    return "█" * min(stays, total) + "▒" * (total - stays)
