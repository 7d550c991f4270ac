"""Turn what a run on a GPU machine left into records: a file of benchmarks/results, and shares of a step.

    python -m benchmarks.gpu.records out     after a run; out/ has results.jsonl
    python -m benchmarks.gpu.records a b     the same of several runs, the later ones in place of the earlier

It writes benchmarks/results/gpu_<device>.json with the machine and the commit of this tree, and prints
where a step's time goes. Results of a CPU are left out: they only stand in for a GPU's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from training.flops import find_device

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {
    "matmul": "products",
    "convolution": "products",
    "attention": "attention",
}  # all else is memory-bound
# What tells the lines of one step apart
KEYS = (
    "step",
    "name",
    "shape",
    "dtype",
    "kind",
    "backend",
    "workers",
    "model",
    "precision",
    "batch",
    "micro_batch",
    "variant",
)
SHARES = ("products", "attention", "memory-bound", "host", "idle")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, nargs="+", help="the folders that runs wrote")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    lines = latest(
        json.loads(line)
        for out in options.out
        for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    )
    print(shares_table(lines))
    try:
        machine, kept = records_of(lines)
    except ValueError as error:
        print(f"error: {', '.join(map(str, options.out))}: {error}", file=sys.stderr)
        return 1
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    device = re.sub(r"[^a-z0-9]+", "_", machine.partition(",")[0].lower())
    target = options.results / f"gpu_{device}.json"
    body = {
        "commit": commit,
        "machine": machine,
        "results": kept,
        "shares": shares_of(lines),
        "observed": observed(lines),
    }
    target.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {target}")
    return 0


def latest(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the last of the lines that measured the same thing, in the order of the first."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for line in lines:
        found[_device(line), *(line.get(key) for key in KEYS)] = line
    return list(found.values())


def observed(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what has no peer: the machine's ceilings, checks, rates."""
    return [
        dict(line) for line in lines if "ours" not in line and not str(line["name"]).startswith("profile/")
    ]


def records_of(lines: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Return the machine, and its results that were measured on a GPU, without their step and machine.

    Raises:
        ValueError: if there are none, or results of several GPUs.
    """
    kept = [line for line in lines if {"name", "ours", "unit"} <= line.keys() and _device(line) is not None]
    devices = {_device(line) for line in kept}
    if not kept:
        raise ValueError("no result of a known GPU; run the step `steps`, `loss` or `encode` on one")
    if len(devices) > 1:
        raise ValueError(f"results of {' and '.join(map(str, sorted(devices, key=str)))}; give those of one")
    return str(kept[0]["machine"]), [
        {key: value for key, value in line.items() if key not in ("step", "machine")} for line in kept
    ]


def _device(line: Mapping[str, Any]) -> str | None:
    """Return the GPU that a result's machine begins with."""
    name = str(line.get("machine", "")).partition(",")[0]
    return name if find_device(name) is not None else None


def shares_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the shares of a profiled step's time by model.

    products, attention and memory-bound: kernels; idle: gaps between kernels; host: before the first kernel
    and after the last, when the device has nothing to do.
    """
    found = {str(line["name"]): line for line in lines if str(line.get("name")).startswith("profile/")}
    shares: dict[str, dict[str, float]] = {}
    for name, whole in found.items():
        kinds = found.get(f"{name}/ms a step")
        if kinds is None:
            continue
        wall = float(whole["ms_profiled"])
        spent = dict.fromkeys(SHARES, 0.0)
        for kind, milliseconds in kinds.items():
            if kind not in ("name", "step"):
                spent[GROUPS.get(kind, "memory-bound")] += float(milliseconds)
        spent["idle"] = float(whole["idle_ms_inside"])
        spent["host"] = max(0.0, wall - float(whole["busy_ms"]) - spent["idle"])
        shares[name.removeprefix("profile/")] = {key: round(value / wall, 3) for key, value in spent.items()}
    return shares


def shares_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return `shares_of` as a Markdown table."""
    rows = [f"| model | {' | '.join(SHARES)} |", f"| --- |{' --- |' * len(SHARES)}"]
    for model, shares in shares_of(lines).items():
        rows.append(f"| {model} | {' | '.join(f'{100 * shares[key]:.0f}%' for key in SHARES)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
