"""Bringing tensors to the device without making the host wait."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on `device`; the host continues while the copy is under way.

    A GPU copies behind the host's back only from memory that is pinned: from any other, the host waits for
    what the GPU has still to do.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # what is pinned already stays where it is
    return tensor.to(device, non_blocking=True)
