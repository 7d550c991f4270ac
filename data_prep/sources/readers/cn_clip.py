"""Chinese-CLIP's TSV and LMDB: texts with the numbers of their images (formats: Chinese-CLIP's README)."""

import os
from collections.abc import Iterator

import polars as pl

from data_prep.formats.lmdb import open_lmdb, unpickle_plain
from data_prep.sources.readers.places import served_path
from data_prep.sources.readers.source import (
    IMAGE_AT,
    IMAGE_MISSING,
    UNPAIRED,
    PackedSource,
    Part,
    address,
    known_by,
)
from data_prep.sources.text_file import column_names, read_batches
from data_prep.sources.text_rows import MALFORMED_COLUMNS, Malformed
from pipeline.core import store
from pipeline.core.records import DropReason, InputError

MALFORMED_PICKLE = DropReason("malformed:pickle")  # an LMDB pair that is not (image id, text id, text)
# Lines of _imgs.tsv: each counts as a row, as do the texts that name the image.
MALFORMED_IMAGE = DropReason("malformed:picture_line")  # not a number, a tab and base64
IMAGE_REPEATED = DropReason("malformed:picture_repeated")  # a later line has the number: that one stays
# Numbers of more digits than 64 bits hold are no numbers of images.
_MOST_DIGITS = 18


def read_tsv(source: PackedSource, files: list[str]) -> Iterator[Part]:
    malformed = list[Malformed]()
    places = _tsv_places(files[0], malformed)
    images = pl.DataFrame(
        {
            "image_id": list(places),
            "url": [known_by(source, image_id) for image_id in places],
            IMAGE_AT: [
                address(source, served_path(source.path, files[0]), offset=offset, size=size, base64=1)
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
    named = pl.concat_str(pl.lit(known_by(source, "")), "image_id").alias("url")
    dropped = {
        UNPAIRED: unpaired.select(pl.lit(None, pl.String).alias("url"), "caption"),
        IMAGE_MISSING: missing.select(named, "caption"),
    }
    yield Part(rows.select("url", "caption", IMAGE_AT), dropped, malformed)


def read_lmdb(source: PackedSource, files: list[str]) -> Iterator[Part]:
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
                missing.append((known_by(source, int(image_id)), str(text)))
                continue
            at = address(source, served_path(source.path, images_path), lmdb=int(image_id))
            rows.append((known_by(source, int(image_id)), str(text), at))
    pair = {"url": pl.String, "caption": pl.String}
    dropped = {IMAGE_MISSING: pl.DataFrame(missing, schema=pair, orient="row")}
    yield Part(pl.DataFrame(rows, schema={**pair, IMAGE_AT: pl.String}, orient="row"), dropped, malformed)


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
