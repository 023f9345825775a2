"""`plan --processes` and `plan --hosts`: what sharing a run between processes or machines would bring."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console
from rich.table import Table

from mlx_ppo.bench.dry_run import dry_run
from mlx_ppo.bench.operations import DECODE
from mlx_ppo.bench.sharing import Line, Parts, exchanged, expected, memory_line
from mlx_ppo.bench.throughput import seconds_of
from mlx_ppo.cli import plan as one_process
from mlx_ppo.cli.plan import longest_prompt
from mlx_ppo.compute.cpu import threads
from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.memory.choices import shapes_of
from mlx_ppo.memory.plan import GIB, make_plan, require_fit
from mlx_ppo.memory.processes import parameters_of
from mlx_ppo.memory.starting import accountant_of, budget_of
from mlx_ppo.parallel import WORKER
from mlx_ppo.runtime.hosts import read_hosts
from mlx_ppo.runtime.system import cores

_NUMBERS = (1, 2, 4, 8)
_GIGABIT, _SLOW = 1.0, 0.2  # Gbit/s and milliseconds, where nothing is said


class Sharing(NamedTuple):
    """What is asked about."""

    hosts: Path | None  # a file of machines; None: processes of this one
    processes: int | None
    bandwidth: float | None  # Gbit/s
    latency: float | None  # milliseconds


def plan(path: Path, overrides: tuple[str, ...], options: dict[str, Any]) -> None:
    """Print the plan of one process or, where its options say so, an iteration that several share."""
    asked = Sharing(*(options.pop(name) for name in Sharing._fields))
    if asked.hosts is None and asked.processes is None:
        if asked.bandwidth is not None or asked.latency is not None:
            raise click.UsageError("--bandwidth and --latency go with --hosts or --processes")
        one_process.show(path, overrides, **options)
        return
    if asked.hosts is not None and asked.processes is not None:
        raise click.UsageError("--hosts and --processes exclude each other")
    as_json = options.pop("as_json")
    if any(value not in (None, False) for value in options.values()):
        raise click.UsageError("--hosts and --processes measure the configuration here; leave out the other options")
    show(path, overrides, asked, as_json=as_json)


def show(path: Path, overrides: tuple[str, ...], asked: Sharing, *, as_json: bool) -> None:
    """Measure an iteration of one process here, and print what it would be with others.

    Raises:
        ConfigError, ModelError: what is wrong with the files.
        ProcessLost: the trial with a second process failed.
    """
    config = read_config(TrainConfig, path, overrides)
    count = len(read_hosts(asked.hosts)) if asked.hosts is not None else asked.processes or 1
    prompt, budget = longest_prompt(config), budget_of(config)
    accountant = accountant_of(config, None, prompt)
    plan = make_plan(accountant, config, budget)
    require_fit(plan, accountant, config)
    line = _line(asked, config.parallel.patience)
    one = dry_run(config, plan, accountant.shapes, iterations=2)[-1]
    seconds = seconds_of(one.seconds, one.prefill, one.total)
    del seconds["iteration"]
    alone = dry_run(_one_prompt(config), plan, accountant.shapes, iterations=1)[0]
    measured = Parts(seconds, min(seconds[DECODE], alone.seconds["rollout"] - alone.prefill))
    parameters, rows = parameters_of(accountant), list[dict[str, Any]]()
    for number in sorted({*_NUMBERS, count}):
        shared = accountant.with_shapes(shapes_of(config, prompt, number))
        each = make_plan(shared, config, budget if asked.hosts is not None else budget // number)
        gain = float(number)
        if asked.hosts is None:
            gain = min(number * threads.gaining(parameters, number), cores()) / threads.gaining(parameters)
        own = exchanged(config, shared, prompt, number, memory=asked.hosts is None)
        found = expected(config, measured, own, line, number, gain)
        rows.append(
            {
                "processes": number,
                "gib_each": round(each.process / GIB, 3),
                "fits": each.fits,
                "computing": round(found.computing, 3),
                "exchanging": round(found.exchanging, 3),
                "iteration": round(found.total, 3),
                "times_as_fast": round(one.total / found.total, 2),
                "sent_mb": round(own.sent / 1e6, 3),
            }
        )
    facts = {
        "measured_seconds": {name: round(took, 4) for name, took in seconds.items()},
        "decode_of_one_prompt": round(measured.one_prompt, 4),
        "line": {"gigabits": line.bandwidth * 8e-9, "milliseconds": line.latency * 1e3, "measured": _is_tried(asked)},
        "computed": rows,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        _print(asked, facts, one.total)


def _one_prompt(config: TrainConfig) -> TrainConfig:
    one = {
        "rollout": config.rollout.model_copy(update={"prompts": 1}),
        "ppo": config.ppo.model_copy(update={"minibatches": 1}),
    }
    return config.model_copy(update=one)


def _is_tried(asked: Sharing) -> bool:
    return asked.hosts is None and asked.bandwidth is None and asked.latency is None


def _line(asked: Sharing, patience: float) -> Line:
    """What is said of it; between processes of this machine it is tried where nothing is."""
    if _is_tried(asked):
        return memory_line(WORKER, patience)
    gigabits = _GIGABIT if asked.bandwidth is None else asked.bandwidth
    return Line(gigabits * 1e9 / 8, (_SLOW if asked.latency is None else asked.latency) / 1e3)


def _print(asked: Sharing, facts: dict[str, Any], measured: float) -> None:
    where = "machines like this one" if asked.hosts is not None else f"processes of this machine, {cores()} cores"
    table = Table(title=f"an iteration shared between {where}; computed")
    names = ("processes", "GiB each", "compute s", "exchange s", "total s", "speed", "sent MB")
    for name in names:
        table.add_column(name, justify="right")
    for row in facts["computed"]:
        size = f"{row['gib_each']:.2f}" + ("" if row["fits"] else "!")
        figures = (row["computing"], row["exchanging"], row["iteration"])
        shown = [f"{value:.2f}" for value in (*figures, row["times_as_fast"], row["sent_mb"])]
        table.add_row(str(row["processes"]), size, *shown)
    console, line = Console(), facts["line"]
    console.print(table)
    source = "measured, two processes" if line["measured"] else "as said, or the default"
    console.print(f"measured here: {measured:.2f} s an iteration of one process, responses of full length")
    console.print(f"line: {line['gigabits']:.2f} Gbit/s, {line['milliseconds']:.3f} ms ({source})")
    if not all(row["fits"] for row in facts["computed"]):
        console.print("!: more memory than there is")
    console.print("all in the table is computed from these: nothing was shared to make it")
