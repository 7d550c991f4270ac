"""Bringing tensors to the device without making the host wait."""

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.core.records import InputError


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on `device`; the host continues while the copy is under way.

    A GPU copies behind the host's back only from memory that is pinned: from any other, the host waits for
    what the GPU has still to do.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # what is pinned already stays where it is
    return tensor.to(device, non_blocking=True)


def pin(memory: npt.NDArray[Any]) -> None:
    """Lock memory that Python has mapped, so that a GPU copies from it behind the host's back.

    Raises:
        InputError: if the driver refuses.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if status := int(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)):
        raise InputError(
            f"CUDA cannot pin {memory.nbytes:,} bytes of memory (error {status}): make room in it, or"
            " lower global_batch or use more ranks"
        )


def unpin(memory: npt.NDArray[Any]) -> None:
    """Undo `pin`, before the memory is given back."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(memory.ctypes.data)
