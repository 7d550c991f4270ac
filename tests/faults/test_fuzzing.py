"""The fuzz helper detects tracebacks, hangs, floods of memory and ended processes."""

import os
import time
from pathlib import Path

import pytest

from pipeline.core.records import InputError
from tests.faults import fuzzing
from tests.faults.fuzzing import Case, fuzz, outcome_of


def good(case: Case) -> str:
    path = case.folder / "file"
    path.write_bytes(case.rng.randbytes(2))

    def read() -> None:
        if path.read_bytes()[0] < 128:
            raise InputError(f"{path}: begins with a small byte: give another")

    return outcome_of(read, path)


def raises(case: Case) -> str:
    if case.number == 2:
        raise RecursionError("too deep")
    return "read"


def hangs(case: Case) -> str:
    if case.number == 2:
        time.sleep(60)
    return "read"


def floods(case: Case) -> str:
    if case.number == 2:
        assert len(bytearray(os.urandom(1 << 20) * (64 if case.number else 1))) > 0
    return "read"


def ends(case: Case) -> str:
    if case.number == 2:
        os._exit(7)
    return "read"


def names_nothing(case: Case) -> str:
    def read() -> None:
        raise InputError("something is wrong somewhere")

    return outcome_of(read, case.folder / "file")


def test_the_same_seed_gives_the_same_cases(tmp_path: Path) -> None:
    found = fuzz(good, 40, seed=1)
    assert found == fuzz(good, 40, seed=1)
    assert set(found) == {"read", "refused"}


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (raises, "RecursionError: too deep"),
        (hangs, "no end within 1 s"),
        (floods, "MB of memory"),
        (ends, "status 7"),
        (names_nothing, "does not name file"),
    ],
    ids=["raises", "hangs", "floods", "ends", "names_nothing"],
)
def test_a_fault_is_named_with_its_case(
    judge: fuzzing.Judge, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "SECONDS_A_CASE", 1.0)
    monkeypatch.setenv("CNCLIP_FUZZ_BYTES_A_CASE", str(32 << 20))
    with pytest.raises(AssertionError, match=said) as raised:
        fuzz(judge, 4, seed=0)
    assert f"case 0/{0 if judge is names_nothing else 2}:" in str(raised.value)
