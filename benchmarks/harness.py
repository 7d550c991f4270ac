"""Give every benchmark its options, clocks, rounds in turn, the facts of the machine, and its last line.

A script ends with `report(records)`: one JSON object (or a list of them) with the keys `name`, `ours`,
`peer`, `unit`, `ratio`, `equal` and `machine`. `ratio` above 1 means that ours is better. A unit with a slash
is a rate (images/CPU s): more is better. Of any other unit (s, MB) less is better.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Clock = Callable[[], float]


def parser(
    doc: str | None, *, full: str = "more rounds", rounds: tuple[int, int] | None = None, device: bool = False
) -> argparse.ArgumentParser:
    """Return a parser with --full; with --rounds if `rounds` (plain, full) is given; with --device."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--full", action="store_true", help=full)
    if rounds is not None:
        made.add_argument("--rounds", type=int, help=f"default: {rounds[0]}, with --full {rounds[1]}")
        made.set_defaults(default_rounds=rounds)
    if device:
        made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; refuse a GPU that PyTorch does not see."""
    options = made.parse_args()
    if "default_rounds" in options and options.rounds is None:
        options.rounds = options.default_rounds[options.full]
    if getattr(options, "device", "cpu") == "cuda":
        import torch

        if not torch.cuda.is_available():
            made.error("--device cuda: this PyTorch sees no GPU")
    return options


def machine(device: str = "cpu") -> str:
    """Return the GPU (if one is used), the processor, the cores of this process, and the versions."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
            name = models[0] if models else name
    except OSError:
        pass
    facts = [name, f"{len(os.sched_getaffinity(0))} cores", f"Python {platform.python_version()}"]
    torch = sys.modules.get("torch")
    if torch is not None:
        facts += [f"torch {torch.__version__}", f"{torch.get_num_threads()} threads"]
        if device != "cpu":
            facts.insert(0, torch.cuda.get_device_name(device))
    return ", ".join(facts)


def seconds(device: str = "cpu") -> float:
    """Return CPU seconds of this process, which other work on the machine does not stretch.

    On an accelerator: seconds by the clock, after it has finished all its work.
    """
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize(device)
    return time.perf_counter()


def unit_of_seconds(device: str = "cpu") -> str:
    """Return the unit of what `seconds` counts."""
    return "CPU s" if device == "cpu" else "s"


def in_turns(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Clock = seconds,
    after: Callable[[str], object] = lambda _: None,
) -> dict[str, list[float]]:
    """Return each side's seconds by round; the sides alternate, so that noise hits all alike.

    `after(side)` runs outside the time, before the next side.
    """
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            start = clock()
            run()
            taken[side].append(clock() - start)
            after(side)
    return taken


def medians(taken: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each side."""
    return {side: statistics.median(times) for side, times in taken.items()}


def significant(value: float) -> float:
    """Return a value with four significant digits, or as an integer from 1,000 on."""
    return round(value) if abs(value) >= 1000 else float(f"{value:.4g}")


def record(
    name: str,
    ours: float,
    peer: float | None,
    unit: str,
    *,
    equal: bool = True,
    device: str = "cpu",
    **more: Any,
) -> dict[str, Any]:
    """Return one result; `peer` is None if there is nothing to compare with, `more` adds further keys."""
    ratio = None if peer is None else ours / peer if "/" in unit else peer / ours
    return {
        "name": name,
        "ours": significant(ours),
        "peer": None if peer is None else significant(peer),
        "unit": unit,
        "ratio": None if ratio is None else significant(ratio),
        "equal": bool(equal),
        "machine": machine(device),
        **more,
    }


def line(found: Mapping[str, Any]) -> str:
    """Return a result as a line to read."""
    text = f"{found['name']:<28} ours {found['ours']}"
    if found["peer"] is not None:
        text += f", peer {found['peer']} {found['unit']}, ratio {found['ratio']:.2f}, equal {found['equal']}"
    else:
        text += f" {found['unit']}"
    return text


def report(records: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> int:
    """Print the last line of a benchmark; return its exit status: 1 if outputs are not equal."""
    print(json.dumps(records, ensure_ascii=False))
    several = [records] if isinstance(records, Mapping) else records
    return 0 if all(each["equal"] for each in several) else 1
