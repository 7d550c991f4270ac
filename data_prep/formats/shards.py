"""Shards as files: cutting rows into shards, writing one, and finding those of a finished corpus."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import polars as pl

from data_prep.formats.parquet import write_table
from data_prep.formats.tar import TarWriter
from pipeline.core import store
from pipeline.core.facts import Facts
from pipeline.core.records import InputError, Manifest, Shard
from pipeline.core.shard_format import SIDECAR_COLUMNS, TAR, ByteRangePool, sidecar_of
from pipeline.core.stage import Context, Outcome, repair_remedy

_INTERNAL = (
    "file", "row", "tar", "source_sha256", "stored_width_px", "stored_height_px",
    "picture_at", "image_signature",
)  # fmt: skip
_REPAIR_DOWNLOAD = repair_remedy("download")

Part = Literal["train", "validation"]  # of a corpus that [split] divides


@dataclass(frozen=True, slots=True)
class CorpusShard:
    """One shard of a finished corpus, with full paths."""

    tar: str
    table: str  # its sidecar
    num_samples: int
    digest: str  # of the tar and the sidecar, as their manifest has them


def corpus_shards(folder: str) -> list[CorpusShard]:
    """Return the shards of a corpus in order.

    `folder` holds them with their manifest, or has them in `shards/`.

    Raises:
        InputError: if there is no manifest (not finished, or not ours) or a tar has no sidecar in it.
    """
    for place in (folder, store.join(folder, "shards")):
        path = store.join(place, "manifest.json")
        if store.exists(path):
            return _in_manifest(place, path)
    raise InputError(
        f"{folder}: no manifest.json here or in shards/; give the folder of finished shards, or of their run"
    )


def _in_manifest(folder: str, path: str) -> list[CorpusShard]:
    try:
        manifest = Manifest.from_json(store.read_text(path))
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path}: not a manifest of shards; give the folder of finished shards") from None
    files = {shard.path: shard for shard in manifest.shards}
    tars = [shard for shard in manifest.shards if shard.path.endswith(TAR)]
    if not tars:
        raise InputError(f"{path}: names no tar (stage {manifest.stage}); give the folder of finished shards")
    found = []
    for tar in tars:
        name = sidecar_of(tar.path)
        if name not in files:
            raise InputError(f"{path}: {tar.path} has no sidecar {name}; give shards made by this project")
        found.append(
            CorpusShard(
                store.join(folder, tar.path),
                store.join(folder, name),
                tar.num_samples,
                f"{tar.digest}:{files[name].digest}",
            )
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece(Facts):
    """Some rows of a table."""

    table: str
    first: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole(Facts):
    """A finished tar in the folder of another stage, which becomes a shard as it is."""

    tar: str
    digest: str
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask(Facts):
    """The rows of one shard; `part` says of which part of a corpus that is split.

    `whole` is the tar that has all of them, if their bytes need not be written again.
    """

    pieces: Sequence[Piece]
    part: Part | None = None
    whole: Whole | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        whole = fields.get("whole")
        return cls(
            pieces=[Piece.from_json(piece) for piece in fields["pieces"]],
            part=fields.get("part"),
            whole=Whole.from_json(whole) if whole else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFacts(Facts):
    """What a shard's tar has besides its samples."""

    unlisted: int = 0  # samples in the tar that are not in the sidecar: later stages dropped them

    @classmethod
    def total(cls, manifest: Manifest) -> int:
        """Return the number of such samples in all shards of a manifest."""
        return sum(cls.from_json(extra).unlisted for extra in manifest.extra.values())


def cut(tables: Sequence[Shard], samples_per_shard: int) -> Iterator[list[Piece]]:
    """Yield for each shard the pieces of these tables' rows, in order.

    Every shard has `samples_per_shard` rows but the last.
    """
    total = sum(table.num_samples for table in tables)
    starts = [0]
    for table in tables:
        starts.append(starts[-1] + table.num_samples)
    position = 0  # the table that holds the shard's first row: a shard looks at no table before it
    for first in range(0, total, samples_per_shard):
        end = min(first + samples_per_shard, total)
        while starts[position + 1] <= first:
            position += 1
        pieces, number = [], position
        while number < len(tables) and starts[number] < end:
            low, high = max(first, starts[number]), min(end, starts[number + 1])
            if low < high:
                begin = starts[number]
                pieces.append(Piece(table=tables[number].path, first=low - begin, count=high - low))
            number += 1
        yield pieces


def write_shard(
    context: Context,
    name: str,
    rows: pl.DataFrame,
    path_of: Callable[[str], str],
    remedy: str = _REPAIR_DOWNLOAD,
) -> Outcome:
    """Publish `<name>.tar` and its sidecar from rows that say where their images are.

    `rows` has the sidecar's columns, of which offset_bytes and size_bytes are places in the file that
    `path_of(tar)` names.

    Raises:
        InputError: if an image is not whole in its file; the text ends with `remedy`.
    """
    with store.publish(context.path(name + TAR)) as temporary, contextlib.ExitStack() as stack:
        writer = stack.enter_context(TarWriter(temporary))
        sources = stack.enter_context(ByteRangePool(path_of, remedy=remedy))
        places = []
        for key, tar, offset, size, sha256, caption in rows.select(
            "key", "tar", "offset_bytes", "size_bytes", "image_sha256", "caption"
        ).iter_rows():
            data = sources.read(tar, offset, size, f"{key}.jpg")
            places.append(writer.add(f"{key}.jpg", data))
            if places[-1].sha256 != sha256:
                raise InputError(f"{path_of(tar)}: the bytes at {offset} are not {key}.jpg; {remedy}")
            writer.append(f"{key}.txt", caption.encode("utf-8"))
    offsets = pl.Series("offset_bytes", [place.offset_bytes for place in places], dtype=pl.Int64)
    return _published(context, name, rows.with_columns(offsets), writer.sha256)


def adopt_shard(
    context: Context, name: str, rows: pl.DataFrame, whole: Whole, tar: str, remedy: str = _REPAIR_DOWNLOAD
) -> Outcome:
    """Publish the finished tar at `tar` as `<name>.tar`, under a second name, and a sidecar of some samples.

    The sidecar is the mask: what it does not list, no reader of shards sees. On a disk the tar is read once,
    to compare it with its digest; an object store copies it by itself.

    Raises:
        InputError: if the tar has other bytes; the text ends with `remedy`.
    """
    if store.is_local(tar) and store.digest_file(tar) != whole.digest:
        raise InputError(f"{tar}: not the bytes that were written; {remedy}")
    store.link(tar, context.path(name + TAR))
    return _published(context, name, rows, whole.digest, whole.num_samples - rows.height)


def _published(context: Context, name: str, rows: pl.DataFrame, digest: str, unlisted: int = 0) -> Outcome:
    """Publish the sidecar of a shard whose tar is there, and return what the task did."""
    tar_path, table_path = name + TAR, sidecar_of(name + TAR)
    carried = [column for column in rows.columns if column not in SIDECAR_COLUMNS and column not in _INTERNAL]
    table_digest = write_table(rows.select(*SIDECAR_COLUMNS, *carried), context.path(table_path))
    return Outcome(
        {tar_path: rows.height, table_path: rows.height},
        num_in=rows.height,
        num_kept=rows.height,
        extra=ShardFacts(unlisted=unlisted).to_json() if unlisted else {},
        digests={tar_path: digest, table_path: table_digest},
    )
