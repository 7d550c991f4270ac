"""Memory of the host that a training state is copied into, to be written while training continues."""

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from training.model.transfer import pin, unpin

_BLOCK_BYTES = 1 << 28  # taken at once: each has to be pinned by itself
_ALIGNMENT_BYTES = 64


class HostMemory:
    """Holds one copy of each tensor by name, in the same place at every checkpoint.

    If a GPU computes, the memory is pinned, as copies are several times as fast then. Pinning takes long, and
    torch's own pinned memory rounds every tensor up to a power of two, hence blocks that stay.
    """

    def __init__(self) -> None:
        self._is_pinned = get_accelerator().device_name() == "cuda"
        self._blocks: list[npt.NDArray[Any]] = []
        self._used_bytes = 0  # of the last block
        self._held: dict[str, Tensor] = {}

    def copy(self, name: str, value: Tensor) -> Tensor:
        """Return a contiguous copy of a tensor, complete after `wait`; it overwrites the earlier one."""
        if name not in self._held:
            self._held[name] = self._place_for(value)
        return self._held[name].copy_(value.detach(), non_blocking=True)

    def wait(self) -> None:
        """Wait until all copies are there."""
        if self._is_pinned:
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Give the memory back; the copies must not be used any more."""
        self._held.clear()
        if self._is_pinned:
            for block in self._blocks:
                unpin(block)
        self._blocks.clear()

    def _place_for(self, value: Tensor) -> Tensor:
        num_bytes = value.numel() * value.element_size()
        if not self._blocks or self._used_bytes + num_bytes > self._blocks[-1].nbytes:
            block = np.frombuffer(mmap.mmap(-1, max(num_bytes, _BLOCK_BYTES)), dtype=np.uint8)
            if self._is_pinned:
                pin(block)
            self._blocks.append(block)
            self._used_bytes = 0
        place = self._blocks[-1][self._used_bytes : self._used_bytes + num_bytes]
        self._used_bytes += -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return torch.from_numpy(place).view(value.dtype).view(value.shape)
