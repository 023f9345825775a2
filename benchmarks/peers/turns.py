"""A worker's side of a comparison: it does one round when it is told to, and says what it measured.

Standard library only: workers run in the environments of the peers, too.
"""

import json
import os
import resource
import sys
import time
from typing import Any

_OUT = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # what a library prints is no answer


class Turns:
    """Rounds as the parent asks for them."""

    def __init__(self) -> None:
        self.order = json.loads(sys.argv[1])
        self.started = 0.0
        self.marks: dict[str, float] = {}
        self._mark = ("", 0.0)

    def wait(self) -> str:
        """Wait until it is this worker's turn; the task. Ends the process when there is none any more."""
        _say({"ready": peak_rss()})
        task = sys.stdin.readline()
        if not task:
            os._exit(0)
        self.started = time.monotonic()
        self.marks, self._mark = {}, ("", 0.0)
        return task.strip()

    def note(self, text: str) -> None:
        """A line for the log."""
        print(text, file=sys.stderr, flush=True)

    def phase(self, name: str) -> None:
        """A phase begins, and the one before it ends."""
        now = time.monotonic()
        if self._mark[0]:
            self.marks[self._mark[0]] = self.marks.get(self._mark[0], 0.0) + now - self._mark[1]
        self._mark = (name, now)

    def done(self, **figures: Any) -> None:
        """The round is over."""
        seconds = time.monotonic() - self.started
        self.phase("")
        _say({"seconds": seconds, "phases": self.marks, "peak_rss": peak_rss(), **figures})


def peak_rss() -> int:
    """Highest resident bytes of this process since it began (getrusage's ru_maxrss)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=_OUT, flush=True)
