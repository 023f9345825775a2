"""Facts of the device on which mlx computes by default."""

import os
import re

import mlx.core as mx

_TENSOR_UNITS = 17  # generation of Apple's GPUs from which on mlx multiplies in them


def kind() -> str:
    """One of CPU, Metal and CUDA."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def name() -> str:
    """What the device calls itself."""
    return str(mx.device_info().get("device_name", "unnamed"))


def working_set() -> int | None:
    """Bytes that Metal recommends to use; None on other devices.

    Source: mlx's documentation of `mx.device_info`, key max_recommended_working_set_size.
    """
    size = None if kind() == "CPU" else mx.device_info().get("max_recommended_working_set_size")
    return int(size) if size else None


def multiplies_coarsely() -> bool:
    """Whether float32 products are in TF32, with ten bits of mantissa, as on CUDA and on Metal from the M5 on.

    Source: mlx's documentation of MLX_ENABLE_TF32; mlx/backend/metal/device.h, `is_nax_available`.
    """
    if os.environ.get("MLX_ENABLE_TF32", "1") == "0" or kind() == "CPU":
        return False
    generation = re.search(r"g(\d+)", str(mx.device_info().get("architecture", "")))
    return kind() == "CUDA" or (generation is not None and int(generation[1]) >= _TENSOR_UNITS)


def arrays_are_resident() -> bool:
    """Whether mlx's arrays count as resident memory of the process."""
    return kind() == "CPU"
