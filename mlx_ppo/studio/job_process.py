"""The parent of a job's command: keeps its exit status, passes on what asks it to stop, outlives the page's server.

Run by its path with a job's folder; the folder's `job.json` has the command. Needs the standard library only.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType


def main(folder: Path) -> None:
    """Start the command, wait for it, and write how it ended."""
    command = json.loads((folder / "job.json").read_text("utf-8"))["command"]
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    _write(folder / "process.json", {"parent": os.getpid(), "command": child.pid})
    if asked:
        child.send_signal(asked[0])
    _write(folder / "status.json", {"status": child.wait()})


def _write(path: Path, value: dict[str, int]) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value), "utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
