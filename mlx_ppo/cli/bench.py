"""`bench`: how fast the phases of an iteration are on this machine, and what changed since an earlier measurement."""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from rich.console import Console
from rich.table import Column, Table

import mlx_ppo
from mlx_ppo.bench.dry_run import dry_run
from mlx_ppo.bench.operations import DECODE, decoding, flops_of
from mlx_ppo.bench.throughput import (
    FORMAT,
    ITERATION,
    TIMES,
    Ceilings,
    Document,
    changes,
    differences,
    figures,
    read_result,
    seconds_of,
    tokens_of,
)
from mlx_ppo.bundle import example_config
from mlx_ppo.cli.plan import longest_prompt
from mlx_ppo.compute.cpu import threads
from mlx_ppo.compute.machine import gigabytes, gigaflops
from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.errors import ConfigError, printable
from mlx_ppo.memory.model import config_of, weightless_trunk
from mlx_ppo.memory.phases import Accountant
from mlx_ppo.memory.plan import Plan, make_plan, require_fit
from mlx_ppo.memory.starting import accountant_of, budget_of
from mlx_ppo.models.adapters import new_adapters
from mlx_ppo.models.heads import HEAD_FILE, RewardFacts, new_head
from mlx_ppo.models.write import write_adapters
from mlx_ppo.runs.folder import replace_file
from mlx_ppo.runs.provenance import device, engine, software
from mlx_ppo.runtime.load import BUSY, Load
from mlx_ppo.runtime.system import cores

_SIDE = 2048  # of the matrices whose product is the peak
_PROMPT = 32  # tokens of a prompt where no configuration says it
_CONFIG = """
[model]
path = {model}
[lora]
layers = 8
[data]
prompts = "prompts.jsonl"
eval_count = 1
[rollout]
prompts = 16
max_tokens = 48
[[reward]]
kind = "model"
path = "reward"
"""


def bench(
    target: Path | None,
    overrides: tuple[str, ...],
    *,
    prompt_tokens: int | None,
    iterations: int,
    output: Path | None,
    earlier: Path | None,
    as_json: bool,
) -> None:
    """Measure, print, keep, compare.

    Args:
        target: a model folder or a configuration; None for the bundled example's.
        overrides: `section.key=value`.
        prompt_tokens: length of every prompt; None: the longest of the configuration's.
        iterations: how many are timed, after one that isn't.
        output: where the result is kept.
        earlier: a result to compare with.
        as_json: print JSON instead of tables.
    Raises:
        ConfigError, DataError, ModelError, RunError: what is wrong with the files, or went wrong.
    """
    before = read_result(earlier) if earlier is not None else None
    if output is not None:
        _require_place(output)
    with ExitStack() as stack:
        if target is None or target.suffix == ".toml":
            config = read_config(TrainConfig, target or example_config(), overrides)
            length = prompt_tokens or longest_prompt(config)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx-ppo-bench-")))
            config, length = config_of_folder(target, overrides, folder), prompt_tokens or _PROMPT
        if sys.stderr.isatty():
            click.echo(f"{1 + iterations} iterations ...", err=True)
        result = measure(config, length, iterations)
    if output is not None:
        replace_file(output, json.dumps(result, indent=2) + "\n")
    if as_json:
        compared = {} if before is None else {"compared": _compared(before, result)}
        click.echo(json.dumps({**result, **compared}, indent=2))
        return
    _print(result)
    if before is not None:
        _print_changes(before, result)


def _require_place(output: Path) -> None:
    """Refuse, before minutes are spent, a place where no result can be or something else already is."""
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: there is no folder {output.parent}")
    if output.exists() or output.is_symlink():
        read_result(output)


def config_of_folder(model: Path, overrides: Sequence[str], folder: Path) -> TrainConfig:
    """A usual run of a model: LoRA on its upper layers, critic and reward model as adapters on the same trunk."""
    model = Path(os.path.realpath(model)) if model.exists() else model
    content = config_of(model)
    file = folder / "bench.toml"
    text = _CONFIG.format(model=json.dumps(str(model), ensure_ascii=False))
    file.write_text(text, "utf-8", errors="surrogateescape")
    config = read_config(TrainConfig, file, overrides)
    trunk = weightless_trunk(content, str(model), dtype=config.model.dtype)
    adapters = new_adapters(trunk.adapted, config.lora, key="reward", seed=0)
    write_adapters(folder / "reward", adapters, trunk.blocks)
    mx.save_safetensors(str(folder / "reward" / HEAD_FILE), new_head(trunk.width))
    RewardFacts("adapters", "last", 0.0, 1.0).write(folder / "reward")
    return config


@threads.choosing(0)  # one number for all that is measured
def measure(config: TrainConfig, prompt: int, iterations: int) -> Document:
    """Iterations of a configuration, with prompts of chance and full responses; all that `--output` keeps."""
    accountant = accountant_of(config, None, prompt)
    plan = make_plan(accountant, config, budget_of(config))
    require_fit(plan, accountant, config)
    load = Load()
    found = dry_run(config, plan, accountant.shapes, iterations=1 + iterations)[1:]
    busy = load.others
    seconds = [seconds_of(one.seconds, one.prefill, one.total) for one in found]
    ceilings = Ceilings(gigaflops(_SIDE, _computed_in(accountant)), gigabytes())
    names = [name for name in seconds[0] if name not in ("between", "update step")]
    tokens = {name: tokens_of(config, name, prompt) for name in names}
    flops = flops_of(accountant, plan.choices)
    flops[ITERATION] = sum(flops.values())
    return {
        "format": FORMAT,
        **software(),
        "device": device(),
        "engine": engine(),
        "processors": cores(),
        "busy": busy,
        "ceilings": ceilings._asdict(),
        "shapes": _shapes(config, accountant, plan),
        "iterations": iterations,
        "phases": figures(seconds, tokens, flops, _read(config, accountant, plan), ceilings),
    }


