"""Pictures that are here already: Chinese-CLIP's TSV and LMDB, img2dataset's output, and a run's shards.

A pair becomes a row of a caption table with two addresses: `url`, what the row is known by, and `picture_at`,
where the loopback site finds the picture's bytes (`data_prep.site`), so that pictures from disk take the same
way through the resizer as those from the web. Formats: Chinese-CLIP's README, img2dataset's README.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode

import polars as pl

from data_prep.drop_table import write_table
from data_prep.site import HOST, PACKED
from data_prep.sources.convert import malformed_rows
from data_prep.sources.lmdb_files import open_lmdb, unpickle_plain
from data_prep.sources.table import TableSource
from data_prep.sources.text_file import MALFORMED_COLUMNS, Malformed, column_names, read_batches
from pipeline.records import DropReason, InputError

UNPAIRED = DropReason("unpaired")  # a text whose image_ids are empty: the pairing is unknown
IMAGE_MISSING = DropReason("image_missing")  # a text that names a picture which is not there
NOT_DOWNLOADED = DropReason("not_downloaded")  # img2dataset's own table says so
MALFORMED_PICKLE = DropReason("malformed:pickle")  # an LMDB pair that is not (image id, text id, text)
PICTURE_AT = "picture_at"

PackedKind = Literal["cn_clip_tsv", "cn_clip_lmdb", "img2dataset", "shards"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSource:
    """One `[[corpus.sources]]` entry whose pictures are on disk in a format of the ecosystem."""

    kind: PackedKind
    path: str  # local folder: of <split>_imgs.tsv, of lmdb/<split>, or of 00000.tar and 00000.parquet
    carry_columns: tuple[str, ...] = ()  # of shards: further columns of the sidecars to keep
    name: str
    split: str = "train"  # for Chinese-CLIP's formats
    exempt_from: tuple[str, ...] = ()  # rules that do not apply to this source


@dataclass(frozen=True, slots=True)
class Unpacked:
    """The caption table that a packed source became, and what was set aside."""

    source: TableSource
    num_rows: int
    dropped: dict[str, int]


def pieces(source: PackedSource) -> list[list[str]]:
    """Files of each task: the split's two, or one tar and its table. InputError where one is missing."""
    folder = Path(source.path)
    if source.kind == "cn_clip_tsv":
        files = [str(folder / f"{source.split}{suffix}") for suffix in ("_imgs.tsv", "_texts.jsonl")]
        _exist(source, files)
        return [files]
    if source.kind == "cn_clip_lmdb":
        root = folder / "lmdb" / source.split if (folder / "lmdb").is_dir() else folder / source.split
        files = [str(root / name / "data.mdb") for name in ("pairs", "imgs")]
        _exist(source, files)
        return [files]
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        what = "of a run's shards" if source.kind == "shards" else "of img2dataset's webdataset output"
        raise InputError(f"{source.path}: no .tar {what} (source {source.name})")
    found = [[str(tar), str(tar.with_suffix(".parquet"))] for tar in tars]
    for files in found:
        _exist(source, files)
    return found


def unpack(source: PackedSource, files: list[str], table_path: str, malformed_path: str) -> Unpacked:
    """Write one piece as a caption table with columns url, caption, picture_at."""
    read = {
        "cn_clip_tsv": _read_tsv,
        "cn_clip_lmdb": _read_lmdb,
        "img2dataset": _read_img2dataset,
        "shards": _read_shards,
    }
    rows, counts, malformed = read[source.kind](source, files)
    dropped = {str(reason): count for reason, count in counts.items()}
    with malformed_rows(malformed_path) as out:
        out.add(malformed)
    for reason, count in out.counts.items():
        dropped[reason] = dropped.get(reason, 0) + count
    write_table(rows, table_path)
    description = TableSource(
        path=table_path,
        name=source.name,
        url_column="url",
        caption_column="caption",
        carry_columns=(PICTURE_AT, *source.carry_columns),
        exempt_from=source.exempt_from,
    )
    return Unpacked(description, rows.height, {name: count for name, count in dropped.items() if count})


def _exist(source: PackedSource, files: list[str]) -> None:
    for path in files:
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file (source {source.name}, {source.kind}); correct its path")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _address(source: PackedSource, relative: str = "", **query: Any) -> str:
    return f"http://{HOST}/{PACKED}/{quote(source.name)}/{quote(relative)}?{urlencode(query)}"


def _known_by(source: PackedSource, image_id: object) -> str:
    return f"http://{HOST}/{PACKED}/{quote(source.name)}/{source.split}/{image_id}"


_Read = tuple[pl.DataFrame, dict[DropReason, int], list[Malformed]]


