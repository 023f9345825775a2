"""Ports for machines that this one plays."""

import errno
import secrets
import socket

_PORTS = range(10_000, 32_000)  # below those that Linux (32768) and macOS (49152) begin to give to whoever connects


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at just now.

    None of those that systems give to whoever connects: a process that connects to such a port before anybody listens
    there can be given this very port for its own end, and is then connected with itself.
    """
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < count:
            sockets.append(socket.socket())
            try:
                sockets[-1].bind(("127.0.0.1", secrets.choice(_PORTS)))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                sockets.pop().close()
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
