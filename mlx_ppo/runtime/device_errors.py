"""A GPU's own errors, as mlx raises them: what happened, and what helps.

Source: mlx 0.32, mlx/backend/metal/device.cpp (CommandEncoder::commit), metal/allocator.cpp, cuda/allocator.cpp and
cuda/utils.cpp, where the texts are made; the causes' names are Metal's and CUDA's. metal/device.cpp ends a command
buffer after MLX_MAX_OPS_PER_BUFFER operations, 20 to 50 by chip.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mlx_ppo.errors import ModelError


class DeviceFailure(NamedTuple):
    """What a GPU refused."""

    cause: str
    remedy: str


_SMALLER = "a smaller memory.budget_gb or rollout.max_tokens, or a quantised model"
_SHORTER = (
    "shorter work at a time (ppo.micro_batch, score.batch_size, rollout.batch_size), a sleeping display, or "
    "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 or MLX_MAX_OPS_PER_BUFFER=5 in the environment"
)
_KNOWN = (
    (r"\[METAL\].*(Insufficient Memory|OutOfMemory)", "the GPU was out of memory", _SMALLER),
    (r"\[METAL\].*Impacting ?Interactivity", "macOS ended the GPU's work because the display had to wait", _SHORTER),
    (r"\[METAL\].*(Timeout|Hang)", "the GPU's work took longer than macOS allows", _SHORTER),
    (r"\[METAL\] Command buffer execution failed", "the GPU's work failed", _SHORTER),
    (r"\[metal::malloc\] Resource limit", "more arrays at once than Metal allows", _SMALLER),
    (r"\[(metal::)?malloc\] Unable to allocate", "mlx could not allocate memory", _SMALLER),
    (r"\bcu\w+(\(.*\))? failed: .*out of memory", "the GPU was out of memory", _SMALLER),
    (r"\bcu[a-zA-Z]\w+(\(.*\))? failed: ", "the GPU's work failed", "a smaller plan, or a look at the driver's log"),
)


def device_failure(error: BaseException) -> DeviceFailure | None:
    """What an error of mlx says of the GPU; None for any other error."""
    if not isinstance(error, RuntimeError | ValueError | MemoryError):
        return None
    words = " ".join(str(error).split())
    for pattern, cause, remedy in _KNOWN:
        if re.search(pattern, words):
            return DeviceFailure(f"{cause} ({words[:160]})", f"what helps: {remedy}")
    return None


@contextmanager
def needing_gradients() -> Iterator[None]:
    """Say so where an operation has no gradient on the device, as some of mlx-lm's Metal kernels (RWKV-7, BitNet).

    Raises:
        ModelError: in place of what mlx raises. Source: mlx 0.32, mlx/primitives.cpp, Primitive::vjp.
    """
    try:
        yield
    except ValueError as error:
        found = re.search(r"\[Primitive::vjp\] Not implemented for (\w+)", str(error))
        if found is None:
            raise
        raise ModelError(
            f"the model can be used here but not trained: one of its operations ({found[1]}) has no gradient on this "
            "device; train another model, or this one on a CPU"
        ) from None
