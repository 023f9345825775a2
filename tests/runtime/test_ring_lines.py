"""What the ring says is taken out of standard error, and nothing else."""

import os
import subprocess
import sys

import pytest

from mlx_ppo.runtime.ring_lines import Relay, RingLines

SAID = (
    b"warning: a\n[ring] Receiving from socket 7 failed with errno 104\n  [ring]\n[rin\n[\n\n[ring]\nlast [ring] half"
)
LEFT = b"warning: a\n  [ring]\n[rin\n[\n\nlast [ring] half"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_the_rings_lines_go_however_they_come(size: int) -> None:
    lines = RingLines()
    found = b"".join(lines.rest(SAID[at : at + size]) for at in range(0, len(SAID), size))
    assert found + lines.end() == LEFT


def test_half_a_line_goes_on_at_once_and_what_was_held_back_comes_at_the_end() -> None:
    lines = RingLines()
    assert lines.rest(b"50 %\r60 %") == b"50 %\r60 %" and lines.rest(b" done\n[ri") == b" done\n"
    assert lines.end() == b"[ri"


def test_the_last_words_of_a_process_that_is_killed_come_through() -> None:
    code = "import os; os.write(2, b'[ring] Sending to socket 3\\nFatal: the end'); os.abort()"
    reading, writing = os.pipe()
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stderr is not None
        relay = Relay(process.stderr, writing)
        process.wait()
        relay.end(5.0)
    os.close(writing)
    with open(reading, "rb") as said:
        assert said.read().startswith(b"Fatal: the end")
