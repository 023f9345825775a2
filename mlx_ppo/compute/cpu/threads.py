"""How many threads OpenBLAS computes a product with.

Its threads wait for each other at every product. In small products a second one gains nothing, and where another
program needs a core all of them wait for the one that shares it: a rollout of the bundled example has then taken
minutes. So there is one thread, unless a model is large; and a run changes their number as processors become free or
busy, with a note, because sums come out in another order (see `memory.keeping`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mlx_ppo.compute.cpu.blas import CHOSEN, PREFIX, VARIABLE, loaded_blas
from mlx_ppo.runtime.system import cores

_chosen: ContextVar[bool] = ContextVar("chosen", default=False)
_GAINING = 20_000_000  # parameters; measured: none at 1.7 million, a factor of 1.6 by the second thread at 135 million


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
    """A model of this size has been loaded: no fewer than it gains from, unless somebody else chooses."""
    if not _chosen.get():
        use(max(current(), gaining(parameters)))


@contextmanager
def choosing(count: int) -> Iterator[None]:
    """So many for the length of a `with` block, or what `use` says in it, whatever is loaded; then as before.

    Processes that share the processors would otherwise each load their models with threads for all of them.
    """
    before, outer = current(), _chosen.set(count > 0)
    use(count)
    try:
        yield
    finally:
        _chosen.reset(outer)
        use(before)
