"""Compares a JSON document with the keys that are documented for it."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.cli.documents import KEYS


def check_keys(command: str, document: Mapping[str, Any]) -> None:
    """Assert that every key of a document is documented, and every documented one is there.

    A key below a list that is empty, or below an object that is null, cannot be there.
    """
    documented = set(KEYS[command])
    found = set(_paths(document, "", documented))
    assert found <= documented, found - documented
    empty = {path for path, value in _values(document, "") if value in (None, [], {})}
    for path in documented - found:
        above = [path[: path.index(mark)] for mark in ("[]", "{}") if mark in path]
        parents = {path.rpartition(".")[0].removesuffix("[]"), *above}
        assert parents & empty, path


def _paths(value: Any, path: str, documented: set[str]) -> Iterator[str]:
    """Yield the paths of all keys; names under one that is documented with {} are data."""
    if isinstance(value, Mapping):
        for name, below in value.items():
            key = f"{path}.{name}" if path else name
            if f"{key}{{}}" in documented:
                yield f"{key}{{}}"
                continue
            yield key
            yield from _paths(below, key, documented)
    elif isinstance(value, list):
        for below in value:
            yield from _paths(below, f"{path}[]", documented)


def _values(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, value
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from _values(below, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for below in value:
            yield from _values(below, f"{path}[]")
