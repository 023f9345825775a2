"""mlx's evaluator replayed on a traced graph: in which order it works, what it keeps, and how high memory goes.

Source: mlx 0.32, mlx/transforms.cpp (eval_impl) and mlx/backend/cpu (eval.cpp, encoder.h).
"""

from collections.abc import Callable, Collection, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Literal

from mlx_ppo.memory.simulator.graph import Graph, Operation, Pause, Tensor
from mlx_ppo.memory.simulator.late import TASKS_AHEAD, Late
from mlx_ppo.memory.simulator.primitives import evaluate
from mlx_ppo.memory.simulator.storage import Memory
from mlx_ppo.memory.simulator.trace import trace

_WIDTH = 20  # mlx's default of MLX_BFS_MAX_WIDTH
LIMIT_SPARE = 64  # a phase's limit is this share of itself higher than its peak, see `runtime.phases`
_PHASES = (0, 3, 7)  # pieces of work in the task that is open at the start: unknown, so the median of some


Within = Literal["forward", "backward"] | None


@dataclass(frozen=True, slots=True)
class Peak:
    """Memory of one evaluation, in bytes."""

    transient: int  # at the peak, above the arguments and captured constants
    output: int  # of that what stays: the results
    outside: int  # numpy's and the like, at their largest; mlx doesn't count them
    together: int  # the largest sum of mlx's and the outside bytes at one moment, above arguments and constants
    live: dict[tuple[int, ...], int]  # what was there at the peak, by shape
    ahead: int = 0  # more that is there while mlx, with `transient` as its limit, begins work before it waits


def named(peak: Peak, vocabulary: int, trained: Set[tuple[int, ...]]) -> dict[str, int]:
    """Bytes that were there at a peak, by kind; `trained` has the shapes of what gradients are taken by."""
    found = {"logits": 0, "attention scores": 0, "gradients": 0}
    for shape, size in peak.live.items():
        if shape and shape[-1] == vocabulary:
            found["logits"] += size
        elif len(shape) >= 4 and shape[-1] == shape[-2]:
            found["attention scores"] += size
        elif shape in trained:
            found["gradients"] += size
    rest = peak.transient - sum(found.values())
    return {"activations": rest, **found} if rest >= 0 else {"activations": peak.transient}


