"""Pairs of images that a rule called copies, for the report: a person sees at once whether they are.

Of each rule some pairs are taken: those farthest apart if the drop table says how far, else those with the
lowest keys, which are digests and so a fair sample. An image that is not at hand (a guard has none, and
downloads may have been removed since) is left blank; the pair is shown all the same.
"""

import contextlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import polars as pl

from data_prep.accounting.drop_table import DETAIL
from data_prep.corpus_facts import kept_tables
from data_prep.dedup.near_duplicates import DUPLICATE_IMAGE, NEAR_DUPLICATE_IMAGE
from data_prep.download.stage import partition_of
from data_prep.rules.image import EVALUATION_IMAGE
from eval.datasets.cnclip_tsv import RetrievalSet
from eval.datasets.retrieval_set import read_retrieval_set
from eval.report.data import CopiesOfRule, CopyImage, CopyPair
from eval.report.sources import small_image
from pipeline.core.evaluation_sets import EvaluationSet, evaluations_of, shard_stems
from pipeline.core.files.foreign import foreign
from pipeline.core.files.images import BadImageError
from pipeline.core.records import InputError
from pipeline.core.shard_format import (
    SIDECAR,
    TAR,
    ByteRanges,
    read_sidecar_frame,
)
from pipeline.core.stage import Context

PAIRS = 24  # of a rule
_RULES = {
    "filter_image": (EVALUATION_IMAGE,),
    "dedup_image": (NEAR_DUPLICATE_IMAGE, DUPLICATE_IMAGE),
}
_NAMED = re.compile(r"(?P<set>.+?): (?P<id>.+) \((?P<bits>\d+) bits\)", re.DOTALL)


class _Place(NamedTuple):
    tar: str
    offset_bytes: int
    size_bytes: int
    perceptual_hash: bytes | None = None


def copies_of_rules(context: Context) -> tuple[CopiesOfRule, ...]:
    """Pairs of each rule that dropped copies, with small images."""
    found = []
    for stage, reasons in _RULES.items():
        if (manifest := context.parents.get(stage)) is None:
            continue
        for reason in map(str, reasons):
            if total := manifest.dropped.get(reason, 0):
                drops = _some_drops(context, stage, reason)
                pairs = (
                    _of_evaluations(context, drops) if stage == "filter_image" else _of_rows(context, drops)
                )
                found.append(CopiesOfRule(stage, reason, total, tuple(pairs)))
    return tuple(found)


def _some_drops(context: Context, stage: str, reason: str) -> pl.DataFrame:
    """key, detail and table of some drops, farthest first."""
    bits = pl.col(DETAIL).str.extract(r"\((\d+) bits\)$").cast(pl.Int64)
    some = []
    for shard in context.parents[stage].shards:
        if not shard.path.startswith("dropped/") or not shard.num_samples:
            continue
        drops = pl.scan_parquet(context.path_in(stage, shard.path))
        if DETAIL not in drops.collect_schema():
            continue
        drops = drops.filter(pl.col("reason") == reason).select("key", DETAIL, bits=bits.fill_null(0))
        some.append(drops.with_columns(table=pl.lit(shard.path)).collect(engine="streaming"))
        some = [pl.concat(some).sort("bits", "key", descending=[True, False]).head(PAIRS)]
    return some[0] if some else pl.DataFrame(schema={"key": pl.String, DETAIL: pl.String, "table": pl.String})


def _of_evaluations(context: Context, drops: pl.DataFrame) -> list[CopyPair]:
    tables = {
        partition_of(shard.path): shard.path
        for shard in context.parents["download"].shards
        if shard.path.startswith("pictures/") and shard.path.endswith(SIDECAR)
    }
    wanted: dict[str, list[str]] = {}
    for key, table in drops.select("key", "table").iter_rows():
        if (path := tables.get(partition_of(table))) is not None:
            wanted.setdefault(path, []).append(key)
    places = _places(context, "download", wanted)
    images = _EvaluationImages(evaluations_of(context))
    pairs = []
    for key, detail in drops.select("key", DETAIL).iter_rows():
        named = _NAMED.fullmatch(detail or "")
        kept = f"{named['set']}: {named['id']}" if named else detail or "evaluation image"
        pairs.append(
            CopyPair(
                CopyImage(kept, images.small(named["set"], named["id"]) if named else None),
                CopyImage(key, _small(context, key, places.get(key))),
                int(named["bits"]) if named else None,
            )
        )
    return pairs


