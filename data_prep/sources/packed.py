"""Images that are here already: Chinese-CLIP's TSV and LMDB, img2dataset's output, and a run's shards.

A pair becomes a row of a caption table with two addresses: `url`, what the row is known by, and `picture_at`,
where the loopback site (`data_prep.sources.local_server`) finds the image's bytes, so that images from disk
take the same way through the resizer as those from the web. Formats: Chinese-CLIP's README, img2dataset's
README.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import quote, urlencode

import polars as pl

from data_prep.accounting.drop_table import drops_as_they_come
from data_prep.corpus_facts import with_exemptions
from data_prep.formats.lmdb import open_lmdb, unpickle_plain
from data_prep.formats.parquet import write_table
from data_prep.formats.tar_images import image_members, samples_of
from data_prep.sources.local_server import HOST, PACKED
from data_prep.sources.regions import Converted, Places, malformed_rows
from data_prep.sources.table import EXEMPT_COLUMN, TableSource, naming_damage
from data_prep.sources.text_file import column_names, read_batches
from data_prep.sources.text_rows import MALFORMED_COLUMNS, MALFORMED_JSON, Malformed
from pipeline.core import store
from pipeline.core.files.columns import is_pattern
from pipeline.core.files.foreign import parse_json
from pipeline.core.records import DropReason, InputError
from pipeline.core.shard_format import sidecar_of

UNPAIRED = DropReason("unpaired")  # a text whose image_ids are empty: the pairing is unknown
IMAGE_MISSING = DropReason("image_missing")  # a text that names an image which is not there
NOT_DOWNLOADED = DropReason("not_downloaded")  # img2dataset's own table says so
MALFORMED_PICKLE = DropReason("malformed:pickle")  # an LMDB pair that is not (image id, text id, text)
# Lines of _imgs.tsv: each counts as a row, in addition to the texts that name the image.
MALFORMED_IMAGE = DropReason("malformed:picture_line")  # not a number, a tab and base64
IMAGE_REPEATED = DropReason("malformed:picture_repeated")  # a later line has the number: that one stays
IMAGE_AT = "picture_at"

PackedKind = Literal["cn_clip_tsv", "cn_clip_lmdb", "img2dataset", "shards", "webdataset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSource:
    """One `[[corpus.sources]]` entry whose images are on disk in a format of the ecosystem."""

    kind: PackedKind
    """Format on disk: Chinese-CLIP's TSV or LMDB, img2dataset output, the shards of another run, or tars of
    webdataset, with the caption of each image in `.txt`, `.caption` or `.json`.
    """
    path: str
    """Local folder that holds `<split>_imgs.tsv`, `lmdb/<split>`, or `00000.tar` with `00000.parquet`."""
    carry_columns: tuple[str, ...] = ()
    """Further sidecar columns of shards to keep."""
    name: str
    """The source's name in the funnel."""
    split: str = "train"
    """Split to read, for Chinese-CLIP's formats."""
    exempt_from: tuple[str, ...] = ()
    """Rules that do not apply to this source."""


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
    if source.kind == "webdataset":
        nested = sorted(str(tar) for tar in folder.rglob("*.tar"))
        if not nested:
            packed = next(iter(sorted(folder.rglob("*.tar.gz"))), None)
            remedy = f"; unpack {packed} and its like with gunzip" if packed else ""
            raise InputError(f"{source.path}: no .tar in it or below it (source {source.name}){remedy}")
        return [[tar] for tar in nested]
    tars = sorted(folder.glob("*.tar"))
    if not tars and source.kind == "img2dataset" and any(folder.glob("[0-9]*/*")):
        raise InputError(
            f"{source.path}: no .tar, but folders of files, as of img2dataset's output_format=files; write it"
            f" with output_format=webdataset (source {source.name})"
        )
    if not tars:
        what = "of a run's shards" if source.kind == "shards" else "of img2dataset's webdataset output"
        raise InputError(f"{source.path}: no .tar {what} (source {source.name})")
    found = [[str(tar), sidecar_of(str(tar))] for tar in tars]
    for tar_path, table_path in found:
        if source.kind == "img2dataset" and not os.path.isfile(table_path):
            raise InputError(
                f"{table_path}: no such file (source {source.name}): img2dataset writes this table next to"
                f" {os.path.basename(tar_path)}, and its captions and addresses are needed; add it, or set"
                ' kind = "webdataset", which reads tars by themselves'
            )
    for files in found:
        _exist(source, files)
    return found


