"""What the host wants to know of a step: it travels behind the step, and is read when the next one runs."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from training.model.transfer import send


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """Numbers of a finished step, equal on all ranks."""

    loss: float  # of the global batch
    is_skipped: bool  # it changed nothing: the loss or the gradient was not finite
    temperature: float  # the factor on cosines after it
    signal_number: int  # the highest that any rank had received by then; 0: none
    wait_seconds: float  # all waiting for data so far, of the rank that waited longest
    ended_at: float  # by time.monotonic()

    @property
    def skipped(self) -> str:
        """Why the step changed nothing; empty if it did."""
        if not self.is_skipped:
            return ""
        return "the gradient is not finite" if math.isfinite(self.loss) else f"the loss is {self.loss}"


class NumbersUnderWay:
    """Starts one small reduction over ranks and its way to the host; `read` waits for it.

    A collective. Read after the next step has begun, a GPU has work while the host learns what the last step
    did.
    """

    def __init__(
        self, loss: Tensor, is_skipped: Tensor, temperature: Tensor, signal_number: int, wait_seconds: float
    ) -> None:
        """Take scalars of the device; `temperature` is lower on ranks that do not know it."""
        found = torch.stack([loss.double(), is_skipped.double(), temperature.double()])
        own = torch.tensor([signal_number, wait_seconds], dtype=torch.float64)
        numbers = torch.cat([found, send(own, found.device)])
        # The signal reaches the ranks at different moments; all others wait for the rank that waits longest.
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        self._event: torch.cuda.Event | None = None
        self._posted_at, self._is_on_cpu = time.monotonic(), numbers.device.type == "cpu"
        if numbers.device.type == "cuda":
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._numbers = numbers

    def read(self) -> StepNumbers:
        """Wait until the step is finished, and return its numbers."""
        if self._event is not None:
            self._event.synchronize()
        loss, is_skipped, temperature, signal_number, wait_seconds = self._numbers.tolist()
        # A CPU had finished the step when its numbers were posted.
        ended_at = self._posted_at if self._is_on_cpu else time.monotonic()
        return StepNumbers(loss, bool(is_skipped), temperature, int(signal_number), wait_seconds, ended_at)