def _read(config: TrainConfig, accountant: Accountant, plan: Plan) -> dict[str, int]:
    """Bytes that decoding reads; not known where a CPU dequantises piece by piece, or keys and values have 8 bits."""
    if plan.choices.compact or plan.choices.kv_cache != "full":
        return {}
    responses, together = config.rollout.prompts * config.rollout.samples_per_prompt, plan.choices.rollout_batch
    sizes = [min(together, responses - start) for start in range(0, responses, together)]
    steps = config.rollout.max_tokens - 1
    return {DECODE: steps * sum(sizes.count(rows) * decoding(accountant, rows).read for rows in set(sizes))}


def _computed_in(accountant: Accountant) -> mx.Dtype:
    """The type of the products: that of the weights, or of a quantised model's scales."""
    arrays = accountant.roles.trunk.base.values()
    return next(array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating))


def _shapes(config: TrainConfig, accountant: Accountant, plan: Plan) -> dict[str, Any]:
    choices = plan.choices
    base = accountant.roles.trunk.base.values()
    return {
        "model": config.model.path.name,
        "computed in": str(_computed_in(accountant)).removeprefix("mlx.core."),
        "weights, MB": round(sum(array.nbytes for array in base) / 1e6, 1),
        "model.train": config.model.train,
        "lora.layers": config.lora.layers,
        "lora.rank": config.lora.rank,
        "ppo.advantage": config.ppo.advantage,
        "critic.kind": config.critic.kind,
        "rollout.prompts": config.rollout.prompts,
        "rollout.samples_per_prompt": config.rollout.samples_per_prompt,
        "prompt tokens": accountant.shapes.prompt,
        "rollout.max_tokens": config.rollout.max_tokens,
        "ppo.epochs": config.ppo.epochs,
        "ppo.minibatches": config.ppo.minibatches,
        "decoded together": choices.rollout_batch,
        "scored together": choices.score_batch,
        "updated together": choices.micro_batch,
        "gradient checkpointing": choices.checkpointing,
    }


def _compared(before: Document, now: Document) -> dict[str, Any]:
    phases = {name: {**one._asdict(), "ratio": one.ratio} for name, one in changes(before, now).items()}
    return {"differs": differences(before, now), "phases": phases}


def _print(result: Document) -> None:
    console = Console()
    shapes, ceilings = result["shapes"], Ceilings(**result["ceilings"])
    train = f"LoRA of rank {shapes['lora.rank']}" if shapes["model.train"] == "lora" else "all weights trained"
    samples = f" x {shapes['rollout.samples_per_prompt']}" if shapes["rollout.samples_per_prompt"] > 1 else ""
    title = (
        f"{printable(shapes['model'])} ({shapes['weights, MB']} MB), {train}: {shapes['rollout.prompts']}{samples} "
        f"responses, {shapes['prompt tokens']} + {shapes['rollout.max_tokens']} tokens, {shapes['ppo.epochs']} epochs"
    )
    console.print(title, markup=False, highlight=False)
    columns = ("seconds", "range", "tokens/s", "GFLOP/s (peak)", "GB/s (memory)")
    cells = [Column(column, justify="right", no_wrap=column == "range") for column in columns]
    table = Table(Column("phase", no_wrap=True), *cells)
    for name, row in result["phases"].items():
        table.add_row(name, *_cells(row), style="bold" if name == ITERATION else "")
    console.print(table)
    console.print(
        f"peak: {ceilings.gigaflops:.0f} GFLOP/s in {shapes.get('computed in', 'float32')} products of "
        f"{_SIDE} x {_SIDE}; memory: {ceilings.gigabytes:.0f} GB/s copied. Medians of {result['iterations']}; "
        "operations are those of matrix products, counted in a trace",
        highlight=False,
    )
    if result["busy"] > BUSY * result["processors"]:
        console.print(
            f"warning: other programs kept {result['busy']:.1f} of {result['processors']} processors busy; on a quiet "
            "machine these figures are better",
            markup=False,
            highlight=False,
        )
    if mlx_ppo.BLAS.problem:
        console.print(f"warning: {mlx_ppo.BLAS.problem}", markup=False, highlight=False)


def _cells(row: Mapping[str, float]) -> list[str]:
    seconds, fastest, slowest = (f"{row[name]:.{3 if row['slowest'] < 10 else 1}f}" for name in TIMES)
    cells = [seconds, f"{fastest}-{slowest}"]
    cells.append(f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else "")
    for speed, share in (("gflops_per_second", "share_of_peak"), ("gb_per_second", "share_of_bandwidth")):
        cells.append(f"{row[speed]:.1f} {row[share]:.0%}" if speed in row else "")
    return cells


def _print_changes(before: Document, now: Document) -> None:
    console = Console()
    for line in differences(before, now):
        console.print(f"differs: {printable(line)}", markup=False, highlight=False)
    old, new = Ceilings(**before["ceilings"]), Ceilings(**now["ceilings"])
    console.print(
        f"peak {old.gigaflops:.0f} -> {new.gigaflops:.0f} GFLOP/s, memory {old.gigabytes:.0f} -> {new.gigabytes:.0f} "
        "GB/s",
        highlight=False,
    )
    table = Table("phase", title="seconds before and after; * where the ranges don't touch")
    for column in ("before", "after", "ratio"):
        table.add_column(column, justify="right")
    for name, one in changes(before, now).items():
        cells = ["" if value is None else f"{value:.3f}" for value in (one.before, one.after)]
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}" + ("*" if one.beyond else " ")
        table.add_row(printable(name), *cells, ratio)
    console.print(table)
