"""Damaged and odd TOML, and odd `--set`: a run that can be planned, or one line that names the file."""

from functools import cache
from importlib import resources

import pytest

from pipeline import catalog
from pipeline.core.records import ConfigError
from tests.faults.fuzzing import COUNTS, Case, fuzz, outcome_of
from tests.helpers.mutations import mutate

# What can stand behind `=` and is no setting, or one of a kind that nobody expects.
_VALUES = (
    "[" * 20_000, "{a = " * 20_000, "[" * 300 + "]" * 300, "9" * 5000, "-" + "9" * 400, "1e999", "nan",
    "-inf", "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", '"\\u0000"', '"a\\u0000b"', '"\\ud800"',
    '"\\U0010ffff"', '""', "[]", "{}", "true", "0", "-1", "0.5", '"*"', '"^.*$"', '"s5://nowhere/x"',
    '"../../.."', "[[[]]]", "{a = {}}", "18446744073709551616", "0x7fffffffffffffff", "[1, 'a', {}]",
    "'''\n'''", '"\\u001b[31m"',
)  # fmt: skip
_KEYS = ("run.folder", "run.processes", "stage1.epochs", "model.name", "corpus.kind", "corpus", "a.b.c.d")


@cache
def seeds() -> list[str]:
    recipes = resources.files("pipeline") / "recipes"
    shipped = sorted(entry.name for entry in recipes.iterdir() if entry.name.endswith(".toml"))
    return [(recipes / name).read_text("utf-8") for name in shipped]


def _odd(text: str, case: Case) -> str:
    """The text with one of its values replaced by an odd one."""
    lines = text.splitlines()
    places = [number for number, line in enumerate(lines) if "=" in line.partition("#")[0]]
    at = case.rng.choice(places)
    lines[at] = f"{lines[at].partition('=')[0]}= {case.rng.choice(_VALUES)}"
    return "\n".join(lines)


def judge(case: Case) -> str:
    path = case.folder / "run.toml"
    text, sets = seeds()[case.number % len(seeds())], list[str]()
    if case.rng.random() < 0.4:
        path.write_bytes(mutate(text.encode(), case.rng))
    elif case.rng.random() < 0.8:
        path.write_text(_odd(text, case), encoding="utf-8")
    else:
        path.write_text(text, encoding="utf-8")
        sets = [f"{case.rng.choice(_KEYS)}={case.rng.choice(_VALUES)}"]

    def load() -> None:
        try:
            catalog.load(str(path), sets)
        except ConfigError as error:
            # What is wrong in --set is named by that; the file's name is not needed then.
            raise ConfigError(f"{path}: {error}" if sets else str(error)) from None

    return outcome_of(load, path)


@pytest.mark.parametrize("count", COUNTS)
def test_odd_settings_are_read_or_refused(count: int) -> None:
    found = fuzz(judge, count)
    assert found["refused"] > count // 4
