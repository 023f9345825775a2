"""Options that several commands have."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_COLDEST, _HOTTEST = 1e-3, 1e3  # as rollout.temperature has them


class Number(click.FloatRange):
    """A finite number."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; click's own error where it isn't one, is out of range, or not finite."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class Temperature(Number):
    """0, or what logits can be divided by."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; click's own error for another."""
        number = super().convert(value, param, ctx)
        if number and not _COLDEST <= number <= _HOTTEST:
            self.fail(f"{value!r} is neither 0 nor from {_COLDEST:g} to {_HOTTEST:g}.", param, ctx)
        return number


class Place(click.Path):
    """A path, which needn't exist."""

    def __init__(self) -> None:
        """As pathlib has them."""
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; click's own error where no file can have such a name."""
        try:
            os.stat(value)
        except ValueError as error:  # a null character, half a character
            self.fail(f"{str(value)[:60]!r} can't be a path ({error}).", param, ctx)
        except OSError:
            pass
        return super().convert(value, param, ctx)


class PlaceOrAddress(Place):
    """A path, or the address of a server, which stays a text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Either."""
        is_address = isinstance(value, str) and value.startswith(("http://", "https://"))
        return value if is_address else super().convert(value, param, ctx)


JUDGE = click.option(
    "--judge",
    type=PlaceOrAddress(),
    metavar="MODEL|ADDRESS#MODEL",
    help="Model, here or served on this machine, that is shown both completions in both orders and asked for the best.",
)
KEY_ENV = click.option(
    "--key-env", metavar="VARIABLE", help="Environment variable with the key that the judge's server asks for."
)


SET = click.option(
    "overrides",
    "--set",
    metavar="SECTION.KEY=VALUE",
    multiple=True,
    help="Change a key of the configuration, e.g. --set ppo.epochs=4. May be given several times.",
)
_OF_JOBS = (
    SET,
    click.option(
        "--dry-run", is_flag=True, help="Check the configuration, read the data, print token statistics, train nothing."
    ),
    click.option(
        "--hosts", type=Place(), help="JSON file of the machines that share the run; the same as parallel.hosts."
    ),
    click.option("--rank", type=click.IntRange(0), help="Which of them this is; default: the one with its address."),
)


_OF_SHARED_PLANS = (
    click.option("--hosts", type=Place(), help="Predict an iteration that these machines share: a JSON file of them."),
    click.option("--processes", type=click.IntRange(1, 64), help="Predict one that processes of this machine share."),
    click.option("--bandwidth", type=Number(0, min_open=True), help="Gbit/s between them; default with --hosts: 1."),
    click.option("--latency", type=Number(0), help="Milliseconds between them; default with --hosts: 0.2."),
)


def plan_sharing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command what predicts a shared iteration."""
    for option in reversed(_OF_SHARED_PLANS):
        command = option(command)
    return command


def job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command what jobs have in common."""
    for option in reversed(_OF_JOBS):
        command = option(command)
    return command


MAX_TOKENS = click.option(
    "--max-tokens",
    type=click.IntRange(1, 1_000_000),
    help="Longest completion; default: that of the run, 64 without one.",
)
_DRAWING = (
    click.option(
        "--temperature",
        type=Temperature(0),
        help="0: the most probable token; default: that of the run, 1 without one.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(0, 100_000_000),
        help="Sample only from so many of the most probable tokens; 0: from all; default: that of the run.",
    ),
    click.option(
        "--top-p",
        type=Number(0, 1, min_open=True),
        help="Then only from the most probable tokens that together have this probability; 1: from all; default: that "
        "of the run.",
    ),
    click.option(
        "--min-p",
        type=Number(0, 1, max_open=True),
        help="Then only from tokens at least this share as probable as the most probable one; 0: from all; default: "
        "that of the run.",
    ),
)


def drawing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say what tokens are drawn from: temperature, top_k, top_p, min_p; None where one isn't given."""
    for option in reversed(_DRAWING):
        command = option(command)
    return command


PROCESSES = click.option(
    "--processes",
    type=click.IntRange(0),
    default=0,
    help="Processes that write, each with a copy of the model; 0, the default: as many as are worthwhile, "
    "1 for a model of more than 20 million parameters.",
)
PORT = click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port of the page; default: any free one.")
NO_BROWSER = click.option("--no-browser", is_flag=True, help="Only print the page's address.")
