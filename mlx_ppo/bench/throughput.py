"""Seconds of a run's phases into tokens, operations and bytes a second; and two such results compared."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from mlx_ppo.bench.operations import DECODE, PREFILL
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.errors import DataError
from mlx_ppo.files import parse_json, read_regular

FORMAT = 1
TIMES = ("seconds", "fastest", "slowest")
ITERATION = "iteration"
_LARGEST = 1 << 20  # bytes of a result
_FACTS = ("python", "machine", "device", "processors")

Document = dict[str, Any]


class Ceilings(NamedTuple):
    """What the machine reaches at best."""

    gigaflops: float  # GFLOP/s of matrix products of the type that is computed in
    gigabytes: float  # GB/s


def seconds_of(phases: Mapping[str, float], prefill: float, total: float) -> dict[str, float]:
    """One iteration's seconds by phase: the rollout in two, what is between the phases, and all of it."""
    split = {PREFILL: prefill, DECODE: phases["rollout"] - prefill}
    rest = {name: took for name, took in phases.items() if name not in ("rollout", "load")}
    return {**split, **rest, "between": total - sum(split.values()) - sum(rest.values()), ITERATION: total}


def tokens_of(config: TrainConfig, phase: str, prompt: int) -> int:
    """Tokens that a phase deals with: of the distinct prompts, or of the responses, in an update once an epoch."""
    section = config.rollout
    responses = section.prompts * section.samples_per_prompt
    if phase == PREFILL:
        return section.prompts * prompt
    if phase == DECODE:
        return responses * (section.max_tokens - 1)
    return responses * section.max_tokens * (config.ppo.epochs if phase.startswith("update") else 1)


def figures(
    seconds: Sequence[Mapping[str, float]],
    tokens: Mapping[str, int],
    flops: Mapping[str, int],
    read: Mapping[str, int],
    ceilings: Ceilings,
) -> Document:
    """Each phase's median seconds with their range, and what it did in a second.

    Args:
        seconds: of each iteration, by phase.
        tokens: by phase.
        flops: operations of products, by phase, where there are any.
        read: bytes that products read, by phase, where that bounds it.
        ceilings: of the machine.
    """
    found = {}
    for name in seconds[0]:
        times = [one[name] for one in seconds]
        took = median(times)
        row = {"seconds": took, "fastest": min(times), "slowest": max(times)}
        took = max(took, 1e-9)
        if name in tokens:
            row |= {"tokens": tokens[name], "tokens_per_second": tokens[name] / took}
        if name in flops:
            speed = flops[name] / took / 1e9
            row |= {"gflop": flops[name] / 1e9, "gflops_per_second": speed, "share_of_peak": speed / ceilings.gigaflops}
        if name in read:
            speed = read[name] / took / 1e9
            row |= {"gb_per_second": speed, "share_of_bandwidth": speed / ceilings.gigabytes}
        found[name] = row
    return found


class PhaseChange(NamedTuple):
    """A phase in two results."""

    before: float | None  # seconds; None where it wasn't there
    after: float | None
    beyond: bool  # the two ranges don't touch

    @property
    def ratio(self) -> float | None:
        """Seconds after over before."""
        return self.after / self.before if self.after is not None and self.before else None


def changes(before: Document, now: Document) -> dict[str, PhaseChange]:
    """Every phase of either result."""
    old, new = before["phases"], now["phases"]
    found = {}
    for name in dict.fromkeys((*new, *old)):
        first, second = old.get(name), new.get(name)
        beyond = bool(first and second) and (
            first["slowest"] < second["fastest"] or second["slowest"] < first["fastest"]
        )
        found[name] = PhaseChange(first and first["seconds"], second and second["seconds"], beyond)
    return found


def differences(before: Document, now: Document) -> list[str]:
    """What else differs between two results: software, machine, shapes; such as "rollout.prompts: 8 -> 64"."""
    old, new = dict(_facts(before)), dict(_facts(now))
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in {**old, **new} if old.get(name) != new.get(name)]


def _facts(result: Document) -> Iterator[tuple[str, object]]:
    yield from result["versions"].items()
    yield from ((name, result.get(name)) for name in (*_FACTS, "engine"))
    yield "processors that others kept busy", round(result.get("busy", 0.0))  # earlier versions didn't look
    yield from result["shapes"].items()


def read_result(path: Path) -> Document:
    """A result that `mlx-ppo bench --output` wrote.

    Raises:
        DataError: it can't be read, or isn't one.
    """
    try:
        document: Document = parse_json(read_regular(path, _LARGEST))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise DataError(f"{path}: not JSON; name a file that mlx-ppo bench --output wrote") from None
    if not _is_result(document):
        raise DataError(f"{path}: not a result of this version's mlx-ppo bench --output, or damaged")
    return document


def _is_result(document: object) -> bool:
    if not isinstance(document, dict) or document.get("format") != FORMAT or not {*_FACTS} <= document.keys():
        return False
    if not all(isinstance(document.get(name), dict) for name in ("versions", "shapes", "phases", "ceilings")):
        return False
    rows = [*document["phases"].values()]
    times = [row.get(name) if isinstance(row, dict) else None for row in rows for name in TIMES]
    speeds = [document["ceilings"].get(name) for name in Ceilings._fields]
    return bool(rows) and all(_is_amount(value) for value in (*times, *speeds, document.get("busy", 0.0)))


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
