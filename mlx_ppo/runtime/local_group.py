"""A group of processes on this machine: started by the one that leads, over memory that all of them map.

They meet by pipes at every exchange, asleep. By these the leader also learns at once that one has died, and in time
that one hangs.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mlx_ppo.errors import ProcessLost
from mlx_ppo.runtime.child import Child, DiedError, GarbledError, HungError
from mlx_ppo.runtime.shared_memory import SharedMemory, new_memory

_STARTING = 120.0  # seconds
_LARGEST = 1 << 16  # bytes of a failure's text


@contextmanager
def local_group(
    worker: Path, order: dict[str, Any], *, processes: int, patience: float, key: str = ""
) -> Iterator[SharedMemory]:
    """Start the others, and end them.

    Args:
        worker: the file that they run, see `runtime.child`; it is given the order with what `followed` needs.
        order: what JSON has.
        processes: with this one.
        patience: seconds that one waits for another.
        key: of a configuration, which says that.
    Raises:
        ProcessLost: one doesn't start.
    """
    with ExitStack() as children_end:
        descriptor = new_memory(processes)
        children: list[Child] = []
        try:
            for rank in range(1, processes):
                given = json.dumps({**order, "rank": rank, "processes": processes, "memory": descriptor})
                children.append(Child(worker, [given], descriptors=(descriptor,)))
                children_end.callback(children[-1].end)
            names = ["this process", *_names(children)]
            group = SharedMemory(descriptor, 0, processes, lambda: _meet(children, patience, key), names)
            _meet(children, _STARTING)
        finally:
            os.close(descriptor)
        yield group


def followed(order: dict[str, Any], requests: int, answers: int) -> SharedMemory:
    """The group of a process that `local_group` has started, once all have come.

    Args:
        order: as it was given.
        requests: a line lets this process go on; it ends with the one that leads.
        answers: a line says that it has arrived where all meet.
    """

    def meet() -> None:
        os.write(answers, b'{"arrived": true}\n')
        if not os.read(requests, 64):
            os._exit(1)

    descriptor: int = order["memory"]
    group = SharedMemory(descriptor, order["rank"], order["processes"], meet)
    os.close(descriptor)
    meet()
    return group


def _meet(children: Sequence[Child], limit: float, key: str = "") -> None:
    """Wait until all have arrived, for so many seconds, which a key says, and let them go on."""
    deadline = time.monotonic() + limit
    for child, who in zip(children, _names(children), strict=True):
        try:
            answer = child.exchange(b"", max(0.0, deadline - time.monotonic()), largest=_LARGEST)
        except HungError:
            raise ProcessLost(
                f"{who} did not come within {limit:g} seconds{f' ({key})' if key else ''}: it hangs"
            ) from None
        except DiedError as error:
            raise ProcessLost(f"{who} is lost: {error}") from None
        except GarbledError:
            raise ProcessLost(f"{who} sent what nobody understands") from None
        if "arrived" not in answer:
            raise ProcessLost(f"{who} failed: {answer.get('failed', 'without a word')}")
    for child in children:
        child.tell(b"go\n")


def _names(children: Sequence[Child]) -> list[str]:
    return [f"process {at} of {len(children) + 1} (pid {child.pid})" for at, child in enumerate(children, start=2)]
