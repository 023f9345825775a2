"""Nothing leaves this machine: the environment of libraries, and a hook that refuses what Python code tries.

The hook is a seat belt: C code and `ctypes` can go round it, and a program that is started is not under it. The worker
processes load this file by its path, so it needs the standard library only.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

OFFLINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
_ADDRESS_AT = {"bind": 0, "connect": 0, "connect_ex": 0, "sendto": -1, "sendmsg": 3}


class NetworkRefused(RuntimeError):
    """Something was about to reach beyond this machine; the text names the address.

    No OSError: libraries take those for a bad connection, and try again or go on without.
    """


def go_offline() -> None:
    """Set the environment variables that switch off downloads and telemetry, for this process and its children."""
    os.environ.update(OFFLINE_ENVIRONMENT)


def refuse_connections() -> None:
    """Refuse everything but loopback and sockets of the file system for as long as this process lives.

    Connections, datagrams, listening and name look-ups then raise NetworkRefused before anything is sent. Python has
    no way to take such a hook back, so this is for a process of one's own; more calls change nothing.
    """
    if not _Guard.on:
        _Guard.on = True
        sys.addaudithook(_hook)


def refusing() -> bool:
    """Whether this process refuses connections."""
    return _Guard.on


class _Guard:
    on = False
    names_checked = False


def _audit_socket(what: str, arguments: tuple[Any, ...]) -> None:
    socket, address = arguments[0], arguments[1]
    if address is not None:  # a message on a connected socket has none
        _check_address(what, socket.family, address)


def _audit_host(what: str, arguments: tuple[Any, ...]) -> None:
    if arguments[0] is not None:  # None stands for this machine, and asks nobody
        _check_host(f"the {what} of", arguments[0])


def _audit_name(what: str, arguments: tuple[Any, ...]) -> None:
    _check_host(f"the {what} of", arguments[0][0])


def _audit_new(_: str, __: tuple[Any, ...]) -> None:
    """Before the first socket is used: let its methods check names themselves.

    Python looks a name up before it asks the hook about `connect`, so without this the question would leave.
    """
    module = sys.modules.get("socket")
    if module is None or _Guard.names_checked:
        return
    _Guard.names_checked = True
    for name, at in _ADDRESS_AT.items():
        setattr(module.socket, name, _checking(name, at, getattr(module.socket, name)))


def _checking(name: str, at: int, method: Callable[..., Any]) -> Callable[..., Any]:
    def checked(self: Any, *arguments: Any) -> Any:
        address = arguments[at] if len(arguments) > max(at, 0) else None
        if isinstance(address, tuple):
            _check_address(name, self.family, address)
        return method(self, *arguments)

    checked.__name__ = checked.__qualname__ = name
    return checked


_CHECKS: dict[str, tuple[Callable[[str, tuple[Any, ...]], None], str]] = {
    "socket.connect": (_audit_socket, "connect"),
    "socket.bind": (_audit_socket, "bind"),
    "socket.sendto": (_audit_socket, "sendto"),
    "socket.sendmsg": (_audit_socket, "sendmsg"),
    "socket.getaddrinfo": (_audit_host, "look-up"),
    "socket.gethostbyname": (_audit_host, "look-up"),
    "socket.gethostbyaddr": (_audit_host, "look-up"),
    "socket.getnameinfo": (_audit_name, "look-up"),
    "socket.__new__": (_audit_new, ""),
}


def _hook(event: str, arguments: tuple[Any, ...], find: Callable[[str], Any] = _CHECKS.get) -> None:
    """Called for every import, open and so on, of which a start has thousands: others than sockets return at once."""
    found = find(event)
    if found is not None:
        found[0](found[1], arguments)


def _check_address(what: str, family: int, address: Any) -> None:
    import socket

    if family == socket.AF_UNIX:
        return
    if family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple) and len(address) >= 2:
        _check_host(f"{what} to", address[0], f" port {address[1]}")
    else:
        raise _refused(f"{what} to", repr(address))


def _check_host(what: str, host: Any, rest: str = "") -> None:
    if not is_loopback(host):
        raise _refused(what, f"{host!r}{rest}")


def _refused(what: str, where: str) -> NetworkRefused:
    return NetworkRefused(f"{what} {where} was refused: mlx-ppo lets nothing leave this machine")


def is_loopback(host: object) -> bool:
    """Whether a host, by name or number, is this machine's loopback: 127.0.0.0/8, ::1, localhost."""
    import ipaddress

    if isinstance(host, bytes | bytearray):
        host = bytes(host).decode("ascii", "replace")
    if not isinstance(host, str):
        return False
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # also what only the C library reads as a number: "127.1", ""
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
