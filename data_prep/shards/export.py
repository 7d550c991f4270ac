"""Converts shards to Chinese-CLIP's training files: TSV with JSON lines, or LMDB (its build_lmdb_dataset.py).

A text's id is its row in the corpus, counted from 0; an image's id is the first row that has it. So images
with equal bytes are stored once, and their texts name the same image.
"""

import base64
import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from data_prep.formats.shards import CorpusShard, corpus_shards
from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.files.lock import one_at_a_time
from pipeline.core.files.written import naming
from pipeline.core.records import SCHEMA_VERSION, ConfigError, Manifest, Shard
from pipeline.core.shard_format import ByteRanges, all_captions, read_sidecar_frame, with_each_caption
from pipeline.core.stage import Progress

Format = Literal["tsv", "lmdb"]

_VERSION = 1
_ROWS_PER_BUCKET = 4_000_000  # digests in memory at once when searching for equal images
_PUTS_PER_COMMIT = 1000
_MAP_BYTES = 1 << 40  # as in Chinese-CLIP's script; this is address space, not disk


@dataclass(frozen=True, slots=True)
class Exported:
    """The contents of an export."""

    num_images: int
    num_texts: int
    files: tuple[str, ...]
    is_new: bool  # False: a complete export of these shards already existed


@dataclass(frozen=True, slots=True)
class _Pair:
    text: int  # number of the caption among all
    row: int
    image: int  # row of the first pair with this image
    data: bytes | None  # the image's; None if an earlier pair had it
    caption: str


@one_at_a_time("out")
def export(corpus: str, out: str, form: Format, split: str, progress: Progress) -> Exported:
    """Write `<split>_imgs.tsv` and `<split>_texts.jsonl`, or `lmdb/<split>/{imgs,pairs}`, and a manifest.

    Files appear only when complete; the manifest, `<split>_<form>.json`, is written last.

    Raises:
        ConfigError: if files with these names have another origin.
        InputError: if the corpus is incomplete.
    """
    shards = corpus_shards(corpus)
    inputs = digest([[shard.digest for shard in shards], split])
    names = _NAMES[form](split)
    place = store.join(out, f"{split}_{form}.json")
    if (done := _finished(place, out, inputs)) is not None:
        return done
    started = store.join(out, f".{split}_{form}.started")
    ours = store.exists(started) and store.read_text(started) == inputs
    for name in names:
        if store.exists(store.join(out, name)) and not ours:
            raise ConfigError(f"{store.join(out, name)}: already exists; give another --out or --split")
    store.write_text(started, inputs)
    num_images, num_texts = _WRITERS[form](out, split, _pairs(shards, progress))
    counts = {names[0]: num_images, names[1]: num_texts}
    manifest = Manifest(
        stage="export",
        schema_version=SCHEMA_VERSION,
        config_digest=digest("export", _VERSION, form, split),
        inputs_digest=inputs,
        parents={},
        shards=tuple(
            Shard(name, counts[name], store.num_bytes(full), store.digest_file(full))
            for name in names
            for full in [store.join(out, name)]
        ),
        num_in=num_texts,
        num_kept=num_texts,
        dropped={},
    )
    store.write_text(place, manifest.to_json())
    store.remove(started)
    return Exported(num_images, num_texts, names, is_new=True)


def _finished(place: str, out: str, inputs: str) -> Exported | None:
    if not store.exists(place):
        return None
    try:
        manifest = Manifest.from_json(store.read_text(place))
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            f"{place}: already exists and holds no manifest of an export; give another --out"
        ) from None
    if manifest.inputs_digest != inputs:
        raise ConfigError(f"{out}: holds an export of other shards; give another --out or --split")
    for shard in manifest.shards:
        path = store.join(out, shard.path)
        if not store.exists(path) or store.num_bytes(path) != shard.num_bytes:
            raise ConfigError(
                f"{path}: differs from its manifest; remove {place} and what it names, then export again"
            )
    images, texts = manifest.shards
    names = tuple(shard.path for shard in manifest.shards)
    return Exported(images.num_samples, texts.num_samples, names, is_new=False)


def _pairs(shards: list[CorpusShard], progress: Progress) -> Iterator[_Pair]:
    repeats = _repeated_images(shards)
    row = text = 0
    for number, shard in enumerate(shards, start=1):
        columns = ("key", "offset_bytes", "size_bytes", "caption")
        rows = read_sidecar_frame(shard.table, columns, (all_captions("caption"),)).with_row_index("row")
        own = repeats.filter(pl.col("row").is_between(row, row + rows.height - 1))
        first = dict(own.iter_rows())
        with ByteRanges(shard.tar) as tar:
            last = -1
            for within, key, offset, size, caption in with_each_caption(rows).iter_rows():
                at, data = row + within, None
                if within != last and at not in first:
                    data = tar.read(offset, size, f"{key}.jpg")
                yield _Pair(text, at, first.get(at, at), data, caption)
                last, text = within, text + 1
        row += rows.height
        progress(number, len(shards), "shards")


