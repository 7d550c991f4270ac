"""Searchable galleries: an index with a description and an image for each of its rows.

Images come from an evaluation set in Chinese-CLIP's layout, from shards (by offset in the tar), or from
files. The index's metadata (`metadata/metadata_N.parquet`, clip-retrieval's layout) maps rows to them by the
column `image_id` in the first case, `key` in the second and `image_path` in the third. No path in this module
comes from a client, and a path in the metadata cannot leave its folder.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from eval.datasets.cnclip_tsv import RetrievalSet
from eval.datasets.discover import RetrievalSource, find_sets, sets_of_run
from eval.datasets.retrieval_set import read_retrieval_set
from eval.features.encoder import ModelSource
from eval.features.model_identity import ModelIdentity, read_identity
from eval.index.flat import read_index, search
from eval.index.partitioned import PartedIndex
from eval.index.tuning.parameters import Tuned
from eval.serve.sources import Found, Near, Search, Sources
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int64Array
from pipeline.core.evaluation_sets import shard_stems
from pipeline.core.files.foreign import foreign
from pipeline.core.files.image_files import read_image
from pipeline.core.files.images import BadImageError
from pipeline.core.records import ConfigError, InputError
from pipeline.core.shard_format import SIDECAR, ByteRanges, tar_of

if TYPE_CHECKING:
    import polars as pl

MAX_CAPTION_CHARACTERS = 500  # shown of one caption
_MAX_CAPTIONS = 5  # shown of one image


@dataclass(frozen=True, slots=True)
class Description:
    """The description of an image. All fields are untrusted: show them as plain text."""

    captions: tuple[str, ...]
    source: str
    url: str  # empty if unknown


class GalleryImages(Protocol):
    """Return the description of a row of the index."""

    def describe(self, row: int) -> Description: ...

    def read(self, row: int) -> bytes:
        """Return the encoded image.

        Raises:
            InputError: if it is missing or damaged.
        """
        ...


@dataclass(frozen=True, slots=True)
class Gallery:
    """An index with the images of its rows."""

    name: str
    dim: int
    num_rows: int
    images: GalleryImages
    search: Search  # k ≤ num_rows
    model: ModelIdentity | None = None  # of the features; None if unknown
    sources: Sources | None = None  # None if rows have one source, or it is unknown
    tuned: Tuned | None = None  # the search parameters in use and what they reach; None if that is unknown

    def nearest(self, feature_D: Float32Array, k: int, source: str | None = None) -> Near:
        """Return the k best rows, optionally of one source; fewer if the index finds fewer.

        Raises:
            KeyError: if the gallery has no such source.
        """
        if source is not None:
            if self.sources is None:
                raise KeyError(source)
            return self.sources.nearest(self.search, feature_D, k, source)
        scores_1K, rows_1K = self.search(feature_D[None], min(k, self.num_rows))
        pairs = zip(rows_1K[0].tolist(), scores_1K[0].tolist(), strict=True)
        return Near([(row, score) for row, score in pairs if row >= 0])


@dataclass(frozen=True, slots=True)
class EvaluationImages:
    """Images of an evaluation set, with all texts that name them."""

    evaluation: RetrievalSet
    rows: Int64Array  # [num_rows]: row in the set for each row of the index
    texts_of_image: tuple[Int64Array, ...]

    @classmethod
    def of(cls, evaluation: RetrievalSet, image_ids: Int64Array) -> "EvaluationImages":
        """Take the ids in the set, `image_ids` [num_rows], one for each row of the index."""
        rows = np.searchsorted(evaluation.image_ids, image_ids)
        return cls(evaluation, rows, evaluation.texts_of_image)

    def describe(self, row: int) -> Description:
        image = self.rows[row]
        texts = [self.evaluation.texts[text] for text in self.texts_of_image[image][:_MAX_CAPTIONS]]
        source = f"{self.evaluation.name}, image {self.evaluation.image_ids[image]}"
        return Description(tuple(map(_shortened, texts)), source, "")

    def read(self, row: int) -> bytes:
        return next(self.evaluation.image_bytes([int(self.rows[row])]))


@dataclass(frozen=True, slots=True)
class ShardImages:
    """Images of shards.

    Memory holds 8 bytes per row and the code of its source; captions and offsets are read on demand.
    """

    sidecars: tuple[str, ...]  # the Parquet files next to the tars
    first_places: Int64Array  # [num_sidecars + 1], place of each sidecar's first sample
    places: Int64Array  # [num_rows], place in the sequence of all samples; -1 for a key that no shard holds
    sources: Sources | None  # of the rows

    @classmethod
    def of(cls, folder: str, keys: "pl.Series") -> "ShardImages":
        """Look up `keys` (one per row of the index) in the shards of a folder.

        Raises:
            InputError: for a folder without shards, for a sidecar without keys, and if no key is found.
        """
        import polars as pl

        sidecars = [stem + SIDECAR for stem in shard_stems(folder)]
        if not sidecars:
            raise InputError(f"{folder}: holds no shards (<name>.tar with <name>.parquet)")
        with foreign(folder, "set of sidecars", "build the shards again"):
            counts = [int(pl.scan_parquet(path).select(pl.len()).collect().item()) for path in sidecars]
            table = pl.scan_parquet(sidecars)
            # Names of sources repeat; as categories they take 4 bytes per row.
            has_source = "source" in table.collect_schema().names()
            source = (pl.col("source") if has_source else pl.lit("")).cast(pl.Categorical)
            known = table.select("key", source.alias("source")).with_row_index("place")
            found = (
                keys.cast(pl.String).alias("key").to_frame().lazy()
                .join(known.unique("key", keep="first"), on="key", how="left", maintain_order="left")
                .select(pl.col("place").cast(pl.Int64).fill_null(-1), "source")
                .collect()
            )  # fmt: skip
        places = found["place"].to_numpy()
        if (places < 0).all():
            raise InputError(
                f"{folder}: none of the index's {len(keys)} keys is in these shards; give --images FOLDER"
            )
        first_places = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return cls(tuple(sidecars), first_places, places, Sources.of(found["source"]))

    def describe(self, row: int) -> Description:
        if self.places[row] < 0:
            return Description((), "not in these shards", "")
        sidecar, sample = self._sample(row)
        shard = Path(sidecar).stem
        where = f"shard {shard}, {sample['key']}"
        source = f"{sample['source']}, {where}" if sample.get("source") else where
        return Description((_shortened(sample.get("caption") or ""),), source, sample.get("url") or "")

    def read(self, row: int) -> bytes:
        if self.places[row] < 0:
            raise InputError(f"row {row} of the index is in no shard")
        sidecar, sample = self._sample(row)
        with ByteRanges(tar_of(sidecar)) as images:
            return images.read(sample.get("offset_bytes"), sample.get("size_bytes"), f"{sample['key']}.jpg")

    def _sample(self, row: int) -> tuple[str, dict[str, Any]]:
        import polars as pl

        place = self.places[row]
        number = int(np.searchsorted(self.first_places, place, side="right")) - 1
        within = int(place - self.first_places[number])
        path = self.sidecars[number]
        columns = ("key", "offset_bytes", "size_bytes", "caption", "source", "url")
        table = pl.scan_parquet(path)
        known = [name for name in columns if name in table.collect_schema().names()]
        return path, table.select(known).slice(within, 1).collect().row(0, named=True)


def _ends_with_one_side(table: str) -> bool:
    """Return whether only the last rows lack an image or a caption: there were more of the other side."""
    import polars as pl

    rows = pl.scan_parquet(table)
    for name in {"image_path", "caption"} & set(rows.collect_schema().names()):
        is_there = pl.col(name).is_not_null()
        nulls, last = (
            rows.select(pl.col(name).null_count(), last=is_there.reverse().arg_max()).collect().row(0)
        )
        if nulls and nulls == last:
            return True
    return False


@dataclass(frozen=True, slots=True)
class FileImages:
    """Local files from the metadata that `cnclip embed --images` and clip-retrieval write."""

    tables: tuple[str, ...]  # the metadata, read a row at a time
    first_rows: Int64Array  # [num_tables + 1], row of the index of each table's first row
    folder: str  # base of relative paths, which no path may leave
    are_pairs: bool  # whether each image has its caption; otherwise texts and images only share the table

    @classmethod
    def of(cls, metadata_folder: str, folder: str) -> "FileImages":
        import polars as pl

        tables = _metadata_files(metadata_folder)
        counts = [int(pl.scan_parquet(path).select(pl.len()).collect().item()) for path in tables]
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return cls(tuple(tables), starts, folder, not any(map(_ends_with_one_side, tables)))

    def describe(self, row: int) -> Description:
        found = self._row(row)
        source = Path(found.get("image_path") or "no file").name
        caption = found.get("caption") if self.are_pairs else None
        return Description((_shortened(caption or ""),), source, found.get("url") or "")

    def read(self, row: int) -> bytes:
        path = self._row(row).get("image_path")
        if not path:
            raise InputError(f"row {row} of the index names no file")
        root = Path(self.folder).resolve()
        place = (root / path).resolve()
        if not place.is_relative_to(root):
            raise InputError(f"{place}: lies outside {root}; give --images with the folder that holds it")
        try:
            return read_image(str(place))
        except BadImageError as error:
            raise InputError(f"{place}: cannot be read ({error}); give --images FOLDER") from None

    def _row(self, row: int) -> dict[str, Any]:
        import polars as pl

        number = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        table = pl.scan_parquet(self.tables[number])
        known = [name for name in ("image_path", "caption", "url") if name in table.collect_schema().names()]
        within = int(row - self.first_rows[number])
        return table.select(known).slice(within, 1).collect().row(0, named=True)


def galleries_of_run(checkpoint: ModelSource, target: str) -> list[Gallery]:
    """Return the indices of the run's `index` stage for this checkpoint, one for each evaluation set.

    Raises:
        InputError: if the stage has not indexed that model.
    """
    if checkpoint.run_folder is None:
        raise ConfigError(f"{target}: a single weights file has no index; give --index FOLDER")
    stage = Path(checkpoint.path).parent.name
    galleries = []
    for source in sets_of_run(checkpoint.run_folder).retrieval:
        indices, features = (
            store.join(checkpoint.run_folder, name, source.name, stage) for name in ("index", "embed")
        )
        if store.exists(store.join(indices, "image.index")):
            image_ids = _metadata(features, ("image_id",))["image_id"].to_numpy()
            evaluation = read_retrieval_set(source.folder, source.name)
            if not np.isin(image_ids, evaluation.image_ids).all():
                raise InputError(f"{features}: of another set than {source.folder}; embed again")
            images = EvaluationImages.of(evaluation, image_ids)
            galleries.append(_gallery(source.name, indices, images, len(image_ids), None, features))
    if not galleries:
        raise InputError(
            f"{checkpoint.run_folder}: the run has not indexed {stage}; run `cnclip run {target}`"
            " first, or give --index FOLDER"
        )
    return galleries


def open_gallery(
    index_folder: str,
    *,
    embeddings_folder: str | None = None,
    images_folder: str | None = None,
    run_folder: str | None = None,
    parameters: str | None = None,
) -> Gallery:
    """Return a gallery of an index by `cnclip index`, or of a folder with `image.index` by `cnclip eval`.

    `embeddings_folder` is the folder that was indexed (default: the index's folder); its `metadata/`
    describes each row. `images_folder` holds the images (shards, evaluation sets, or the base of file
    names); the default is the run's folder, or the paths as given. `parameters` is FAISS's search string,
    such as `nprobe=16`; the default is what the index was tuned to.

    Raises:
        InputError: if one of them is missing or does not match.
        ConfigError: if it is not clear which set or folder is meant.
    """
    metadata_folder = embeddings_folder or index_folder
    metadata = _metadata(metadata_folder, ("key", "image_id", "image_path"))
    images: GalleryImages
    if "image_path" in metadata.columns:
        metadata = metadata.drop_nulls()  # rows of texts beyond the last image
        images = FileImages.of(metadata_folder, images_folder or ".")
    elif images_folder is None and run_folder is None:
        raise ConfigError(f"{index_folder}: give --images FOLDER, with the shards or the evaluation sets")
    elif "key" in metadata.columns:
        shards = images_folder or store.join(str(run_folder), "shards")
        images = ShardImages.of(shards, metadata["key"])
    else:
        sources = (
            find_sets(images_folder).retrieval
            if images_folder is not None
            else sets_of_run(str(run_folder)).retrieval
        )
        image_ids = metadata["image_id"].to_numpy()
        images = EvaluationImages.of(_set_of(image_ids, sources, metadata_folder), image_ids)
    name = Path(index_folder).resolve().name
    return _gallery(name, index_folder, images, metadata.height, parameters, metadata_folder)


def _gallery(
    name: str, folder: str, images: GalleryImages, num_rows: int, parameters: str | None, features: str
) -> Gallery:
    found: Callable[[Float32Array, int], Found]
    tuned: Tuned | None = None
    if store.exists(store.join(folder, "image.index")):
        if parameters:
            raise ConfigError(f"{folder}: search parameters apply to an index by `cnclip index`")
        whole = read_index(store.join(folder, "image.index"))
        dim, count, model = int(whole.d), int(whole.ntotal), read_identity(folder) or read_identity(features)

        def found(query_1D: Float32Array, k: int) -> Found:
            return search(whole, query_1D, k)
    else:
        parted = PartedIndex.open(folder)
        if parted.metric == "l2":
            raise InputError(
                f"{folder}: an index of L2 distances; features of a model are compared by cosine"
            )
        dim, count, model = parted.dim, parted.num_rows, parted.model
        tuned = parted.tuned if parameters is None else None

        def found(query_1D: Float32Array, k: int) -> Found:
            return parted.search(query_1D, k, parameters=parameters)

    if count != num_rows:
        raise InputError(
            f"{folder}: holds {count} rows, but the metadata has {num_rows}: it belongs to other embeddings"
        )
    # report damaged parts and wrong parameters now, not at the first search
    found(np.full((1, dim), dim**-0.5, dtype=np.float32), 1)
    sources = images.sources if isinstance(images, ShardImages) else None
    return Gallery(name, dim, count, images, found, model, sources, tuned)


def _metadata_files(folder: str) -> list[str]:
    """Return the paths of `metadata_N.parquet` in order of their numbers.

    Raises:
        InputError: if the folder has no such file.
    """
    place = store.join(folder, "metadata")
    names = [name for name in store.list_files(place) if re.fullmatch(r"metadata_\d+\.parquet", name)]
    if not names:
        raise InputError(
            f"{place}: holds no metadata_0.parquet; give --embeddings FOLDER, the folder that was indexed"
        )
    names.sort(key=lambda name: int(re.findall(r"\d+", name)[0]))
    return [store.join(place, name) for name in names]


def _metadata(folder: str, columns: Sequence[str]) -> "pl.DataFrame":
    """Return the first of `columns` that the metadata has, with the rows of all files in numeric order."""
    import polars as pl

    paths = _metadata_files(folder)
    with foreign(paths[0], "table", "embed again"):
        table = pl.scan_parquet(paths)
        known = table.collect_schema().names()
        for column in columns:
            if column in known:
                return table.select(column).collect()
    raise InputError(
        f"{paths[0]}: has no column {' or '.join(columns)} to find images by; found: {', '.join(known)}"
    )


def _set_of(image_ids: Int64Array, sources: Sequence[RetrievalSource], where: str) -> RetrievalSet:
    """Return the set that holds all these images; if there are several, the one without other images."""
    sets = [read_retrieval_set(source.folder, source.name) for source in sources]
    fitting = [item for item in sets if np.isin(image_ids, item.image_ids).all()]
    exact = [item for item in fitting if item.num_images == len(np.unique(image_ids))]
    choice = exact or fitting
    if not choice:
        raise InputError(f"{where}: no evaluation set holds its images; give --images FOLDER")
    if len(choice) > 1:
        raise ConfigError(
            f"{where}: its image ids fit {', '.join(item.name for item in choice)} equally; give --images"
            " FOLDER with only the right set"
        )
    return choice[0]


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CAPTION_CHARACTERS else f"{text[: MAX_CAPTION_CHARACTERS - 1]}…"
