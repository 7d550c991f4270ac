"""Names the settings that differ between two configurations, down to one value inside a list of tables."""

from collections.abc import Iterator, Mapping
from typing import Any

Difference = tuple[str, Any, Any]  # dotted key, value before, value now


def differing(key: str, before: Any, now: Any) -> Iterator[Difference]:
    """Yield what differs inside two values of a setting; a missing key counts as None.

    Lists are compared as values, unless both hold tables: then the entries with the same number are compared,
    and a different count is a difference of its own.
    """
    if before == now:
        return
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in {**before, **now}:
            yield from differing(f"{key}.{name}", before.get(name), now.get(name))
    elif _are_tables(before) and _are_tables(now):
        for number, (one, other) in enumerate(zip(before, now, strict=False)):
            yield from differing(f"{key}[{number}]", one, other)
        if len(before) != len(now):
            yield key, _count(before), _count(now)
    else:
        yield key, before, now


def _are_tables(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)
    )


def _count(entries: list[Any]) -> str:
    return "1 entry" if len(entries) == 1 else f"{len(entries)} entries"
