"""Energy that the machine has used, from the counters that it shows: RAPL of the processor, NVML of GPUs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RAPL = "/sys/class/powercap"
UNKNOWN = (
    f"this machine shows no energy counter (RAPL needs read access to {RAPL}, NVML a GPU and nvidia-ml-py)"
)


@dataclass(frozen=True, slots=True)
class Counter:
    """An energy counter that wraps around at `most` joules."""

    name: str
    read: Callable[[], float]  # joules
    most: float


def counters(root: str = RAPL) -> list[Counter]:
    """Return the counters of all processor packages and GPUs that this process may read."""
    found = list[Counter]()
    for folder in sorted(Path(root).glob("intel-rapl:*")):
        if folder.name.count(":") != 1:  # a package's parts are in the package
            continue
        path = folder / "energy_uj"
        try:
            int(path.read_text())
            most = int((folder / "max_energy_range_uj").read_text()) / 1e6
        except (OSError, ValueError):
            continue
        found.append(Counter(f"RAPL {folder.name}", lambda path=path: int(path.read_text()) / 1e6, most))  # type: ignore[misc]
    try:
        import pynvml

        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            found.append(
                Counter(
                    f"NVML {number}",
                    lambda handle=handle: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,  # type: ignore[misc]
                    float("inf"),
                )
            )
    except Exception:  # no module, no driver, or a GPU without a counter
        pass
    return found


class Meter:
    """Measures joules of the whole machine between start and `joules`."""

    def __init__(self, found: list[Counter]) -> None:
        self._counters = found
        self._start = [counter.read() for counter in found]

    def joules(self) -> float | None:
        """Return the joules since the start; None without counters."""
        if not self._counters:
            return None
        total = 0.0
        for counter, before in zip(self._counters, self._start, strict=True):
            used = counter.read() - before
            total += used if used >= 0 else used + counter.most
        return total
