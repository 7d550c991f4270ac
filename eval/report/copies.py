"""Pairs of images that a rule called copies, so that readers of the report can judge them at a glance.

Each rule contributes some pairs: the most distant ones if the drop table has distances, otherwise those with
the lowest keys, which are digests and so a fair sample. If an image is unavailable (guards have none, and
downloads may have been deleted), the pair appears with a blank.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence

import polars as pl

from data_prep.accounting.drop_table import DETAIL
from data_prep.dedup.near_duplicates import DUPLICATE_IMAGE, NEAR_DUPLICATE_IMAGE
from data_prep.features.semantic import SEMANTIC_DUPLICATE
from data_prep.formats.keys import KEY_HEX_DIGITS
from data_prep.rules.image import EVALUATION_IMAGE
from eval.datasets.retrieval_set import read_retrieval_set
from eval.report.data import CopiesOfRule, CopyImage, CopyPair
from eval.report.lookup import RowLookup
from eval.report.sources import small_image
from pipeline.core.evaluation_sets import EvaluationSet, evaluations_of, shard_stems
from pipeline.core.files.images import BadImageError
from pipeline.core.records import InputError
from pipeline.core.shard_format import (
    SIDECAR,
    TAR,
    ByteRanges,
    read_sidecar_frame,
)
from pipeline.core.stage import Context

PAIRS = 24  # per rule
_RULES = {
    "filter_image": (EVALUATION_IMAGE,),
    "dedup_image": (NEAR_DUPLICATE_IMAGE, DUPLICATE_IMAGE),
    "dedup_semantic": (SEMANTIC_DUPLICATE,),
}
_NAMED = re.compile(r"(?P<set>.+?): (?P<id>.+) \((?P<bits>\d+) bits\)", re.DOTALL)


def copies_of_rules(context: Context, lookup: RowLookup) -> tuple[CopiesOfRule, ...]:
    """Return pairs of each rule that dropped copies, with small images."""
    found = []
    for stage, reasons in _RULES.items():
        if (manifest := context.parents.get(stage)) is None:
            continue
        for reason in map(str, reasons):
            if total := manifest.dropped.get(reason, 0):
                drops = _some_drops(context, stage, reason)
                if stage == "filter_image":
                    pairs = _of_evaluations(context, drops, lookup)
                else:
                    pairs = _of_rows(drops, lookup)
                found.append(CopiesOfRule(stage, reason, total, tuple(pairs)))
    return tuple(found)


def _some_drops(context: Context, stage: str, reason: str) -> pl.DataFrame:
    """Return key and detail of some drops, farthest first."""
    bits = pl.col(DETAIL).str.extract(r"\((\d+) bits\)$").cast(pl.Float64)
    cosine = pl.col(DETAIL).str.extract(r"\(cosine ([\d.]+)\)$").cast(pl.Float64)
    some = []
    for shard in context.parents[stage].shards:
        if not shard.path.startswith("dropped/") or not shard.num_samples:
            continue
        drops = pl.scan_parquet(context.path_in(stage, shard.path))
        if DETAIL not in drops.collect_schema():
            continue
        drops = drops.filter(pl.col("reason") == reason).select(
            "key", DETAIL, far=pl.coalesce(bits, 1 - cosine, 0.0)
        )
        some.append(drops.collect(engine="streaming"))
        some = [pl.concat(some).sort("far", "key", descending=[True, False]).head(PAIRS)]
    return some[0] if some else pl.DataFrame(schema={"key": pl.String, DETAIL: pl.String})


def _of_evaluations(context: Context, drops: pl.DataFrame, lookup: RowLookup) -> list[CopyPair]:
    rows = lookup.find("download", drops["key"], ())
    named = [_NAMED.fullmatch(detail or "") for detail in drops[DETAIL]]
    images = _EvaluationImages(
        evaluations_of(context), {(found["set"], found["id"]) for found in named if found}
    )
    pairs = []
    for (key, detail), found in zip(drops.select("key", DETAIL).iter_rows(), named, strict=True):
        kept = f"{found['set']}: {found['id']}" if found else detail or "evaluation image"
        pairs.append(
            CopyPair(
                CopyImage(kept, images.small(found["set"], found["id"]) if found else None),
                CopyImage(key, lookup.small(rows.get(key))),
                int(found["bits"]) if found else None,
            )
        )
    return pairs


def _of_rows(drops: pl.DataFrame, lookup: RowLookup) -> list[CopyPair]:
    drops = drops.with_columns(pl.col(DETAIL).str.head(KEY_HEX_DIGITS))  # a cosine may follow
    rows = lookup.find("filter_image", [*drops["key"], *drops[DETAIL].drop_nulls()], ("perceptual_hash",))
    pairs = []
    for key, kept in drops.select("key", DETAIL).iter_rows():
        one, other = rows.get(kept), rows.get(key)
        bits = None
        if one and other and one.get("perceptual_hash") and other.get("perceptual_hash"):
            number = int.from_bytes(one["perceptual_hash"]) ^ int.from_bytes(other["perceptual_hash"])
            bits = number.bit_count()
        pairs.append(
            CopyPair(CopyImage(kept or "", lookup.small(one)), CopyImage(key, lookup.small(other)), bits)
        )
    return sorted(pairs, key=lambda pair: -(pair.bits or 0))


class _EvaluationImages:
    """Small images of evaluation sets by id; reads each set's files once for all requested ids."""

    def __init__(self, evaluations: Sequence[EvaluationSet], wanted: Iterable[tuple[str, str]]) -> None:
        self._folders = {item.name: item.folder for item in evaluations}
        self._ids: dict[str, list[str]] = {}
        for name, image_id in wanted:
            self._ids.setdefault(name, []).append(image_id)
        self._found: dict[str, dict[str, bytes]] = {}

    def small(self, name: str, image_id: str) -> bytes | None:
        if name not in self._found:
            folder = self._folders.get(name)
            try:
                self._found[name] = {} if folder is None else self._read(folder, name)
            except (InputError, OSError, ValueError):  # the set has been moved: its images stay blank
                self._found[name] = {}
        return self._found[name].get(image_id)

    def _read(self, folder: str, name: str) -> dict[str, bytes]:
        if stems := shard_stems(folder):
            return _small_ones(self._of_shards(stems, self._ids[name]))
        evaluation = read_retrieval_set(folder, name)
        rows = {str(each): row for row, each in enumerate(evaluation.image_ids.tolist())}
        known = [image_id for image_id in self._ids[name] if image_id in rows]
        return _small_ones(
            zip(known, evaluation.image_bytes([rows[image_id] for image_id in known]), strict=True)
        )

    def _of_shards(self, stems: Iterable[str], keys: list[str]) -> Iterator[tuple[str, bytes]]:
        left = set(keys)
        for stem in stems:
            if not left:
                break
            table = read_sidecar_frame(stem + SIDECAR, ("key", "offset_bytes", "size_bytes"))
            found = table.filter(pl.col("key").is_in(list(left)))
            if found.height:
                left -= {*found["key"]}
                with ByteRanges(stem + TAR) as images:
                    for key, offset, size in found.iter_rows():
                        yield key, images.read(offset, size, f"{key}.jpg")


def _small_ones(images: Iterable[tuple[str, bytes]]) -> dict[str, bytes]:
    found = {}
    for name, data in images:
        with contextlib.suppress(BadImageError):
            found[name] = small_image(data)
    return found
