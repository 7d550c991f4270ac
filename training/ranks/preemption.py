"""Stopping on request: a signal asks, all ranks agree after a step, and a checkpoint is written.

While features of a cache are computed, they agree at the end of a shard.
"""

import signal
from types import FrameType

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist

from pipeline.core.processes import STOP_SIGNALS


class StopRequest:
    """Remembers a signal; Slurm sends one before the time limit and on pre-emption."""

    def __init__(self) -> None:
        self._received = 0

    @property
    def received(self) -> int:
        """The number of the signal that this rank has received; 0: none."""
        return self._received

    def is_asked(self) -> bool:
        """Return true if this rank has received a signal."""
        return self._received != 0

    def listen(self) -> None:
        """Install handlers for STOP_SIGNALS.

        Only the main thread may call this.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def close(self) -> None:
        """Ignore STOP_SIGNALS from here on, also while Python shuts down: nothing is left to interrupt."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def agreed(self) -> int:
        """Return the highest signal number that any rank received; 0: none.

        A collective: the signal reaches the ranks at different moments, so that one rank's own word is not
        enough. Between steps the number travels with the step's others instead.
        """
        highest = torch.tensor(self._received, device=get_accelerator().current_device_name())
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return int(highest)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number
