"""The device that a training runs on."""

import torch

from perturbflow.errors import InputError


def accelerator(device: str) -> str:
    """Return Lightning's word for a device.

    Raises
    ------
    InputError
        If this machine lacks the device.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available[device]:
        raise InputError(f"device: '{device}' is configured but not available here; set device: auto or cpu.")
    return device
