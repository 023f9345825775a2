"""The address of a server on this machine, as somebody writes it."""

import re
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import urlsplit

_ASK = "/chat/completions"
_EXAMPLE = "write it like http://127.0.0.1:8080/v1"


class Address(NamedTuple):
    """Where a server is that speaks OpenAI's protocol."""

    host: str  # a loopback address, as a number
    port: int
    path: str  # under which its addresses lie, without "/" at the end

    def __str__(self) -> str:
        """As it is written."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.path}"


def parse_address(text: str) -> Address:
    """An address such as `http://127.0.0.1:8080/v1`; without a path, `/v1` is meant.

    Only the loopback address is accepted: 127.0.0.0/8, ::1, and `localhost`, which stands for 127.0.0.1; no name is
    ever looked up.

    Raises:
        ValueError: it is something else; the text says what and the mend.
    """
    shown = text if len(text) <= 100 else text[:100] + "…"
    try:
        found = urlsplit(text)
        port = found.port
    except ValueError as error:
        raise ValueError(f"{shown!r} isn't an address ({error}); {_EXAMPLE}") from None
    if found.scheme != "http" or not found.hostname:
        why = "nothing leaves this machine, so there is no TLS; " if found.scheme == "https" else ""
        raise ValueError(f"{shown!r} isn't an http address; {why}{_EXAMPLE}")
    host = "127.0.0.1" if found.hostname == "localhost" else found.hostname
    if not _is_loopback(host):
        raise ValueError(f"{found.hostname[:100]!r} isn't this machine's loopback address; {_EXAMPLE}")
    if "@" in found.netloc or "?" in text or "#" in text:
        raise ValueError(f"{shown!r} has a password, '?' or '#' in it; {_EXAMPLE}")
    if not port:
        raise ValueError(f"{shown!r} has no port; {_EXAMPLE}")
    path = found.path.rstrip("/").removesuffix(_ASK)
    if not re.fullmatch(r"[A-Za-z0-9._~/-]*", path) or text != text.strip():
        raise ValueError(f"{shown!r} has characters that no such address has; {_EXAMPLE}")
    return Address(host, port, path or "/v1")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback and "%" not in host
    except ValueError:  # a name, or what only the C library reads as a number, such as "127.1"
        return False