def _read_tsv(source: PackedSource, files: list[str]) -> _Read:
    places = dict(_tsv_places(files[0]))
    images = pl.DataFrame(
        {
            "image_id": list(places),
            "url": [_known_by(source, image_id) for image_id in places],
            PICTURE_AT: [
                _address(source, os.path.basename(files[0]), offset=offset, size=size, base64=1)
                for offset, size in places.values()
            ],
        },
        schema={"image_id": pl.Int64, "url": pl.String, PICTURE_AT: pl.String},
    )
    found = column_names(files[1])
    missing = {"text", "image_ids"} - set(found)
    if missing:
        raise InputError(f"{files[1]}: no column {', '.join(sorted(missing))}; found {', '.join(found)}")
    tables, malformed = [], []
    for batch in read_batches(files[1], ["text", "image_ids"]):
        malformed += batch.malformed
        is_list = pl.col("image_ids").str.contains(r"^\[[\d\s,\"-]*\]$").fill_null(False)
        for text in batch.rows.filter(~is_list)["text"]:
            malformed.append(Malformed(MALFORMED_COLUMNS, str(text)[:300]))
        tables.append(
            batch.rows.filter(is_list).select(
                caption="text", image_id=pl.col("image_ids").str.extract_all(r"-?\d+").cast(pl.List(pl.Int64))
            )
        )
    texts = pl.concat(tables)
    unpaired = texts.filter(pl.col("image_id").list.len() == 0).height
    pairs = texts.explode("image_id").drop_nulls("image_id")
    rows = pairs.join(images, on="image_id", how="inner", maintain_order="left")
    dropped = {UNPAIRED: unpaired, IMAGE_MISSING: pairs.height - rows.height}
    return rows.select("url", "caption", PICTURE_AT), dropped, malformed


def _tsv_places(path: str) -> Iterator[tuple[int, tuple[int, int]]]:
    """(image id, (offset, size)) of each picture's base64 text; a line that is none has no place."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            name, tab, encoded = line.partition(b"\t")
            if tab and name.strip().isdigit():
                yield int(name), (offset + len(name) + 1, len(encoded.rstrip(b"\r\n")))
            offset += len(line)


def _read_lmdb(source: PackedSource, files: list[str]) -> _Read:
    pairs_path, images_path = (os.path.dirname(path) for path in files)
    rows, malformed, missing = [], list[Malformed](), 0
    with (
        open_lmdb(pairs_path) as pairs,
        open_lmdb(images_path) as images,
        pairs.begin() as texts,
        images.begin(buffers=True) as pictures,
    ):
        count = texts.get(b"num_samples")
        if count is None or not bytes(count).isdigit():
            raise InputError(f"{pairs_path}: no num_samples; give a split's folder of Chinese-CLIP's LMDB")
        for number in range(int(count)):
            data = texts.get(str(number).encode()) or b""
            try:
                image_id, _, text = unpickle_plain(data)
                known = pictures.get(str(int(image_id)).encode()) is not None
            except Exception as error:  # a pickle can raise anything
                malformed.append(Malformed(MALFORMED_PICKLE, f"{number}: {error}"[:300]))
                continue
            if not known:
                missing += 1
                continue
            at = _address(source, os.path.relpath(images_path, source.path), lmdb=int(image_id))
            rows.append((_known_by(source, int(image_id)), str(text), at))
    schema = {"url": pl.String, "caption": pl.String, PICTURE_AT: pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row"), {IMAGE_MISSING: missing}, malformed


def _read_img2dataset(source: PackedSource, files: list[str]) -> _Read:
    tar_path, table_path = files
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(tar_path, "r:") as tar:  # never one that unpacks to whatever size
            for member in tar:
                stem, dot, extension = member.name.rpartition(".")
                if member.isfile() and dot and extension.lower() not in ("txt", "json"):
                    members[stem] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(
            f"{tar_path}: damaged ({_first_line(error)}); download this shard again or remove it"
        ) from None
    try:
        table = pl.read_parquet(table_path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{table_path}: cannot be read as a table: {str(error).splitlines()[0]}") from None
    missing = [name for name in ("url", "key", "status", "caption") if name not in table.columns]
    if missing:
        raise InputError(
            f"{table_path}: no column {', '.join(missing)}; found {', '.join(table.columns)}; give"
            f" img2dataset's output made with a caption column"
        )
    done = table.filter(pl.col("status") == "success")
    end = os.path.getsize(tar_path)
    places = pl.DataFrame(
        [
            (key, _address(source, os.path.basename(tar_path), offset=offset, size=size))
            for key, (offset, size) in members.items()
            if offset + size <= end  # a tar that was cut off ends inside its last picture
        ],
        schema={"key": pl.String, PICTURE_AT: pl.String},
        orient="row",
    )
    keyed = done.with_columns(pl.col("key").cast(pl.String))
    rows = keyed.join(places, on="key", how="inner", maintain_order="left")
    dropped = {NOT_DOWNLOADED: table.height - done.height, IMAGE_MISSING: done.height - rows.height}
    return rows.select("url", "caption", PICTURE_AT), dropped, []


def _read_shards(source: PackedSource, files: list[str]) -> _Read:
    """What a run has packed: addresses stay those of the web, and scores stay behind, to be made anew."""
    tar_path, table_path = files
    columns = ["url", "caption", "offset_bytes", "size_bytes", *source.carry_columns]
    try:
        table = pl.read_parquet(table_path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{table_path}: cannot be read as a table: {str(error).splitlines()[0]}") from None
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(
            f"{table_path}: no column {', '.join(missing)}; found {', '.join(table.columns)}; give the folder"
            f" of a run's shards"
        )
    whole = table.filter(pl.col("offset_bytes") + pl.col("size_bytes") <= os.path.getsize(tar_path))
    at = pl.concat_str(
        pl.lit(_address(source, os.path.basename(tar_path)) + "offset="),
        pl.col("offset_bytes").cast(pl.String),
        pl.lit("&size="),
        pl.col("size_bytes").cast(pl.String),
    )
    rows = whole.select("url", "caption", at.alias(PICTURE_AT), *source.carry_columns)
    return rows, {IMAGE_MISSING: table.height - whole.height}, []
