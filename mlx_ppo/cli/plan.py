"""`plan`: what a run would need, before anything is loaded."""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_ppo.config import TrainConfig
from mlx_ppo.config_file import read_config
from mlx_ppo.errors import ConfigError, ModelError, UserError, printable
from mlx_ppo.memory.model import weightless_roles
from mlx_ppo.memory.phases import Accountant, Choices
from mlx_ppo.memory.plan import GIB, RESERVE, RUNTIME, Plan, longest_response, make_plan, needed
from mlx_ppo.memory.stand_ins import as_on_metal
from mlx_ppo.memory.starting import budget_of, shapes_of
from mlx_ppo.networks.device import on_cpu
from mlx_ppo.networks.folder import check_place
from mlx_ppo.networks.model_files import json_object

_BAR = 18
_VARIANTS: tuple[tuple[str, dict[str, dict[str, Any]]], ...] = (
    ("no critic (ppo.advantage = 'rloo')", {"ppo": {"advantage": "rloo"}}),
    ("critic.kind = 'head'", {"critic": {"kind": "head"}}),
    ("critic.kind = 'model'", {"critic": {"kind": "model", "path": None}}),
    ("lora.layers = 8", {"lora": {"layers": 8}}),
)


def show(
    path: Path,
    overrides: tuple[str, ...],
    *,
    memory_gb: float | None,
    model_config: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Print a plan.

    Raises:
        ConfigError, ModelError: what is wrong with the files.
    """
    config = read_config(TrainConfig, path, overrides)
    given = json_object(model_config) if model_config is not None else None
    if given is None:
        check_place(config.model.path)
    budget = int(memory_gb * GIB) if memory_gb is not None else budget_of(config)
    metal = device == "gpu" if device is not None else not on_cpu()
    with as_on_metal() if metal and on_cpu() else nullcontext():
        accountant = _accountant(config, given)
        plan = make_plan(accountant, config, budget)
        facts = {
            "fits": plan.fits,
            "needs_gib": round(plan.process / GIB, 3),
            "budget_gib": round(budget / GIB, 3),
            "prompt_tokens": accountant.shapes.prompt,
            "longest_response_that_fits": longest_response(accountant, config, budget),
            "most_responses_in_a_pass": _most(accountant, config, budget),
            "variants_gib": _variants(config, given, budget),
        }
    if as_json:
        phases = [{**asdict(phase), "resident": dict(phase.resident), "peak": phase.peak} for phase in plan.phases]
        click.echo(json.dumps({**facts, "choices": asdict(plan.choices), "phases": phases}, indent=2))
        return
    _print(plan, facts, metal)


def _accountant(config: TrainConfig, given: dict[str, Any] | None) -> Accountant:
    roles, policy, critic = weightless_roles(config, given)
    longest = config.data.max_prompt_tokens
    if given is None:
        longest = _longest_prompt(config)
    return Accountant(config, roles, policy, critic, shapes_of(config, longest))


def _longest_prompt(config: TrainConfig) -> int:
    """Tokens of the longest prompt; the configured bound where the tokenizer or the prompts aren't there."""
    from mlx_ppo.data.prompts import load_prompts
    from mlx_ppo.networks.tokenizer import load_tokenizer

    section = config.data
    try:
        tokenizer = load_tokenizer(config.model.path, json_object(config.model.path / "config.json"))
        files = [file for file in (section.prompts, section.eval_prompts) if file is not None]
        sets = [
            load_prompts(file, tokenizer, max_tokens=section.max_prompt_tokens, overlong=section.overlong)
            for file in files
        ]
    except UserError:
        return section.max_prompt_tokens
    return max(len(prompt.tokens) for found in sets for prompt in found.prompts)


def _most(accountant: Accountant, config: TrainConfig, budget: int) -> int:
    """About the most responses in one update pass that would fit; memory is a linear function of their number."""
    checkpointing = config.ppo.gradient_checkpointing != "off"
    sizes = []
    for count in (1, 5):
        shapes = replace(accountant.shapes, minibatch=count)
        other = Accountant(config, accountant.roles, accountant.policy, accountant.critic, shapes)
        phases = other.phases(Choices(1, 1, count, checkpointing))
        sizes.append(RUNTIME + max(needed(phase) for phase in phases if phase.name.startswith("update")))
    room, each = budget * (1 - RESERVE) - sizes[0], (sizes[1] - sizes[0]) / 4
    return int(1 + room / each) if room >= 0 else 0


def _variants(config: TrainConfig, given: dict[str, Any] | None, budget: int) -> dict[str, float]:
    """GiB that other configurations would need, by what is changed; those that are the same already are left out."""
    found: dict[str, float] = {}
    for name, change in _VARIANTS:
        sections = {key: getattr(config, key).model_copy(update=values) for key, values in change.items()}
        if all(section == getattr(config, key) for key, section in sections.items()):
            continue
        other = config.model_copy(update=sections)
        try:
            found[name] = round(make_plan(_accountant(other, given), other, budget).process / GIB, 3)
        except (ConfigError, ModelError):
            continue
    return found


def _print(plan: Plan, facts: dict[str, Any], metal: bool) -> None:
    console = Console()
    most = max(needed(phase) for phase in plan.phases) + RUNTIME
    table = Table(title="memory by phase, GiB" + (" (computed for Metal, not measured)" if metal else ""))
    for column in ("phase", "stays", "comes and goes", "process"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    table.add_column("")
    for phase in plan.phases:
        total = RUNTIME + needed(phase)
        bar = "█" * max(1, round(_BAR * total / most))
        stays, passing = sum(phase.resident.values()) / GIB, (phase.transient + phase.outside) / GIB
        table.add_row(Text(printable(phase.name)), f"{stays:.2f}", f"{passing:.2f}", f"{total / GIB:.2f}", bar)
    console.print(table)
    for what, size in sorted(plan.largest.resident.items(), key=lambda item: -item[1]):
        console.print(Text(printable(f"  {what}: {size / GIB:.3f} GiB")))
    choices = plan.choices
    console.print(
        f"decoded together {choices.rollout_batch}, scored {choices.score_batch}, updated {choices.micro_batch}, "
        f"gradient checkpointing {'on' if choices.checkpointing else 'off'}"
        + (f" (made smaller: {', '.join(plan.concessions)})" if plan.concessions else "")
    )
    console.print(
        f"longest response that would fit: {facts['longest_response_that_fits']} tokens; "
        f"most responses in one update pass: {facts['most_responses_in_a_pass']}"
    )
    for name, size in facts["variants_gib"].items():
        console.print(f"  with {name}: {size:.2f} GiB ({size - plan.process / GIB:+.2f})")
    verdict = "fits" if plan.fits else "does NOT fit"
    console.print(f"[bold]{plan.process / GIB:.2f} GiB of {facts['budget_gib']:.2f}: {verdict}[/bold]")
