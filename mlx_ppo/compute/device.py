"""Facts of the device on which mlx computes by default."""

import mlx.core as mx


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


def arrays_are_resident() -> bool:
    """Whether mlx's arrays count as resident memory of the process."""
    return kind() == "CPU"
