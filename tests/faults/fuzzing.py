"""Runs a judge over many damaged inputs in a separate process: tracebacks, hangs and floods are faults.

A judge is a module-level function `judge(case: Case) -> str`. It makes the input that `case.rng` leads to
below `case.folder` (empty, gone after the case), gives it to the product, and returns one word for what
became of it:

    def judge(case: Case) -> str:
        path = case.folder / "features.npy"
        path.write_bytes(mutate(seed_array(), case.rng))
        return outcome_of(lambda: open_features(str(path)), path)

    @pytest.mark.parametrize("count", COUNTS)
    def test_damaged_features_are_refused_or_read(count: int) -> None:
        found = fuzz(judge, count)
        assert set(found) == {"read", "refused"}

The same number of cases and the same seed give the same inputs. CNCLIP_FUZZ_SEED chooses other inputs,
CNCLIP_FUZZ_CASES another number of them.
"""

import contextlib
import importlib
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from pipeline.core.records import ConfigError, InputError

# `make test` takes a few hundred cases of each kind, `make test-slow` ten thousand others.
COUNTS = [pytest.param(300, id="some"), pytest.param(10_000, id="many", marks=pytest.mark.slow)]
SECONDS_A_CASE = 10.0
SECONDS_TO_START = 180.0  # imports, on a machine that is busy with other tests
BYTES_A_CASE = int(os.environ.get("CNCLIP_FUZZ_BYTES_A_CASE", 2 << 30))
_CEILING_BYTES = 6 << 30  # what the process may map at all, so that a flood does not take the machine down
_MOST_FAULTS = 10


@dataclass(frozen=True, slots=True)
class Case:
    """One input to make and to judge."""

    number: int
    rng: random.Random
    folder: Path


Judge = Callable[[Case], str]


def outcome_of(read: Callable[[], object], path: Path) -> str:
    """Return `read`, or `refused` if the product's own error ended it.

    Raises:
        AssertionError: if that error is no clear line that names the file.
    """
    try:
        read()
    except (InputError, ConfigError) as error:
        text = str(error)
        assert path.name in text, f"the error does not name {path.name}: {text}"
        assert "\n" not in text, f"an error of several lines: {text}"
        assert len(text) < 2000, f"an error of {len(text)} characters: {text[:200]}"
        return "refused"
    return "read"


def fuzz(judge: Judge, count: int, seed: int | None = None) -> Counter[str]:
    """Judge `count` cases; return how often each outcome was seen.

    Raises:
        AssertionError: names every case that raised, took more than SECONDS_A_CASE or BYTES_A_CASE, or ended
            the process.
    """
    count = int(os.environ.get("CNCLIP_FUZZ_CASES", count))
    if seed is None:
        seed = int(os.environ.get("CNCLIP_FUZZ_SEED", count))  # some and many are other inputs
    name = f"{judge.__module__}:{judge.__qualname__}"
    found, faults, begin = Counter[str](), list[str](), 0
    while begin < count and len(faults) < _MOST_FAULTS:
        ended = _run_child(name, seed, begin, count, found, faults)
        if ended is None:
            break
        begin, reason = ended
        faults.append(f"case {seed}/{begin}: {reason}")
        begin += 1
    assert not faults, f"{name}: {len(faults)} faults\n" + "\n".join(faults)
    assert found.total() == count
    return found


def _run_child(
    name: str, seed: int, begin: int, count: int, found: Counter[str], faults: list[str]
) -> tuple[int, str] | None:
    """Run cases until the last one, or until one that ends the process: its number and how it ended."""
    command = [sys.executable, "-m", "tests.faults.fuzzing", name, str(seed), str(begin), str(count)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-") as folder,
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [*command, folder], stdout=subprocess.PIPE, stderr=errors, cwd=root, env=environment
        ) as child,
    ):
        assert child.stdout is not None
        number, ready = begin, False
        try:
            for line in _lines(child.stdout, SECONDS_TO_START, SECONDS_A_CASE):
                if line is None:
                    return number, f"no end within {SECONDS_A_CASE if ready else SECONDS_TO_START:.0f} s"
                said = json.loads(line)
                if not ready:
                    ready = True
                    continue
                number = said["number"] + 1
                if "fault" in said:
                    faults.append(f"case {seed}/{said['number']}: {said['fault']}")
                    found["fault"] += 1
                    if len(faults) >= _MOST_FAULTS:
                        return None
                else:
                    found[said["outcome"]] += 1
        finally:
            child.kill()
        if number == count:
            return None
        status = child.wait()
        errors.seek(0)
        last = errors.read().decode(errors="replace").strip()[-600:]
        return number, f"the process ended with status {status}: {last}"


def _lines(stream: IO[bytes], first_s: float, then_s: float) -> Iterator[bytes | None]:
    """Lines of a pipe; None, and no more, once nothing came for `first_s` or, after a line, for `then_s`."""
    rest, limit_s = b"", first_s
    while select.select([stream], [], [], limit_s)[0]:
        chunk = os.read(stream.fileno(), 1 << 16)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        limit_s = then_s if lines else limit_s
        yield from lines
    yield None


def _serve(name: str, seed: str, begin: int, count: int, folder: Path) -> None:
    """Judge cases one after the other, and say what became of each on what was the standard output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the product prints is not an answer
    module, _, function = name.partition(":")
    judge: Judge = getattr(importlib.import_module(module), function)
    resource.setrlimit(resource.RLIMIT_DATA, (_CEILING_BYTES, _CEILING_BYTES))
    print(json.dumps({"ready": True}), file=answers)
    for number in range(begin, count):
        place = folder / str(number)
        place.mkdir()
        _forget_peak()
        before, said = _resident_bytes("VmRSS"), dict[str, object]()
        try:
            said["outcome"] = judge(Case(number, random.Random(f"{name}/{seed}/{number}"), place))
        except BaseException:
            said["fault"] = traceback.format_exc(limit=-6)
        if (taken := _resident_bytes("VmHWM") - before) > BYTES_A_CASE:
            said = {"fault": f"took {taken >> 20:,} MB of memory"}
        shutil.rmtree(place, ignore_errors=True)
        print(json.dumps({"number": number, **said}), file=answers)


def _forget_peak() -> None:
    with contextlib.suppress(OSError):  # a kernel without it counts the peak of the cases before, too
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _resident_bytes(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in status.splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    name, seed, begin, count, folder = sys.argv[1:]
    _serve(name, seed, int(begin), int(count), Path(folder))
