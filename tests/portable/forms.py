"""The forms of a model that a Mac computes with."""

import mlx.core as mx

from mlx_ppo.models.trunk import Trunk

FORMS = ("float32", "bfloat16", "float16", "4-bit", "4-bit float16")  # 4-bit: with scales in bfloat16, or so


def dtype_of(form: str) -> str:
    """The setting `model.dtype`."""
    return form.removeprefix("4-bit").strip() or "bfloat16"


def is_quantised(form: str) -> bool:
    """Whether its matrices are in 4 bits."""
    return form.startswith("4-bit")


def rounded(trunk: Trunk) -> dict[str, mx.array]:
    """A model's own matrices in float32, the quantised ones written out, by the names of a model that isn't."""
    found: dict[str, mx.array] = {}
    for name, module in trunk.model.named_modules():
        if "scales" in module:
            wide = (module[part].astype(mx.float32) for part in ("scales", "biases"))
            settings = {"group_size": module.group_size, "bits": module.bits}
            found[f"{name}.weight"] = mx.dequantize(module["weight"], *wide, **settings)
    kept = {name: array for name, array in trunk.base.items() if array.dtype != mx.uint32}
    own = {name: array.astype(mx.float32) for name, array in kept.items()}
    return {name: array for name, array in own.items() if not name.endswith((".scales", ".biases"))} | found


def in_float32(trunk: Trunk, other: Trunk) -> Trunk:
    """The other trunk, in float32, with the weights of this one."""
    other.base = {**other.base, **rounded(trunk)}
    other.model.load_weights(list(other.base.items()))
    return other
