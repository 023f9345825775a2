"""The processes that share a run: those that this one starts, or those on other machines that wait for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.errors import ConfigError
from mlx_ppo.runs.provenance import identity
from mlx_ppo.runtime.group import ALONE, Group, Ring
from mlx_ppo.runtime.hosts import Place, placed
from mlx_ppo.runtime.local_group import joined, local_group

_WORKER = Path(__file__).with_name("follow_worker.py")


@contextmanager
def sharing(config: TrainConfig, processes: int, folder: Path) -> Iterator[Group]:
    """So many processes for a run, led by this one, for the length of a `with` block.

    Raises:
        ProcessLost: one doesn't come.
        ConfigError: another machine has other inputs.
    """
    place = placed(config.parallel.hosts, rank=0)
    if place is not None:
        ring = meeting(config, place)
        try:
            _check(ring, config, place)
            yield ring
            ring.told(None)
        finally:
            ring.close()
    elif processes == 1:
        yield ALONE
    else:
        order = {"folder": str(folder.resolve())}
        with local_group(_WORKER, order, processes=processes, patience=config.parallel.patience) as group:
            yield group


def meeting(config: TrainConfig, place: Place) -> Ring:
    """Join the other machines.

    Raises:
        ProcessLost: they don't come.
    """
    patience = config.parallel.patience
    ring = joined(place.rank, place.hosts, patience)
    names = [addresses[0] for addresses in place.hosts]
    return Ring(ring, patience, suspect=lambda: f"another machine ({place.others})", names=names)


def _check(ring: Ring, config: TrainConfig, place: Place) -> None:
    """Compare what every machine has, before anything is computed."""
    complaints = compared(ring, config)
    for rank, complaint in enumerate(complaints):
        if complaint:
            raise ConfigError(f"{place.hosts[rank][0]} has another {complaint} than this machine; nothing was computed")


def compared(ring: Ring, config: TrainConfig) -> list[str]:
    """The first key whose value, or whose file by its SHA-256, isn't the leader's, by rank; "" where there is none."""
    own: dict[str, Any] = identity(config)
    leading = ring.told(own)
    differing = sorted(key for key in {*own, *leading} if own.get(key) != leading.get(key))
    found = ring.gather([np.frombuffer((differing or [""])[0].encode(), np.uint8)])
    return [bytes(part[0]).decode() for part in found]
