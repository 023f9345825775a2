"""`python fuzz_worker.py TARGET COUNT SEED FOLDER`: fuzz one reader in this process, which may die of it.

The last input lies in FOLDER/last. Prints JSON: how many were tried and taken, the slowest, the growth of memory.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import mlx_ppo  # noqa: F401  before mlx

# isort: split
from hypothesis import HealthCheck, Phase, given, seed, settings

from mlx_ppo.errors import UserError

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "fuzzing"), str(TESTS), str(TESTS / "importing")]
SECONDS = 5  # of computing for one input
ROUND = 1000  # inputs
MEMORY = 1 << 30  # bytes above what the process has before


class HungError(BaseException):
    """One input took too long."""


def _hung(*_: object) -> None:
    raise HungError(f"an input took more than {SECONDS} s")


def main(name: str, count: int, number: int, folder: Path) -> dict[str, float]:
    """Try so many inputs."""
    from fuzz_targets import TARGETS

    target = TARGETS[name](folder)
    for content in (b"", b"{}", b"\0" + b"{}"):  # what is loaded at first use isn't the input's fault
        try_one(target.read, content)
    _limit_memory()
    signal.signal(signal.SIGVTALRM, _hung)
    found = {"tried": 0, "taken": 0, "slowest": 0.0}
    last = os.open(folder / "last", os.O_RDWR | os.O_CREAT)

    def fuzz(content: bytes) -> None:
        os.pwrite(last, content, 0)
        os.ftruncate(last, len(content))
        started = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            found["taken"] += try_one(target.read, content)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        found["tried"] += 1
        found["slowest"] = max(found["slowest"], time.process_time() - started)

    for start in range(0, count, ROUND):  # hypothesis remembers all that it drew
        options = settings(
            max_examples=min(ROUND, count - start),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
            phases=(Phase.generate, Phase.shrink),
        )
        seed(f"{number} {start}")(options(given(content=target.inputs)(fuzz)))()
    return {**found, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def try_one(read, content: bytes) -> bool:
    """Whether the input was taken; anything but a UserError of printable lines gets through."""
    try:
        read(content)
    except UserError as error:
        from fuzz_targets import check_lines

        check_lines(error)
        return False
    return True


def _limit_memory() -> None:
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        most = int(lines["VmSize"].split()[0]) * 1024 + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
