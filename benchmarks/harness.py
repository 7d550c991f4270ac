"""What every benchmark says about where it ran, and its clock."""

import os
import platform
import time


def machine(device: str = "cpu") -> str:
    """The accelerator, where it is one, then processor, cores that this process may use, and Python."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
            name = models[0] if models else name
    except OSError:
        pass
    host = f"{name}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    if device == "cpu":
        return host
    import torch

    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {host}"


def seconds(device: str = "cpu") -> float:
    """CPU seconds of this process, which other work on the machine does not stretch.

    On an accelerator: seconds by the clock, once it has done all that it was asked.
    """
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize(device)
    return time.perf_counter()