def unpack(
    source: PackedSource,
    files: list[str],
    to: Places,
    exemptions: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Converted:
    """Write one piece as a caption table with columns url, caption, picture_at.

    Rows of shards keep what they are exempt from; `exemptions` (source → rules) is that of their run.
    """
    read: Mapping[str, Callable[[PackedSource, list[str]], _Read]] = {
        "cn_clip_tsv": _read_tsv,
        "cn_clip_lmdb": _read_lmdb,
        "img2dataset": _read_img2dataset,
        "webdataset": _read_webdataset,
        "shards": partial(_read_shards, exemptions=exemptions),
    }
    rows, drops, malformed = read[source.kind](source, files)
    with malformed_rows(to.malformed) as out:
        out.add(malformed)
    with drops_as_they_come(to.drops) as listed:
        for reason, dropped in drops.items():
            listed.add(dropped, reason)
    write_table(rows, to.table)
    description = TableSource(
        path=to.table,
        name=source.name,
        url_column="url",
        caption_column="caption",
        carry_columns=tuple(name for name in rows.columns if name not in ("url", "caption")),
        exempt_from=source.exempt_from,
    )
    counts = dict(sorted((listed.counts + out.counts).items()))
    return Converted(description, rows.height, counts, num_drops=listed.counts.total())


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


# The rows, those left out by reason (url and caption), and what is no row.
_Read = tuple[pl.DataFrame, dict[DropReason, pl.DataFrame], list[Malformed]]
# Numbers of more digits than 64 bits hold are no numbers of images.
_MOST_DIGITS = 18
_CAPTIONS = ("caption", "text", "TEXT")  # of a sample's JSON


def _read_tsv(source: PackedSource, files: list[str]) -> _Read:
    malformed = list[Malformed]()
    places = _tsv_places(files[0], malformed)
    images = pl.DataFrame(
        {
            "image_id": list(places),
            "url": [_known_by(source, image_id) for image_id in places],
            IMAGE_AT: [
                _address(source, os.path.basename(files[0]), offset=offset, size=size, base64=1)
                for offset, size in places.values()
            ],
        },
        schema={"image_id": pl.Int64, "url": pl.String, IMAGE_AT: pl.String},
    )
    found = column_names(files[1])
    lacking = {"text", "image_ids"} - set(found)
    if lacking:
        raise InputError(f"{files[1]}: no column {', '.join(sorted(lacking))}; found {', '.join(found)}")
    tables = []
    for batch in read_batches(files[1], ["text", "image_ids"]):
        malformed += batch.malformed
        is_list = pl.col("image_ids").str.contains(r"^\[[\d\s,\"-]*\]$")
        is_list &= ~pl.col("image_ids").str.contains(rf"\d{{{_MOST_DIGITS + 1}}}")
        is_list = is_list.fill_null(False)
        for text in batch.rows.filter(~is_list)["text"]:
            malformed.append(Malformed(MALFORMED_COLUMNS, str(text)[:300]))
        tables.append(
            batch.rows.filter(is_list).select(
                caption="text", image_id=pl.col("image_ids").str.extract_all(r"-?\d+").cast(pl.List(pl.Int64))
            )
        )
    texts = pl.concat(tables)
    unpaired = texts.filter(pl.col("image_id").list.len() == 0)
    pairs = texts.explode("image_id").drop_nulls("image_id")
    rows = pairs.join(images, on="image_id", how="inner", maintain_order="left")
    missing = pairs.join(images, on="image_id", how="anti", maintain_order="left")
    known_by = pl.concat_str(pl.lit(_known_by(source, "")), "image_id").alias("url")
    dropped = {
        UNPAIRED: unpaired.select(pl.lit(None, pl.String).alias("url"), "caption"),
        IMAGE_MISSING: missing.select(known_by, "caption"),
    }
    return rows.select("url", "caption", IMAGE_AT), dropped, malformed


def _tsv_places(path: str, malformed: list[Malformed]) -> dict[int, tuple[int, int]]:
    """Image id → (offset, size) of each image's base64 text; lines that are none go to `malformed`."""
    places: dict[int, tuple[int, int]] = {}
    offset = 0
    with store.open_read(path) as file:
        for line in file:
            name, _, encoded = line.partition(b"\t")
            number, encoded = name.strip(), encoded.rstrip(b"\r\n")
            if encoded and number.isdigit() and len(number) <= _MOST_DIGITS:
                if int(number) in places:
                    malformed.append(Malformed(IMAGE_REPEATED, number.decode()))
                places[int(number)] = offset + len(name) + 1, len(encoded)
            elif line.strip():
                malformed.append(Malformed(MALFORMED_IMAGE, line[:300].decode("utf-8", "replace").strip()))
            offset += len(line)
    return places


def _read_lmdb(source: PackedSource, files: list[str]) -> _Read:
    pairs_path, images_path = (os.path.dirname(path) for path in files)
    rows, missing, malformed = [], [], list[Malformed]()
    with (
        open_lmdb(pairs_path) as pairs,
        open_lmdb(images_path) as images,
        pairs.begin() as texts,
        images.begin(buffers=True) as pictures,
    ):
        count = texts.get(b"num_samples")
        if count is None or not bytes(count).isdigit() or len(count) > _MOST_DIGITS:
            raise InputError(f"{pairs_path}: no num_samples; give a split's folder of Chinese-CLIP's LMDB")
        if int(count) > 2 * (entries := texts.stat()["entries"]):  # a loop over them would never end
            raise InputError(
                f"{pairs_path}: num_samples says {bytes(count)[:40].decode()}, but it holds {entries}"
                f" entries; copy the split's LMDB again"
            )
        for number in range(int(count)):
            data = texts.get(str(number).encode()) or b""
            try:
                image_id, _, text = unpickle_plain(data)
                known = pictures.get(str(int(image_id)).encode()) is not None
            except Exception as error:  # a pickle can raise anything
                malformed.append(Malformed(MALFORMED_PICKLE, f"{number}: {error}"[:300]))
                continue
            if not known:
                missing.append((_known_by(source, int(image_id)), str(text)))
                continue
            at = _address(source, os.path.relpath(images_path, source.path), lmdb=int(image_id))
            rows.append((_known_by(source, int(image_id)), str(text), at))
    pair = {"url": pl.String, "caption": pl.String}
    dropped = {IMAGE_MISSING: pl.DataFrame(missing, schema=pair, orient="row")}
    return pl.DataFrame(rows, schema={**pair, IMAGE_AT: pl.String}, orient="row"), dropped, malformed


def _read_img2dataset(source: PackedSource, files: list[str]) -> _Read:
    tar_path, table_path = files
    members = image_members(tar_path)
    with naming_damage(table_path):
        table = pl.read_parquet(table_path)
    missing = [name for name in ("url", "key", "status", "caption") if name not in table.columns]
    if missing:
        raise InputError(
            f"{table_path}: no column {', '.join(missing)}; found {', '.join(table.columns)}; give"
            f" img2dataset's output made with a caption column"
        )
    has_numbers = table.schema["key"].is_integer()  # of the names, which have zeros before them
    table = table.with_columns(pl.col("key", "url", "caption").cast(pl.String))
    is_done = (pl.col("status") == "success").fill_null(False)
    end = os.path.getsize(tar_path)
    places = pl.DataFrame(
        [
            (
                str(int(key)) if has_numbers and key.isdecimal() else key,
                _address(source, os.path.basename(tar_path), offset=offset, size=size),
            )
            for key, (offset, size) in members.items()
            if offset + size <= end  # a tar that was cut off ends inside its last image
        ],
        schema={"key": pl.String, IMAGE_AT: pl.String},
        orient="row",
    )
    done = table.filter(is_done)
    rows = done.join(places, on="key", how="inner", maintain_order="left")
    dropped = {
        NOT_DOWNLOADED: table.filter(~is_done),
        IMAGE_MISSING: done.join(places, on="key", how="anti", maintain_order="left"),
    }
    return rows.select("url", "caption", IMAGE_AT), dropped, []


def _read_webdataset(source: PackedSource, files: list[str]) -> _Read:
    """Tars by themselves: the caption is the text next to the image, or `caption` or `text` of its JSON."""
    (tar_path,) = files
    relative = os.path.relpath(tar_path, source.path)
    found, end = samples_of(tar_path, with_folders=True), os.path.getsize(tar_path)
    rows, missing, malformed = [], [], list[Malformed]()
    for key in dict.fromkeys((*found.images, *found.texts)):
        texts = found.texts.get(key, {})
        url, caption = f"{_known_by(source, relative)}/{quote(key)}", None
        try:
            notes = parse_json(texts["json"]) if "json" in texts else {}
        except ValueError:
            notes = None
        if isinstance(notes, dict):
            named = notes.get("url")
            url = named if isinstance(named, str) and named.startswith("http") else url
            caption = next((value for name in _CAPTIONS if isinstance(value := notes.get(name), str)), None)
        for extension in ("caption", "txt"):
            if extension in texts:
                caption = texts[extension].decode("utf-8", "replace").strip()
        if notes is None and caption is None:
            malformed.append(Malformed(MALFORMED_JSON, f"{key}.json"))
            continue
        offset, size = found.images.get(key, (end, 1))
        if offset + size > end:
            missing.append((url, caption))
        else:
            rows.append((url, caption, _address(source, relative, offset=offset, size=size)))
    pair = {"url": pl.String, "caption": pl.String}
    dropped = {IMAGE_MISSING: pl.DataFrame(missing, schema=pair, orient="row")}
    return pl.DataFrame(rows, schema={**pair, IMAGE_AT: pl.String}, orient="row"), dropped, malformed


def _read_shards(source: PackedSource, files: list[str], exemptions: Mapping[str, Sequence[str]]) -> _Read:
    """What a run has packed: addresses stay those of the web, and scores stay behind, to be made anew."""
    tar_path, table_path = files
    if named := [name for name in source.carry_columns if is_pattern(name)]:
        raise InputError(
            f"{table_path}: column {named[0]!r} cannot be carried: its name is a pattern; rename it"
        )
    columns = ["url", "caption", "offset_bytes", "size_bytes", *source.carry_columns]
    with naming_damage(table_path):
        table = with_exemptions(pl.scan_parquet(table_path), exemptions).collect()
    if EXEMPT_COLUMN in table.columns and EXEMPT_COLUMN not in columns:
        columns.append(EXEMPT_COLUMN)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(
            f"{table_path}: no column {', '.join(missing)}; found {', '.join(table.columns)}; give the folder"
            f" of a run's shards"
        )
    end = pl.col("offset_bytes") + pl.col("size_bytes")
    is_whole = (end <= os.path.getsize(tar_path)).fill_null(False)
    whole = table.filter(is_whole)
    at = pl.concat_str(
        pl.lit(_address(source, os.path.basename(tar_path)) + "offset="),
        pl.col("offset_bytes").cast(pl.String),
        pl.lit("&size="),
        pl.col("size_bytes").cast(pl.String),
    )
    rows = whole.select("url", "caption", at.alias(IMAGE_AT), *columns[4:])
    return rows, {IMAGE_MISSING: table.filter(~is_whole)}, []
