"""How many floating-point operations the matrix products of a run's phases take, by tracing the run's own functions.

These are the "model FLOPs" of Chowdhery et al. 2022, arXiv:2204.02311, appendix B: rows that gradient checkpointing
computes again don't count; every response counts with its own prompt and through whole blocks, also where a pass reads
a prompt once for several, or leaves out a part of the last block that nobody reads.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_ppo.compute.kv_cache import FULL, new_caches, size_caches
from mlx_ppo.memory.phases import Accountant, Cost
from mlx_ppo.memory.simulator import Product, products
from mlx_ppo.models.heads import RewardModel
from mlx_ppo.models.roles import Roles
from mlx_ppo.runs.plan_file import Choices

PREFILL, DECODE = "rollout prefill", "rollout decode"
_ALL = 1 << 30  # positions of the head at once, so that one chunk is all there is
_NAMES = {"prefill": PREFILL, "policy": "update policy", "critic": "update critic"}


class Step(NamedTuple):
    """A decoding step of some rows in the middle of their responses."""

    flops: int
    read: int  # bytes of what its products read: weights, keys and values, activations


def flops(found: Iterable[Product]) -> int:
    """Multiplications and additions of products."""
    return sum(product.flops for product in found)


def flops_of(accountant: Accountant, choices: Choices) -> dict[str, int]:
    """Operations of an iteration's products by phase, for prompts and responses of the accountant's lengths.

    Decoding is counted without a response's first token, which reading the prompt predicts. Keys are the phases of
    `runtime.phases`, but "rollout prefill" and "rollout decode"; phases without products are left out.
    """
    config, shapes = accountant.config, accountant.shapes
    one = _Counter(accountant)
    with read_by_mlx(accountant.roles):  # the same products, where a trace sees them
        one.phases(Choices(1, 1, 1, checkpointing=False, positions=_ALL, kv_cache=choices.kv_cache))
    responses = config.rollout.prompts * config.rollout.samples_per_prompt
    found = {}
    for name, count in one.found.items():
        passes = config.ppo.epochs if name.startswith("update") else 1
        found[name] = count * passes * (config.rollout.prompts if name == PREFILL else responses)
    return found | {DECODE: (shapes.response - 1) * responses * decoding(accountant, 1).flops}


def decoding(accountant: Accountant, rows: int) -> Step:
    """What the products of a decoding step of some rows take, half-way through their responses."""
    trunk = accountant.roles.trunk
    length = accountant.shapes.prompt + accountant.shapes.response // 2

    def read(tokens: mx.array, *more: mx.array) -> list[mx.array]:
        caches = new_caches(trunk.model, FULL, rows)
        size_caches(caches, length + 1)
        found = []
        with trunk.using(accountant.policy):
            for part in (tokens, *more):
                found.append(trunk.logits(trunk.hidden(part, caches)[:, -1]))
        return found

    before = products(read, mx.zeros((rows, length), mx.int32))
    after = products(read, mx.zeros((rows, length), mx.int32), mx.zeros((rows, 1), mx.int32))
    return Step(flops(after) - flops(before), _bytes_read(after) - _bytes_read(before))


def _bytes_read(found: Iterable[Product]) -> int:
    return sum(product.read for product in found)


@contextmanager
def read_by_mlx(roles: Roles) -> Iterator[None]:
    """No kernels of this project for the length of a `with` block."""
    models = [source.scorer.trunk for source in roles.sources if isinstance(source.scorer, RewardModel)]
    critics = [roles.critic.trunk] if roles.critic is not None else []
    before = {trunk: trunk.capabilities for trunk in (roles.trunk, *critics, *models)}
    try:
        for trunk, capabilities in before.items():
            trunk.capabilities = capabilities._replace(rows=False)
        yield
    finally:
        for trunk, capabilities in before.items():
            trunk.capabilities = capabilities


class _Counter(Accountant):
    """Counts operations of products instead of predicting memory: those of one response, by phase."""

    def __init__(self, other: Accountant) -> None:
        shapes = other.shapes._replace(responses=1, distinct=1, minibatch=1)
        super().__init__(other.config, other.roles, other.policy, other.critic, shapes)
        self.found: dict[str, int] = {}

    def _predict(self, key: tuple[object, ...], function: Callable[..., Any], *arrays: Any) -> Cost:
        name = str(key[0])
        if name != "step":
            name = _NAMES.get(name, name)
            self.found[name] = self.found.get(name, 0) + flops(products(function, *arrays))
        return Cost()
