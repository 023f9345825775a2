"""Tests with many forms: a chosen few run always, the others with `--thorough`."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def mostly(values: Iterable[Any], kept: Container[Any]) -> list[Any]:
    """Parameters of a test, of which those that aren't among the kept ones are `thorough`."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.thorough) for value in values]
