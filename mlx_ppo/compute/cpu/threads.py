"""How many threads OpenBLAS computes a product with.

Its threads wait for each other at every product. In small products a second one gains nothing, and where another
program needs a core all of them wait for the one that shares it: a rollout of the bundled example has then taken
minutes. So there is one thread, unless a model is large; then there are as many as other programs leave.

Sums come out in another order by another number of threads. So a run changes it at places that its plan keeps (see
`memory.keeping`); where nothing has to give the same bits a second time, it follows the load (see `news`).
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mlx_ppo.compute.cpu.blas import CHOSEN, PREFIX, VARIABLE, loaded_blas
from mlx_ppo.runtime.load import Load, left_by
from mlx_ppo.runtime.system import cores

_GAINING = 20_000_000  # parameters; measured: none at 1.7 million, a factor of 1.6 by the second thread at 135 million
_EVERY = 1.0  # seconds between two looks at the load


def given() -> int | None:
    """What the user's environment says; None where nothing does."""
    value = os.environ.get(VARIABLE, "")
    return int(value) if value.isdecimal() and int(value) and CHOSEN not in os.environ else None


def gaining(parameters: int, processes: int = 1) -> int:
    """As many as a model of this size gains from, in each of the processes that share the processors."""
    said = given()
    return said if said is not None else max(1, cores() // processes) if parameters >= _GAINING else 1


def current() -> int:
    """How many there are; 1 where OpenBLAS isn't loaded."""
    library = loaded_blas()
    return int(getattr(library, PREFIX + "openblas_get_num_threads")()) if library is not None else 1


def use(count: int) -> None:
    """Compute with so many from now on; 0 leaves them."""
    library = loaded_blas()
    if library is not None and count:
        getattr(library, PREFIX + "openblas_set_num_threads")(count)


def serve(parameters: int) -> None:
    """A model of this size has been loaded: as many as it gains from; where nobody chooses, as others leave."""
    most = gaining(parameters) if loaded_blas() is not None else 0
    if _chosen.get() is None and most > 1 and given() is None:
        _yielding.begin(max(current(), most))
    elif not _chosen.get():
        use(max(current(), most))


def news() -> list[str]:
    """In a line, what other programs have taken since this was asked last."""
    return _yielding.news()


@contextmanager
def choosing(count: int) -> Iterator[None]:
    """So many for the length of a `with` block, or what `use` says in it, whatever is loaded; then as before.

    Processes that share the processors would otherwise each load their models with threads for all of them.

    Args:
        count: threads; 0: as many as the models gain from that are or will be loaded, whatever others take.
    """
    most = _yielding.end()
    before, outer = current(), _chosen.set(count > 0)
    use(count or most)
    try:
        yield
    finally:
        _chosen.reset(outer)
        use(before)
        if most:
            _yielding.begin(most)


class _Yielding:
    """Threads that follow what other programs leave, from second to second, by a thread that looks."""

    def __init__(self) -> None:
        """Nobody looks yet."""
        self._most, self._taken = 0, 0.0  # processors that others took when there were too few
        self._ending, self._lock = threading.Event(), threading.Lock()

    def begin(self, most: int) -> None:
        """So many threads at most, from now on."""
        there, self._most = self._most, max(most, self._most)
        if not there:
            use(self._most)
            self._ending = threading.Event()
            threading.Thread(target=self._look, args=(self._ending,), name="load", daemon=True).start()

    def end(self) -> int:
        """The number stays as it is; how many there were at most, 0 if nobody looked."""
        with self._lock:
            self._ending.set()
            most, self._most = self._most, 0
        return most

    def news(self) -> list[str]:
        """Whether there were ever fewer."""
        taken, self._taken = self._taken, 0.0
        said = f"other programs kept up to {taken:.1f} of {cores()} processors busy: fewer threads computed meanwhile, "
        return [said + "which changes the last digits of numbers"] if taken else []

    def _look(self, ending: threading.Event) -> None:
        load, count = Load(), self._most
        while not ending.wait(_EVERY):
            others, load = load.others, Load()
            with self._lock:
                if ending.is_set():
                    return
                count = min(self._most, left_by(others, 1, now=count))
                if count < self._most:
                    self._taken = max(others, self._taken)
                use(count)


_chosen: ContextVar[bool | None] = ContextVar("chosen", default=None)  # whether a run says how many
_yielding = _Yielding()