def _of_rows(context: Context, drops: pl.DataFrame) -> list[CopyPair]:
    keys = [*drops["key"], *drops[DETAIL].drop_nulls()]
    wanted = {shard.path: keys for shard in kept_tables(context, "filter_image")}
    places = _places(context, "filter_image", wanted)
    pairs = []
    for key, kept in drops.select("key", DETAIL).iter_rows():
        one, other = places.get(kept), places.get(key)
        bits = None
        if one and other and one.perceptual_hash and other.perceptual_hash:
            number = int.from_bytes(one.perceptual_hash) ^ int.from_bytes(other.perceptual_hash)
            bits = number.bit_count()
        pairs.append(
            CopyPair(
                CopyImage(kept or "", _small(context, kept, one)),
                CopyImage(key, _small(context, key, other)),
                bits,
            )
        )
    return sorted(pairs, key=lambda pair: -(pair.bits or 0))


def _places(context: Context, stage: str, wanted: dict[str, list[str]]) -> dict[str, _Place]:
    """Where the images of keys lie in the download's files, by the tables that may have the keys."""
    found = {}
    for path, keys in wanted.items():
        # A table that was removed since, or damaged: its images stay blank.
        with contextlib.suppress(InputError), foreign(context.path_in(stage, path), "table"):
            table = pl.scan_parquet(context.path_in(stage, path))
            columns = table.collect_schema().names()
            tar = pl.lit(path.removesuffix(SIDECAR) + TAR)
            places = table.filter(pl.col("key").is_in(keys)).select(
                "key",
                (pl.col("tar").fill_null(tar) if "tar" in columns else tar).alias("tar"),
                "offset_bytes",
                "size_bytes",
                *(["perceptual_hash"] if "perceptual_hash" in columns else []),
            )
            for row in places.collect(engine="streaming").iter_rows(named=True):
                key = row.pop("key")
                found[key] = _Place(**row)
    return found


def _small(context: Context, key: str, place: _Place | None) -> bytes | None:
    if place is None:
        return None
    try:
        with ByteRanges(context.path_in("download", place.tar)) as images:
            return small_image(images.read(place.offset_bytes, place.size_bytes, f"{key}.jpg"))
    except (InputError, BadImageError, OSError):
        return None


class _EvaluationImages:
    """Small images of evaluation sets by id; a set's files are opened at its first image."""

    def __init__(self, evaluations: Sequence[EvaluationSet]) -> None:
        self._folders = {item.name: item.folder for item in evaluations}
        self._read: dict[str, tuple[RetrievalSet, dict[str, int]]] = {}

    def small(self, name: str, image_id: str) -> bytes | None:
        if (folder := self._folders.get(name)) is None:
            return None
        try:
            data = self._of_shards(folder, image_id) or self._of_table(folder, name, image_id)
            return None if data is None else small_image(data)
        except (InputError, BadImageError, OSError, ValueError):
            return None

    def _of_shards(self, folder: str, key: str) -> bytes | None:
        for stem in shard_stems(folder):
            table = read_sidecar_frame(stem + SIDECAR, ("key", "offset_bytes", "size_bytes"))
            for _, offset, size in table.filter(pl.col("key") == key).iter_rows():
                with ByteRanges(stem + TAR) as images:
                    return images.read(offset, size, f"{key}.jpg")
        return None

    def _of_table(self, folder: str, name: str, image_id: str) -> bytes | None:
        if name not in self._read:
            evaluation = read_retrieval_set(folder, name)
            rows = {str(each): row for row, each in enumerate(evaluation.image_ids.tolist())}
            self._read[name] = evaluation, rows
        evaluation, rows = self._read[name]
        return next(evaluation.image_bytes([rows[image_id]])) if image_id in rows else None
