"""What mlx's ring writes on standard error when another process is lost, taken out of what a person reads.

It prints lines of its own, "[ring] Receiving from socket 7 failed with errno 104", piece by piece and from threads of
its own, also in the middle of a program's last line. What they mean is said by `ProcessLost`.

Source: mlx 0.32.4, mlx/distributed/utils.h, `log_info`.
"""

import os
import threading
from contextlib import suppress
from typing import IO

_MARK = b"[ring]"


class RingLines:
    """Takes out lines that begin as the ring's do; everything else goes on at once, half a line too."""

    def __init__(self) -> None:
        """A line begins."""
        self._begun = b""  # of a line, as long as it may be one of the ring's
        self._inside = False  # a line that isn't
        self._dropping = False

    def rest(self, chunk: bytes) -> bytes:
        """What of the next bytes isn't the ring's."""
        passed = []
        for piece in chunk.splitlines(keepends=True) if chunk else ():
            passed.append(self._piece(piece))
        return b"".join(passed)

    def end(self) -> bytes:
        """What was held back, now that nothing comes any more."""
        held, self._begun = self._begun, b""
        return held

    def _piece(self, piece: bytes) -> bytes:
        whole = piece.endswith((b"\n", b"\r"))
        if not self._inside and not self._dropping:
            self._begun += piece
            if self._begun.startswith(_MARK):
                self._dropping = True
            elif not whole and _MARK.startswith(self._begun):
                return b""
            else:
                self._inside = True
            piece, self._begun = self._begun, b""
        passed = b"" if self._dropping else piece
        if whole:
            self._inside = self._dropping = False
        return passed


class Relay:
    """A pipe whose bytes go on to a descriptor, without the ring's lines, until nobody writes into it any more."""

    def __init__(self, source: IO[bytes], target: int) -> None:
        """Begin."""
        self._source, self._target = source, target
        self._thread = threading.Thread(target=self._run, name="standard error", daemon=True)
        self._thread.start()

    def end(self, seconds: float) -> None:
        """Wait for the last bytes; what was started by the writer and goes on may hold the pipe."""
        self._thread.join(seconds)

    def _run(self) -> None:
        lines = RingLines()
        while chunk := os.read(self._source.fileno(), 1 << 16):
            self._write(lines.rest(chunk))
        self._write(lines.end())
        self._source.close()

    def _write(self, unsent: bytes) -> None:
        with suppress(OSError):  # nobody reads standard error any more
            while unsent:
                unsent = unsent[os.write(self._target, unsent) :]
