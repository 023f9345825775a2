"""The machines that share a run, as a file names them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from mlx_ppo.errors import ConfigError
from mlx_ppo.files import read_json

_FIRST_PORT = 32323  # as mlx.launch counts from


class Place(NamedTuple):
    """This process's place among those of several machines."""

    hosts: list[list[str]]  # "address:port", by rank
    rank: int

    @property
    def others(self) -> str:
        """The other machines' addresses."""
        return ", ".join(addresses[0] for rank, addresses in enumerate(self.hosts) if rank != self.rank)


def placed(file: Path | None, rank: int | None = None) -> Place | None:
    """Where this process is by `mlx.launch`'s environment or else by a file of hosts; None where neither is given.

    Args:
        file: of hosts, or None.
        rank: of this process; by default the one whose address is this machine's.
    Raises:
        ConfigError: the file isn't one of hosts, or doesn't say which one this is.
    """
    launched, number = os.environ.get("MLX_HOSTFILE"), os.environ.get("MLX_RANK", "")
    if launched and number.isdecimal():
        file, rank = Path(launched), int(number)
    if file is None:
        return None
    hosts = read_hosts(file)
    found = _own_rank(hosts, file) if rank is None else rank
    if not 0 <= found < len(hosts):
        raise ConfigError(f"{file}: has the ranks 0 to {len(hosts) - 1}, and not {found}")
    return Place(hosts, found)


def read_hosts(file: Path) -> list[list[str]]:
    """Addresses by rank, of a file as mlx's ring reads it or as `mlx.launch` does.

        [["192.168.1.10:5000"], ["192.168.1.11:5000"]]
        [{"ssh": "mac-1.local", "ips": ["192.168.1.10"]}, {"ssh": "mac-2.local", "ips": ["192.168.1.11"]}]

    Raises:
        ConfigError: it is neither.
    """
    try:
        entries = read_json(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ConfigError(f"{file}: not JSON; docs/parallel.md shows what a file of hosts looks like") from None
    if not isinstance(entries, list) or len(entries) < 2:
        raise ConfigError(f"{file}: must be a list of two hosts or more; docs/parallel.md shows one")
    hosts = [_addresses(entry, rank, file) for rank, entry in enumerate(entries)]
    every = [address for host in hosts for address in host]
    if len(set(every)) < len(every):
        raise ConfigError(f"{file}: names an address twice; processes of one machine need ports of their own")
    return hosts


def _addresses(entry: Any, rank: int, file: Path) -> list[str]:
    if isinstance(entry, dict):
        given = entry.get("ips") or [entry.get("ssh")]
        entry = [f"{address}:{_FIRST_PORT + rank}" for address in given] if isinstance(given, list) else None
    if not isinstance(entry, list) or not entry or not all(map(_is_address, entry)):
        raise ConfigError(f'{file}: host {rank} must be ["address:port"] or {{"ips": ["address"]}}')
    return entry


def _is_address(value: object) -> bool:
    if not isinstance(value, str):
        return False
    name, _, port = value.rpartition(":")
    return bool(name) and ":" not in name and port.isdecimal() and 0 < int(port) < 1 << 16


def _own_rank(hosts: Sequence[Sequence[str]], file: Path) -> int:
    mine = {address.address for found in psutil.net_if_addrs().values() for address in found}
    ranks = [rank for rank, host in enumerate(hosts) if any(one.rpartition(":")[0] in mine for one in host)]
    if len(ranks) != 1:
        what = "has no address of this machine" if not ranks else "has several addresses of this machine"
        raise ConfigError(f"{file}: {what}; say which host this is with --rank")
    return ranks[0]
