"""What the download publishes of a partition: images in key order, their table, and the drops with reasons.

Images are img2dataset's of this call, or those of an earlier build (`data_prep.download.earlier`).
"""

import contextlib
import hashlib
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl

from data_prep.accounting.drop_table import HTTP_STATUS, drops_path, write_drops
from data_prep.accounting.judged import count_by_source
from data_prep.download import retry
from data_prep.download.reasons import LOST_BY_DOWNLOADER
from data_prep.download.retry import DownloadFacts, DownloadTask
from data_prep.formats.parquet import write_table
from data_prep.formats.tar import Place, TarWriter
from data_prep.rules.copies import Marks, marks_of
from pipeline.core import store
from pipeline.core.files.images import BadImageError, decode_pixels
from pipeline.core.records import DropReason, InputError
from pipeline.core.shard_format import ByteRangePool
from pipeline.core.stage import Context, Outcome, Task

# Where an earlier build has an image: path of the tar, place in it, digest.
_WHERE = ("at_tar", "at_offset_bytes", "at_size_bytes", "at_sha256")
_MARKS = dict.fromkeys(Marks._fields, pl.Binary)
_MARKS_SCHEMA = {"key": pl.String, **_MARKS}
# Rows that an earlier build knows: an image and where it is, or the reason why there is none.
KNOWN_SCHEMA = {
    "key": pl.String,
    "reason": pl.String,
    HTTP_STATUS: pl.Int16,
    "original_width_px": pl.Int32,
    "original_height_px": pl.Int32,
    "stored_width_px": pl.Int32,
    "stored_height_px": pl.Int32,
    "source_sha256": pl.String,
    **_MARKS,
    "at_tar": pl.String,
    "at_offset_bytes": pl.Int64,
    "at_size_bytes": pl.Int64,
    "at_sha256": pl.String,
}
# Of img2dataset's own table.
ANSWER_SCHEMA = {
    "sample_key": pl.String,
    "key": pl.String,
    "error_message": pl.String,
    "original_width": pl.Int32,
    "original_height": pl.Int32,
    "width": pl.Int32,
    "height": pl.Int32,
    "sha256": pl.String,
    **_MARKS,
}


def asked_rows(context: Context, task: Task) -> pl.DataFrame:
    """The rows of one partition, in key order; in a later pass those that are worth another try."""
    task_facts = DownloadTask.from_json(task.arguments)
    rows = pl.read_parquet(context.path_in("dedup", task_facts.path))
    if task_facts.drops is not None:
        again = (
            retry.worth_it(pl.scan_parquet(context.path_in("download", task_facts.drops)))
            .select("key")
            .collect()
        )
        rows = rows.join(again, on="key", how="semi", maintain_order="left")
    return rows


