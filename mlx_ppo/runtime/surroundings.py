"""What a process can reach, found without the guard of `mlx_ppo.runtime.offline`."""

import fcntl
import socket
import struct
import sys
from typing import NamedTuple

NOWHERE = ("192.0.2.1", 9)  # kept for documentation by RFC 5737: nobody's
_SIOCGIFFLAGS, _IFF_UP = 0x8913, 0x1  # Linux, netdevice(7)


class Surroundings(NamedTuple):
    """What was found."""

    up: list[str]  # interfaces that are up (Linux; the sandbox of macOS leaves them)
    refusal: str  # the system's answer to a datagram socket that is to have an address elsewhere; "" where it may

    @property
    def walled(self) -> bool:
        """Whether nothing can leave."""
        return not self.up and bool(self.refusal)


def look_round() -> Surroundings:
    """Ask the system; to give a datagram socket an address sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        names = [] if sys.platform == "darwin" else [name for _, name in socket.if_nameindex()]
        up = [name for name in names if _is_up(probe, name)]
        try:
            probe.connect(NOWHERE)
        except OSError as error:
            return Surroundings(up, str(error.strerror))
        return Surroundings(up, "")


def _is_up(probe: socket.socket, name: str) -> bool:
    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFFLAGS, struct.pack("16sh14x", name.encode(), 0))
    return bool(struct.unpack("16sh14x", answer)[1] & _IFF_UP)
