"""Frozen records with one JSON form that stages pass to each other in tasks, receipts and manifests."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pipeline.core.config import is_left_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Base of these records.

    A field that is None has no key in the JSON.
    """

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Build the record from plain values, ignoring unknown keys, which belong to other records."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in names})


def _plain(value: Any) -> Any:
    if isinstance(value, Facts):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        unset = [field.name for field in dataclasses.fields(value) if is_left_out(field, value)]
        return {name: item for name, item in dataclasses.asdict(value).items() if name not in unset}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