def pack(
    context: Context,
    task: Task,
    raw: Path,
    number: int | None,
    known: pl.DataFrame,
    unanswered: DropReason = LOST_BY_DOWNLOADER,
) -> Outcome:
    """Repack one img2dataset shard: samples in key order, kept rows with their facts, drops with reasons.

    The tar is a shard as training reads it, so that the shards stage need not write these bytes again.

    `number` is img2dataset's; None where it was asked for nothing. `known` has the rows that an earlier build
    knows (`KNOWN_SCHEMA`). `unanswered` is the reason of rows of which neither says anything.
    """
    asked = asked_rows(context, task)
    answers = pl.concat([_answers(raw, number), known], how="diagonal")
    rows = asked.join(answers, on="key", how="left", maintain_order="left").with_columns(
        reason=pl.when(pl.col("member").is_null() & pl.col("at_tar").is_null() & pl.col("reason").is_null())
        .then(pl.lit(str(unanswered)))
        .otherwise(pl.col("reason"))
    )
    tar_path = f"pictures/{task.name}.tar"
    places: dict[str, Place] = {}
    marks: dict[str, Marks] = {}  # of images from builds that did not keep them
    with store.publish(context.path(tar_path)) as temporary, contextlib.ExitStack() as stack:
        writer = stack.enter_context(TarWriter(temporary))
        read = _reader(raw, number, stack)
        is_marked = pl.all_horizontal(pl.col(*Marks._fields).is_not_null())
        given = rows.filter(pl.col("reason").is_null()).select(
            "key", "caption", is_marked.alias("is_marked"), "member", *_WHERE
        )
        for key, caption, has_marks, *where in given.iter_rows():
            data = read(key, *where)
            if data is not None and not has_marks:
                try:
                    marks[key] = marks_of(decode_pixels(data))
                except BadImageError:
                    data = None
            if data is not None:
                places[key] = writer.add(f"{key}.jpg", data)
                writer.append(f"{key}.txt", caption.encode("utf-8"))
    rows = _with_marks(rows, marks)
    is_lost = pl.col("reason").is_null() & ~pl.col("key").is_in(list(places))
    rows = rows.with_columns(
        reason=pl.when(is_lost).then(pl.lit(str(LOST_BY_DOWNLOADER))).otherwise(pl.col("reason"))
    ).drop("member", *_WHERE)
    kept = (
        rows.filter(pl.col("reason").is_null())
        .drop("reason", HTTP_STATUS, "width_px", "height_px")
        .rename({"original_width_px": "width_px", "original_height_px": "height_px"})
        .with_columns(
            pl.Series("offset_bytes", [place.offset_bytes for place in places.values()], dtype=pl.Int64),
            pl.Series("size_bytes", [place.size_bytes for place in places.values()], dtype=pl.Int64),
            pl.Series("image_sha256", [place.sha256 for place in places.values()], dtype=pl.String),
        )
    )
    table_path = f"pictures/{task.name}.parquet"
    table_digest = write_table(kept, context.path(table_path))
    failed = rows.filter(pl.col("reason").is_not_null())
    dropped = write_drops(failed, context.path(drops_path(task.name)))
    if number is not None:
        for path in (raw / "shards").glob(f"{number:05d}*"):
            path.unlink()
    return Outcome(
        {tar_path: kept.height, table_path: kept.height, drops_path(task.name): rows.height - kept.height},
        num_in=asked.height,
        num_kept=kept.height,
        dropped=dropped,
        extra=DownloadFacts(sources=count_by_source(kept, failed)).to_json(),
        digests={tar_path: writer.sha256, table_path: table_digest},
    )


def _with_marks(rows: pl.DataFrame, marks: Mapping[str, Marks]) -> pl.DataFrame:
    """Return the rows with the marks of those that had none, by key."""
    if not marks:
        return rows
    made = pl.DataFrame([(key, *found) for key, found in marks.items()], _MARKS_SCHEMA, orient="row")
    rows = rows.join(made, on="key", how="left", maintain_order="left", suffix="_made")
    both = [pl.coalesce(name, f"{name}_made").alias(name) for name in Marks._fields]
    return rows.with_columns(both).drop(f"{name}_made" for name in Marks._fields)


def _answers(raw: Path, number: int | None) -> pl.DataFrame:
    if number is None:
        answers = pl.DataFrame(schema=ANSWER_SCHEMA)
    else:
        answers = pl.read_parquet(raw / "shards" / f"{number:05d}.parquet")
    return answers.select(
        pl.col("sample_key").alias("key"),
        pl.col("key").alias("member"),
        *Marks._fields,
        reason=pl.col("error_message").str.split(": ").list.first(),
        http_status=pl.col("error_message").str.extract(r"^http_\w+: (\d{3})$").cast(pl.Int16),
        original_width_px="original_width",
        original_height_px="original_height",
        stored_width_px="width",
        stored_height_px="height",
        source_sha256="sha256",
    )


def _reader(raw: Path, number: int | None, stack: contextlib.ExitStack) -> Callable[..., bytes | None]:
    """Return what gives an image's bytes by its key and where it is; None if it is no longer whole there."""
    earlier = stack.enter_context(ByteRangePool(str))
    members: dict[str, tarfile.TarInfo] = {}
    if number is not None:
        path = raw / "shards" / f"{number:05d}.tar"
        source = stack.enter_context(tarfile.open(path))  # noqa: SIM115
        members = {member.name: member for member in source.getmembers()}

    def read(
        key: str,
        member: str | None,
        tar: str | None,
        offset: int | None,
        size: int | None,
        sha256: str | None,
    ) -> bytes | None:
        if tar is None or offset is None or size is None:
            file = source.extractfile(members[f"{member}.jpg"])
            assert file is not None
            return file.read()
        try:
            data = earlier.read(tar, offset, size, f"{key}.jpg")
        except InputError:
            return None
        return data if hashlib.sha256(data).hexdigest() == sha256 else None

    return read
