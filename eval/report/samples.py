"""A bounded sample of the training pairs, and its map."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from eval.report.data import CorpusMap, Example, MapPoint
from eval.report.sources import small_image, spread
from eval.stages import EvaluationConfig
from pipeline.core import store
from pipeline.core.files.images import BadImageError
from pipeline.core.shard_format import SIDECAR, ByteRanges, read_sidecar_frame, tar_of
from pipeline.core.stage import Context

if TYPE_CHECKING:
    from pipeline.core.records import Shard

WALL = 48  # pairs on the wall of samples
WALL_SIDE_PX = 128
MAP = 180  # images on the map
MAP_SIDE_PX = 48
_SHARDS = 12  # per sample; one sidecar is in memory at a time
MAX_CHARACTERS = 200  # of a caption or an address that is shown


@dataclass(frozen=True, slots=True)
class _Sample:
    row: dict[str, object]
    data: bytes


def wall_of_samples(context: Context) -> tuple[Example, ...]:
    """Return evenly spaced pairs from evenly spaced shards, with small images."""
    return tuple(_example(sample, WALL_SIDE_PX) for sample in _samples(context, WALL))


def corpus_map(context: Context, config: EvaluationConfig) -> CorpusMap | None:
    """Embed a sample of the corpus with the final model and project it onto two principal components.

    Return None if fewer than three images can be read. The signs of the components are fixed, so that the
    same model and corpus give the same map.
    """
    from eval.features.encoder import ModelSource, load_encoder

    samples = list(_samples(context, MAP))
    if len(samples) < 3:
        return None
    stage = config.stages[-1]
    vocabulary = config.vocabulary or context.path_in("vocabulary", "caption.txt")
    weights = context.path_in(stage, "model.safetensors")
    encoder = load_encoder(ModelSource(weights, vocabulary, config.context_length))
    feature_ND, kept_N = encoder.encoded_images(sample.data for sample in samples)
    if len(kept_N) < 3:
        return None
    place_N2, share = project(feature_ND)
    points = tuple(
        MapPoint(float(x), float(y), _example(samples[row], MAP_SIDE_PX))
        for row, (x, y) in zip(kept_N.tolist(), place_N2, strict=True)
    )
    return CorpusMap(stage, share, points)


def project(feature_ND: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], float]:
    """Return PCA's first two coordinates [N, 2], each from 0 to 1, and their share of the variance.

    The sign of a component makes its largest weight positive.
    """
    centred_ND = feature_ND.astype(np.float64) - feature_ND.mean(axis=0, dtype=np.float64)
    _, scale_K, direction_KD = np.linalg.svd(centred_ND, full_matrices=False)
    largest_2 = np.abs(direction_KD[:2]).argmax(axis=1)
    sign_2 = np.sign(direction_KD[np.arange(len(largest_2)), largest_2])
    place_N2 = centred_ND @ (direction_KD[:2].T * sign_2)
    low, high = place_N2.min(axis=0), place_N2.max(axis=0)
    total = float((scale_K**2).sum())
    share = float((scale_K[:2] ** 2).sum()) / total if total else 0.0
    return np.round((place_N2 - low) / np.where(high > low, high - low, 1), 3), share


def shortened(text: object) -> str:
    """Return a caption or an address, truncated if it is long."""
    whole = "" if text is None else str(text)
    return whole if len(whole) <= MAX_CHARACTERS else f"{whole[: MAX_CHARACTERS - 1]}…"


def _example(sample: _Sample, side_px: int) -> Example:
    row = sample.row
    try:
        small = small_image(sample.data, side_px)
    except BadImageError:
        small = None
    return Example(shortened(row["caption"]), str(row["source"] or ""), shortened(row["url"]), "", small)


def _samples(context: Context, count: int) -> Iterator[_Sample]:
    """Yield `count` pairs, or all if there are fewer: equally many from each of some shards."""
    # Users may have deleted shards, which are large.
    sidecars = [
        shard
        for shard in spread([one for one in context.shards_of("shards", SIDECAR) if one.num_samples], _SHARDS)
        if store.exists(shard.path) and store.exists(tar_of(shard.path))
    ]
    left = count
    for number, shard in enumerate(sidecars):
        share = -(-left // (len(sidecars) - number))
        taken = list(_of_shard(shard, share))
        left -= len(taken)
        yield from taken


def _of_shard(shard: "Shard", count: int) -> Iterator[_Sample]:
    columns = ("key", "offset_bytes", "size_bytes", "caption", "source", "url")
    table = read_sidecar_frame(shard.path, columns)
    rows = [table.row(place, named=True) for place in spread(range(table.height), count)]
    with ByteRanges(tar_of(shard.path)) as images:
        for row in rows:
            yield _Sample(row, images.read(row["offset_bytes"], row["size_bytes"], f"{row['key']}.jpg"))
