"""Options that several commands have."""

import math
from typing import Any

import click


class Number(click.FloatRange):
    """A finite number."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; click's own error where it isn't one, is out of range, or not finite."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


MAX_TOKENS = click.option(
    "--max-tokens", type=click.IntRange(1), help="Longest completion; default: that of the run, 64 without one."
)
TEMPERATURE = click.option(
    "--temperature", type=Number(0), help="0: the most probable token; default: that of the run, 1 without one."
)