def predict(
    function: Callable[..., Any],
    *arrays: Any,
    sequential: bool = True,
    held: Collection[int] | None = None,
    thorough: bool = True,
    limited: bool = False,
) -> Peak:
    """The memory that evaluating a function would need; see `trace` for the arguments and `replay` for the rest.

    `limited`: find out too what a limit at the peak adds to it (`Peak.ahead`).
    """
    graph = trace(function, *arrays)
    peak = replay(graph, sequential=sequential, held=held, thorough=thorough)
    if not limited:
        return peak
    most = _Replay(graph, True, held, _PHASES[1], None, limit=peak.transient + peak.transient // LIMIT_SPARE).run()
    return replace(peak, ahead=max(0, most.transient - peak.transient))


def replay(
    graph: Graph,
    *,
    sequential: bool = True,
    held: Collection[int] | None = None,
    thorough: bool = True,
    within: Within = None,
) -> Peak:
    """Evaluate a graph's outputs together, as `mx.eval` does, without computing anything.

    Args:
        graph: from `trace`.
        sequential: with a memory limit that is always exceeded, so that mlx doesn't run ahead; False: with the
            default limit.
        held: positions of the arguments that the caller keeps, from 0; None: all. The others may be overwritten or
            freed, as a cache's old arrays are.
        thorough: take the median over some states in which mlx may be at the start; False: one of them, in a third of
            the time.
        within: the graph has a gradient of its own, and is evaluated in the middle of another's forward or backward
            pass, where mlx keeps more.
    """
    phases = _PHASES if thorough else _PHASES[1:2]
    peaks = [_Replay(graph, sequential, held, phase, within).run() for phase in phases]
    return sorted(peaks, key=lambda peak: peak.transient)[len(peaks) // 2]


class _Replay:
    """The state between evaluations of parts of one graph."""

    def __init__(
        self,
        graph: Graph,
        sequential: bool,
        held: Collection[int] | None,
        phase: int,
        within: Within,
        *,
        limit: int = 0,
    ) -> None:
        self.graph = graph
        self.sequential = sequential
        self.inside: dict[int, Peak] = {}  # what nested graphs need
        self.memory = Memory()
        self.memory.work = phase
        self.late = Late(self.memory, 0 if sequential else TASKS_AHEAD)
        self.outside = 0
        for position, argument in enumerate(graph.arguments):
            for tensor in argument:
                self.memory.resident(tensor, held=held is None or position in held)
        for tensor in graph.constants:
            self.memory.resident(tensor, held=True)
        self.start = self.memory.active
        if limit:  # bytes of what comes and goes up to which mlx begins work without waiting
            self.late.limit = self.start + limit
        for operation in graph.operations:
            for tensor in operation.inputs:
                self.memory.of(tensor).uses += 1
        for tensor in graph.outputs:
            self.memory.of(tensor).uses += 1
        self.within = within
        self.gradient = any(pause.gradients for pause in graph.pauses)
        self.retained = _dependent(graph) if self.gradient else set()
        self.kept: list[Operation] = []  # to the end of the tracing, because the gradient may need them
        self.held: set[Operation] | None = None  # in the backward pass: as long as their results live

    def run(self) -> Peak:
        """Evaluate everything."""
        for pause in self.graph.pauses:
            self.leave(pause)
        for pause in reversed(self.graph.pauses):
            self.leave_for_gradient(pause)
        self.finish()
        return self.result()

    def leave(self, pause: Pause) -> None:
        """Evaluate what code outside of mlx reads, one after the other, then let it work."""
        for tensor in pause.reads:
            self._run([tensor])
        self._work_inside(pause.inside[0], "forward")
        self._work_outside(pause.work[0], pause.arrays[0])
        self._receive(pause.result)

    def leave_for_gradient(self, pause: Pause) -> None:
        """The same in the backward pass, where mlx keeps everything that led to an array for as long as it lives."""
        if self.held is None:
            self.held, self.retained = set(), set(self.graph.operations)
        for operation in pause.gradients:
            self._run([tensor for tensor in operation.inputs if not _is_filling(tensor)])
        if pause.gradients:
            self._work_inside(pause.inside[1], "backward")
            self._work_outside(pause.work[1], pause.arrays[1])
        for operation in pause.gradients:
            self._receive(operation, new=True)

    def finish(self) -> None:
        """Evaluate the outputs; whatever only the tracing of the gradient had kept goes first.

        Within another gradient it doesn't go, and in a backward pass mlx keeps all that leads to the outputs.
        """
        if self.within == "backward":
            self.held, self.retained = self.held or set(), set(self.graph.operations)
        else:
            self.retained = set()
        if self.within is None:
            while self.held:
                self._detach(self.held.pop())
            for operation in self.kept:
                self._detach(operation)
        self._run(self.graph.outputs)

    def result(self) -> Peak:
        """What has been seen."""
        memory = self.memory
        self.late.finish()
        return Peak(
            transient=memory.peak - self.start,
            output=memory.active - self.start,
            outside=self.outside,
            together=memory.together - self.start,
            live=memory.at_peak(),
        )

    def _work_inside(self, inside: tuple[Graph, int] | None, where: Within) -> None:
        if inside is None:
            return
        graph, beside = inside
        within = where if self.gradient and any(pause.gradients for pause in graph.pauses) else None
        if id(graph) not in self.inside:
            self.inside[id(graph)] = replay(graph, sequential=self.sequential, thorough=False, within=within)
        peak, memory = self.inside[id(graph)], self.memory
        memory.reach(beside + peak.transient)
        memory.together = max(memory.together, memory.active + beside + peak.together)
        self.outside = max(self.outside, peak.outside)

    def _work_outside(self, nbytes: int, arrays: int) -> None:
        self.outside = max(self.outside, nbytes)
        self.memory.reach(arrays)
        self.memory.together = max(self.memory.together, self.memory.active + nbytes)

    def _receive(self, operation: Operation, *, new: bool = False) -> None:
        """Put an array there, come from outside; `new`: it doesn't know what it was made of."""
        made = operation.outputs[0]
        self.memory.fresh(made)
        self.memory.of(made).evaluated = True
        if operation in self.retained and not new:
            self.kept.append(operation)
        else:
            self._detach(operation)

    def _run(self, wanted: Sequence[Tensor]) -> None:
        for operation in _order(self.memory, wanted):
            self._evaluate(operation)
        self.late.finish()

    def _evaluate(self, operation: Operation) -> None:
        memory = self.memory
        keeping = operation in self.retained
        memory.may_donate = not keeping
        evaluate(memory, operation)
        for tensor in operation.outputs:
            memory.of(tensor).evaluated = True
        self.late.add(operation)
        if keeping and self.held is not None:
            self.held.add(operation)
        elif keeping:
            self.kept.append(operation)
        else:
            self._detach(operation)
        self.late.catch_up()

    def _detach(self, operation: Operation) -> None:
        """Let an evaluated operation go of its inputs, and those that led to nothing else with it."""
        waiting = [operation]
        while waiting:
            leaving = waiting.pop()
            for tensor in leaving.inputs:
                self.memory.drop_use(tensor)
                maker = tensor.operation
                if self.held and maker in self.held and not any(self.memory.of(t).uses > 0 for t in maker.outputs):
                    self.held.remove(maker)
                    waiting.append(maker)
            for tensor in leaving.outputs:
                self.memory.drop_if_unused(tensor)


def _dependent(graph: Graph) -> set[Operation]:
    """Operations that depend on the arguments: those that a gradient's tracing keeps."""
    reached = set(graph.inputs)
    found: set[Operation] = set()
    for operation in graph.operations:
        if any(tensor in reached for tensor in operation.inputs):
            reached.update(operation.outputs)
            found.add(operation)
    return found


def _is_filling(tensor: Tensor) -> bool:
    """Whether a gradient's stand-in reads zeros here, which the real code doesn't need."""
    return tensor.operation is None or tensor.operation.name in ("Full", "Broadcast")


def _order(memory: Memory, wanted: Sequence[Tensor]) -> Iterable[Operation]:
    """The order in which mlx evaluates: backwards from the results by breadth, in bands of limited width."""
    uses = _uses(memory, wanted)
    tape: list[Operation | None] = [None]
    stack: list[tuple[Operation | None, int]] = []
    at = 0
    while uses and (at < len(tape) or stack):
        if at < len(tape):
            operation, position = tape[at], 0
            at += 1
        else:
            operation, position = stack.pop()
        inputs = wanted if operation is None else operation.inputs
        for index in range(position, len(inputs)):
            maker = inputs[index].operation
            if maker is None or memory.of(inputs[index]).evaluated:
                continue
            if len(tape) - at >= _WIDTH:
                stack.append((operation, index))
                break
            uses[maker] -= 1
            if uses[maker] == 0:
                del uses[maker]
                tape.append(maker)
    return [operation for operation in reversed(tape) if operation is not None]


def _uses(memory: Memory, wanted: Sequence[Tensor]) -> dict[Operation, int]:
    """How often each operation's outputs are read on the way to the results."""
    uses: dict[Operation, int] = {}
    waiting: list[Sequence[Tensor]] = [wanted]
    while waiting:
        for tensor in waiting.pop():
            maker = tensor.operation
            if maker is None or memory.of(tensor).evaluated:
                continue
            if maker not in uses:
                waiting.append(maker.inputs)
            uses[maker] = uses.get(maker, 0) + 1
    return uses
