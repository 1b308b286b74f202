"""The compute capability of the default device."""

from typing import Any

import jax


def default_capability() -> float | None:
    """That of the default device; None if that is no NVIDIA GPU.

    The platform of a program is not always known when an implementation is chosen, nor
    are its devices: JAX may compile it for others.
    """
    config: Any = jax.config
    device = config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    found = getattr(device, "compute_capability", None)
    return float(found) if "NVIDIA" in device.device_kind and found else None