def _repeated_images(shards: list[CorpusShard]) -> pl.DataFrame:
    """Return (row, first) for rows whose image an earlier row has, sorted by row."""
    total = sum(shard.num_samples for shard in shards)
    buckets = total // _ROWS_PER_BUCKET + 1
    tables = [shard.table for shard in shards]
    found = []
    for bucket in range(buckets):
        rows = pl.scan_parquet(tables, row_index_name="row").select("row", "image_sha256")
        if buckets > 1:
            number = pl.col("image_sha256").str.slice(0, 7).str.to_integer(base=16)
            rows = rows.filter(number % buckets == bucket)
        firsts = rows.with_columns(first=pl.col("row").min().over("image_sha256"))
        found.append(firsts.filter(pl.col("row") != pl.col("first")).select("row", "first").collect())
    return pl.concat(found).sort("row")


def _write_tsv(out: str, split: str, pairs: Iterator[_Pair]) -> tuple[int, int]:
    num_images = num_texts = 0
    images, texts = (store.join(out, name) for name in _tsv_names(split))
    with (
        store.publish(images) as images_path,
        store.publish(texts) as texts_path,
        open(images_path, "wb") as table,
        open(texts_path, "w", encoding="utf-8", newline="\n") as lines,
    ):
        for pair in pairs:
            if pair.data is not None:
                table.write(b"%d\t%b\n" % (pair.row, base64.b64encode(pair.data)))
                num_images += 1
            text = {"text_id": pair.text, "text": pair.caption, "image_ids": [pair.image]}
            lines.write(json.dumps(text, ensure_ascii=False) + "\n")
            num_texts += 1
    return num_images, num_texts


def _write_lmdb(out: str, split: str, pairs: Iterator[_Pair]) -> tuple[int, int]:
    if not store.is_local(out):
        raise ConfigError(f"{out}: LMDB is mapped into memory, so it needs a local folder")
    root = os.path.join(out, "lmdb")
    partial, target = os.path.join(root, f".{split}.partial"), os.path.join(root, split)
    store.remove(partial)  # left by a killed export
    num_images = num_texts = 0
    with contextlib.ExitStack() as stack:
        put_image = stack.enter_context(_lmdb_writer(os.path.join(partial, "imgs")))
        put_pair = stack.enter_context(_lmdb_writer(os.path.join(partial, "pairs")))
        for pair in pairs:
            if pair.data is not None:
                put_image(str(pair.row), base64.b64encode(pair.data))
                num_images += 1
            put_pair(str(num_texts), pickle.dumps((pair.image, pair.text, pair.caption)))
            num_texts += 1
        put_image("num_images", str(num_images).encode())
        put_pair("num_samples", str(num_texts).encode())
    shutil.rmtree(target, ignore_errors=True)  # an export's own folder: others were refused above
    os.rename(partial, target)
    return num_images, num_texts


@contextlib.contextmanager
def _lmdb_writer(path: str) -> Iterator[Callable[[str, bytes], None]]:
    try:
        import lmdb
    except ImportError:
        raise ConfigError(
            'writing LMDB needs the lmdb package: pip install "cnclip-pretraining[lmdb]"'
        ) from None
    os.makedirs(path)
    environment = lmdb.open(path, map_size=_MAP_BYTES)
    num_entries = 0
    waiting: list[tuple[bytes, bytes]] = []

    def commit() -> None:
        with environment.begin(write=True) as transaction:
            for key, value in waiting:
                transaction.put(key, value)
        waiting.clear()

    def put(key: str, value: bytes) -> None:
        nonlocal num_entries
        num_entries += 1
        waiting.append((key.encode(), value))
        if len(waiting) >= _PUTS_PER_COMMIT:
            commit()

    try:
        with naming(path):
            yield put
            commit()
            environment.sync(True)
            if (found := environment.stat()["entries"]) != num_entries:
                raise ValueError(f"{found} of {num_entries} entries were written")
    finally:
        environment.close()
    os.remove(os.path.join(path, "lock.mdb"))  # only for this process; readers do not lock


def _tsv_names(split: str) -> tuple[str, str]:
    return f"{split}_imgs.tsv", f"{split}_texts.jsonl"


def _lmdb_names(split: str) -> tuple[str, str]:
    return f"lmdb/{split}/imgs/data.mdb", f"lmdb/{split}/pairs/data.mdb"


_NAMES: dict[Format, Any] = {"tsv": _tsv_names, "lmdb": _lmdb_names}
_WRITERS: dict[Format, Any] = {"tsv": _write_tsv, "lmdb": _write_lmdb}
