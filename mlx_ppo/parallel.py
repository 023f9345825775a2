"""The processes that share a run: those that this one starts, or those on other machines that wait for it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_ppo.config.supervised import AnyJob
from mlx_ppo.errors import ConfigError
from mlx_ppo.memory.budget import default_budget
from mlx_ppo.memory.plan import GIB
from mlx_ppo.memory.processes import first_threads, worthwhile
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.folder import Run, read_record
from mlx_ppo.runs.provenance import identity
from mlx_ppo.runtime.group import ALONE, Group
from mlx_ppo.runtime.hosts import Place, placed
from mlx_ppo.runtime.local_group import local_group
from mlx_ppo.runtime.ring import Ring, joined

WORKER = Path(__file__).with_name("follow_worker.py")


class Work(NamedTuple):
    """What a run without a memory plan has to do."""

    multiplications: float  # in all
    pieces: int  # of a step, at most
    parameters: int  # of its model
    fixed: int  # bytes that each process needs
    shared: int  # bytes of which each process needs its part


class Share(NamedTuple):
    """How a run is shared; kept in its record, so that it goes on in the same way."""

    processes: int
    threads: int  # of each one's products on a CPU; 0: as the engine says


def share_of(config: AnyJob, run: Run, work: Work) -> Share:
    """How a run that has no memory plan is shared: as before or, at its first start, as is worthwhile and fits.

    Raises:
        ConfigError: there is no memory for as many processes as are asked for.
    """
    place = placed(config.parallel.hosts, rank=0)
    wanted = len(place.hosts) if place is not None else config.parallel.processes
    before = run.record().get("shared")
    if before is not None and wanted in (0, before["processes"]):
        return Share(before["processes"], before["threads"])
    begun = bool(checkpoint.steps(run.folder))  # by an earlier version, which had one process
    count = wanted or (1 if begun else worthwhile(work.multiplications, work.pieces))
    if place is None:
        asked = "parallel.processes" if wanted else None
        count = fitting(count, lambda processes: work.fixed + work.shared // processes, asked=asked)
    share = Share(count, first_threads(work.parameters, 1 if place is not None else count) if count > 1 else 0)
    run.note(shared=share._asdict())
    return share


def fitting(count: int, each: Callable[[int], int], *, asked: str | None) -> int:
    """As many processes, up to a count, as there is memory for beside this one, whose model is loaded.

    Args:
        count: at most.
        each: bytes of each of so many.
        asked: the key by which a user asks for as many; None: they needn't be.
    Raises:
        ConfigError: there is less than what is asked for needs.
    """
    room = default_budget()
    while count > 1 and (need := (count - 1) * each(count)) > room:
        if asked:
            raise ConfigError(
                f"{asked}: {count - 1} more processes take {need / GIB:.1f} GiB, more than the {room / GIB:.1f} that "
                "may be used; lower it"
            )
        count -= 1
    return count


@contextmanager
def sharing(config: AnyJob, processes: int, folder: Path) -> Iterator[Group]:
    """So many processes for a run, led by this one, for the length of a `with` block.

    Raises:
        ProcessLost: one doesn't come.
        ConfigError: another machine has other inputs.
    """
    place = placed(config.parallel.hosts, rank=0)
    if place is not None:
        ring = meeting(config, place)
        try:
            _check(ring, config, place, read_record(folder).get("inputs", {}))
            yield ring
            ring.told(None)
        finally:
            ring.close()
    elif processes == 1:
        yield ALONE
    else:
        order = {"folder": str(folder.resolve())}
        patience = config.parallel.patience
        with local_group(WORKER, order, processes=processes, patience=patience, key="parallel.patience") as group:
            yield group


def meeting(config: AnyJob, place: Place) -> Ring:
    """Join the other machines.

    Raises:
        ProcessLost: they don't come.
    """
    patience = config.parallel.patience
    ring = joined(place.rank, place.hosts, patience)
    names = [addresses[0] for addresses in place.hosts]
    return Ring(ring, patience, suspect=lambda: f"another machine ({place.others})", names=names)


def _check(ring: Ring, config: AnyJob, place: Place, known: Mapping[str, str]) -> None:
    """Compare what every machine has, before anything is computed."""
    complaints = compared(ring, config, known)
    for rank, complaint in enumerate(complaints):
        if complaint:
            raise ConfigError(f"{place.hosts[rank][0]} has another {complaint} than this machine; nothing was computed")


def compared(ring: Ring, config: AnyJob, known: Mapping[str, str] | None = None) -> list[str]:
    """The first key whose value, or whose file by its SHA-256, isn't the leader's, by rank; "" where there is none.

    `known`: SHA-256 of files that needn't be read again.
    """
    own: dict[str, Any] = identity(config, known or {})
    leading = ring.told(own)
    differing = sorted(key for key in {*own, *leading} if own.get(key) != leading.get(key))
    found = ring.gather([np.frombuffer((differing or [""])[0].encode(), np.uint8)])
    return [bytes(part[0]).decode() for part in found]
