"""Child processes that never outlive the one that started them, and what asks them to stop."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1

# Ask a training run for a checkpoint and its end. SIGINT is Ctrl-C, which reaches all ranks of a terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however it ends (Linux; elsewhere a no-op).

    Without it a killed run leaves workers behind that write into folders the next run already uses.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
