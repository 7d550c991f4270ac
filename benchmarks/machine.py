"""What every benchmark says about where it ran."""

import os
import platform


def machine() -> str:
    """Processor, cores that this process may use, and Python."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
            name = models[0] if models else name
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
