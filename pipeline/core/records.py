"""The records that pass between stages: frozen, slotted, each with one JSON form."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self, TypeVar

from annotated_types import Ge, Lt

from pipeline.core.files.sealed import seal, unseal
from pipeline.core.terminal import one_line

SCHEMA_VERSION = 1
Count = Annotated[int, Ge(0), Lt(2**63)]
Seconds = Annotated[float, Ge(0), Lt(math.inf)]
_NO_OTHER_KEYS: Mapping[str, Any] = {"extra": "forbid"}  # pydantic's name for keys that a class does not have


class _OneLine(Exception):
    """An error whose text is always one line, whatever its names and values contain."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class InputError(_OneLine):
    """Bad input data: one line that names the file, the row or key, what was found and what to do."""

    exit_status = 1
    rows_left: int | None = None  # set by `too_few`
    is_outage: bool = False  # set by `pipeline.core.failures.outage`


class ConfigError(_OneLine):
    """Wrong usage or configuration: one line that names the file, the key and the remedy."""

    exit_status = 2
    rows_left: int | None = None  # set by `too_few`


_Error = TypeVar("_Error", InputError, ConfigError)


def too_few(error: _Error, rows_left: int) -> _Error:
    """Mark an error as caused by a small corpus, so that the runner adds where its rows went."""
    error.rows_left = rows_left
    return error


class Stopped(_OneLine):
    """A signal stopped the work; finished parts are kept, and the same command resumes."""

    exit_status = 143  # a shell's status for a process that SIGTERM ended


class DropReason(str):
    """Why a row was dropped: a stable code, sometimes with a detail after a colon (`blacklist:advertising`).

    Drop tables, receipts and the funnel contain codes, so a published code never changes its meaning.
    """

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of samples that a stage published."""

    path: str  # relative to the stage's folder in a manifest; absolute or a URL once resolved
    num_samples: Count
    num_bytes: Count
    digest: str  # sha256 of the bytes, hex
    __pydantic_config__: ClassVar = _NO_OTHER_KEYS


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one task did; published after the task's outputs, so its existence vouches for them.

    `num_in = num_kept + Σ dropped` is checked at construction. `seconds` is for people and never
    part of a digest.
    """

    stage: str
    task: str
    inputs_digest: str
    config_digest: str
    outputs: tuple[Shard, ...]
    num_in: Count
    num_kept: Count
    dropped: Mapping[str, Count]
    seconds: Seconds
    extra: Mapping[str, Any] = field(default_factory=dict)  # small facts for the report, deterministic
    also: str = ""  # sha256, hex, of the listing of further files next to the receipt; empty: no listing
    __pydantic_config__: ClassVar = _NO_OTHER_KEYS

    def __post_init__(self) -> None:
        if self.num_in != self.num_kept + sum(self.dropped.values()):
            raise ValueError(
                f"receipt {self.stage}/{self.task}: {self.num_in} rows in, but {self.num_kept} kept"
                f" + {sum(self.dropped.values())} dropped"
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1, sort_keys=True)

    def to_file(self) -> str:
        """Return the content of its file: the sealed JSON form."""
        return seal(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the receipt that a text holds.

        Raises:
            ValueError: if the text holds anything else.
        """
        receipt: Self = _parse(cls, text)
        _check_paths(receipt.outputs)
        return receipt


@dataclass(frozen=True, slots=True)
class Manifest:
    """A finished stage: the sum of its receipts.

    Its existence marks the stage as complete; it contains no timestamps.
    """

    stage: str
    schema_version: int
    config_digest: str
    inputs_digest: str  # of all its tasks: what the stage read
    parents: Mapping[str, str]  # stage → digest of that stage's manifest
    shards: tuple[Shard, ...]
    num_in: Count
    num_kept: Count
    dropped: Mapping[str, Count]
    extra: Mapping[str, Any] = field(default_factory=dict)
    __pydantic_config__: ClassVar = _NO_OTHER_KEYS

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1, sort_keys=True)

    def to_file(self) -> str:
        """Return the content of its file: the sealed JSON form."""
        return seal(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the manifest that a text holds.

        Raises:
            ValueError: if the text holds anything else.
        """
        manifest: Self = _parse(cls, text)
        _check_paths(manifest.shards)
        return manifest


def _parse(cls: Any, text: str | bytes) -> Any:
    return _adapter(cls).validate_json(json.dumps(unseal(text)), strict=True)


@functools.cache
def _adapter(cls: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(cls)


def _check_paths(files: Iterable[Shard]) -> None:
    """Refuse a file outside the stage's folder, where no stage writes.

    Raises:
        ValueError: for such a file.
    """
    for file in files:
        if file.path.startswith("/") or "\0" in file.path or ".." in file.path.split("/"):
            raise ValueError(f"{file.path!r}: not a path in a stage's folder")


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """Unit-norm vectors on disk with their origin."""

    ids: str  # path of the Parquet file with the ids, in row order
    vectors: str  # path of the .npy file, float32 [num_rows, dim]
    num_rows: int
    dim: int
    model_digest: str
    preprocessing_digest: str
