"""What work under way still holds.

Source: mlx 0.32, mlx/transforms.cpp (eval_impl) and mlx/backend/cpu (eval.cpp, encoder.h).
"""

from collections import deque

from mlx_ppo.memory.simulator.graph import Operation
from mlx_ppo.memory.simulator.storage import Buffer, Memory

_PIECES = 10  # pieces of work in a task; mlx waits for whole tasks
TASKS_AHEAD = 10  # tasks that may be under way


class Late:
    """Buffers that work under way still holds: mlx hands it out ahead, and waits for whole tasks only."""

    def __init__(self, memory: Memory, ahead: int) -> None:
        """Nothing is under way; `ahead` tasks may be."""
        self.memory = memory
        self.ahead = ahead * _PIECES
        self.limit = 0
        self.pending: deque[tuple[int, list[Buffer]]] = deque()

    def add(self, operation: Operation) -> None:
        """Hold what an operation reads, and its temporaries, until its work is done."""
        memory = self.memory
        memory.work += 1
        own = memory.buffer(operation.outputs[0])
        holding = [memory.buffer(tensor) for tensor in (*operation.inputs, *operation.outputs[1:])]
        holding = [buffer for buffer in dict.fromkeys(holding) if buffer is not own]
        for buffer in holding:
            buffer.references += 1
        self.pending.append((memory.work, holding + memory.temporaries))
        memory.temporaries = []

    def catch_up(self) -> None:
        """Let go of what mlx has waited for: where there is a limit above, a task more until it is kept."""
        begun = self.memory.work // _PIECES * _PIECES
        if not self.limit:
            self._until(begun - self.ahead)
            return
        self._until(begun - TASKS_AHEAD * _PIECES)
        while self.memory.active > self.limit and self.pending and self.pending[0][0] <= begun:
            self._until(-(-self.pending[0][0] // _PIECES) * _PIECES)

    def finish(self) -> None:
        """Wait for everything."""
        self._until(self.memory.work)

    def _until(self, done: int) -> None:
        while self.pending and self.pending[0][0] <= done:
            for buffer in self.pending.popleft()[1]:
                self.memory.release(buffer)
