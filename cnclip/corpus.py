"""`cnclip.Corpus`: a finished corpus as rows, samples, a torch loader, or another library's data set."""

import bisect
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import polars as pl

from data_prep.accounting.funnel import STEPS, by_source
from data_prep.formats.shards import CorpusShard, corpus_shards
from pipeline.core import store
from pipeline.core.records import InputError
from pipeline.core.run import Run, read_manifest
from pipeline.core.shard_format import ByteRangePool, read_sidecar_frame

if TYPE_CHECKING:
    import torch
    from PIL import Image

_SIDECARS_KEPT = 8  # in memory at once while reading samples


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair of the corpus."""

    key: str
    caption: str  # the first, if the sample keeps several
    url: str
    source: str
    image_bytes: bytes  # the stored JPEG

    @property
    def image(self) -> "Image.Image":
        """Return the upright RGB image."""
        from pipeline.core.files.images import decode_upright

        return decode_upright(self.image_bytes)


class Corpus:
    """A corpus of finished shards: its pairs in shard order, numbered from 0."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the shards of a run's TOML, a run's folder, or a folder of shards.

        Raises:
            InputError: if the path has no finished shards of this project.
        """
        self.folder = _folder(os.fspath(path))
        self._shards: list[CorpusShard] = corpus_shards(self.folder)
        self._ends = list(itertools.accumulate(shard.num_samples for shard in self._shards))
        self._sidecars: dict[int, pl.DataFrame] = {}
        self._tars: ByteRangePool | None = None

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:
        return f"cnclip.Corpus({self.folder!r}, {len(self):,} pairs in {len(self._shards):,} shards)"

    def __getstate__(self) -> dict[str, Any]:
        """Omit open files, because workers of a loader open their own."""
        return {**self.__dict__, "_tars": None, "_sidecars": {}}

    @property
    def rows(self) -> pl.LazyFrame:
        """Return the sidecars of all shards as one lazy table with a row per pair, read only by `collect`."""
        return pl.scan_parquet([shard.table for shard in self._shards], extra_columns="ignore")

    @property
    def tars(self) -> list[str]:
        """Return the paths of the tar files in order; they may have samples that are not in the corpus."""
        return [shard.tar for shard in self._shards]

    def drop_reasons(self) -> pl.DataFrame:
        """Return stage, source, reason and rows of all drops before these shards, most frequent first.

        Raises:
            InputError: if the shards are not in their run's folder.
        """
        run = Run(self.folder, 0, "local", 1, ())
        found = [
            {"stage": stage, "source": source, "reason": reason, "rows": rows}
            for stage in ("corpus", *STEPS)
            if (manifest := read_manifest(run, stage)) is not None
            for source, counts in by_source(manifest).items()
            for reason, rows in counts["dropped"].items()
        ]
        if read_manifest(run, "corpus") is None:
            raise InputError(f"{self.folder}: not a run's folder, so the drops are unknown; give the run's")
        schema = {"stage": pl.String, "source": pl.String, "reason": pl.String, "rows": pl.Int64}
        return pl.DataFrame(found, schema=schema).sort("rows", descending=True, maintain_order=True)

    def concepts(self) -> pl.DataFrame:
        """Return entry and rows of each concept in these shards, most frequent first.

        If the shards are in the folder of the run that made them, `count` has the rows before balancing.

        Raises:
            InputError: if the corpus was not balanced.
        """
        if "concepts" not in self.rows.collect_schema():
            raise InputError(
                f"{self.folder}: its rows have no concepts; make it with [concepts] and [balance]"
            )
        entries = self.rows.select(entry=pl.col("concepts")).explode("entry", empty_as_null=False)
        found = entries.group_by("entry").agg(rows=pl.len()).collect(engine="streaming")
        path = store.join(self.folder, "count_concepts", "counts.parquet")
        if store.exists(path):
            counts = pl.read_parquet(path, columns=["entry", "count"])
            counts = counts.with_columns(pl.col("entry").str.strip_chars())
            found = counts.join(found, on="entry", how="left").with_columns(pl.col("rows").fill_null(0))
        return found.sort("rows", "entry", descending=[True, False])

    def __getitem__(self, row: int) -> Sample:
        """Return one pair.

        This reads one byte range of one tar.

        Raises:
            IndexError: if the row does not exist.
            InputError: if the shard is damaged.
        """
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} pairs")
        row %= len(self)
        number = bisect.bisect_right(self._ends, row)
        place = row - (self._ends[number] - self._shards[number].num_samples)
        key, offset, size, caption, url, source = self._sidecar(number).row(place)
        if self._tars is None:
            self._tars = ByteRangePool(str)
        data = self._tars.read(self._shards[number].tar, offset, size, f"{key}.jpg")
        return Sample(key, caption, url, source, data)

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def loader(
        self,
        *,
        batch_size: int = 256,
        image_size_px: int = 224,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        transform: "Callable[[Image.Image], torch.Tensor] | None" = None,
    ) -> "torch.utils.data.DataLoader[tuple[torch.Tensor, list[str]]]":
        """Return a torch loader of (image_BCHW float32, captions).

        Args:
            batch_size: pairs in a batch; the last one may be smaller.
            image_size_px: side of the square to which images are resized, as for Chinese CLIP, without
                `transform`.
            shuffle: whether to use a random order, which `seed` determines.
            seed: seed of the order.
            num_workers: processes that read ahead; 0 reads in this process.
            transform: function from an RGB image to a tensor that replaces Chinese CLIP's preprocessing.
        """
        import torch

        return torch.utils.data.DataLoader(
            cast("torch.utils.data.Dataset[Any]", _Pairs(self, image_size_px, transform)),
            batch_size=batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(seed),
            num_workers=num_workers,
            collate_fn=_collate,
        )

    def webdataset(self, **options: Any) -> Any:
        """Return a `webdataset.WebDataset` over the tars, with `jpg` decoded to RGB and `txt` to text.

        It leaves out samples that the sidecars do not list. `options` are passed to WebDataset; by default
        it reads shards in order.
        """
        try:
            import webdataset
        except ImportError:
            raise InputError("webdataset is not installed: pip install webdataset") from None
        tars = webdataset.WebDataset(self.tars, **{"shardshuffle": False, "empty_check": False, **options})
        return tars.select(_Listed(self._shards)).decode("pilrgb")

    def datasets(self) -> Any:
        """Return a streaming `datasets.IterableDataset` of key, caption, url, source and image."""
        try:
            import datasets
        except ImportError:
            raise InputError("datasets is not installed: pip install datasets") from None
        features = datasets.Features(
            {
                **{name: datasets.Value("string") for name in ("key", "caption", "url", "source")},
                "image": datasets.Image(),
            }
        )
        shards = list(range(len(self._shards)))
        return datasets.IterableDataset.from_generator(
            _records, gen_kwargs={"corpus": self, "shards": shards}, features=features
        )

    def _sidecar(self, number: int) -> pl.DataFrame:
        if number not in self._sidecars:
            if len(self._sidecars) >= _SIDECARS_KEPT:
                self._sidecars.pop(next(iter(self._sidecars)))
            columns = ("key", "offset_bytes", "size_bytes", "caption", "url", "source")
            self._sidecars[number] = read_sidecar_frame(self._shards[number].table, columns)
        return self._sidecars[number]


class _Pairs:
    """A map-style data set for torch: row → (image tensor, caption)."""

    def __init__(self, corpus: Corpus, image_size_px: int, transform: Any) -> None:
        self._corpus = corpus
        self._image_size_px = image_size_px
        self._transform = transform

    def __len__(self) -> int:
        return len(self._corpus)

    def __getitem__(self, row: int) -> "tuple[torch.Tensor, str]":
        sample = self._corpus[row]
        if self._transform is not None:
            return self._transform(sample.image), sample.caption
        from training.model.preprocess import preprocess

        return preprocess([sample.image_bytes], self._image_size_px)[0], sample.caption


class _Listed:
    """Tells which of webdataset's samples are in the sidecar of their tar; a tar's come one after another."""

    def __init__(self, shards: list[CorpusShard]) -> None:
        self._tables = {shard.tar: shard.table for shard in shards}
        self._tar = ""
        self._keys = frozenset[str]()

    def __call__(self, sample: dict[str, Any]) -> bool:
        if sample["__url__"] != self._tar:
            self._tar = sample["__url__"]
            self._keys = frozenset(read_sidecar_frame(self._tables[self._tar], ("key",))["key"])
        return sample["__key__"] in self._keys


def _collate(pairs: "list[tuple[torch.Tensor, str]]") -> "tuple[torch.Tensor, list[str]]":
    import torch

    return torch.stack([image for image, _ in pairs]), [caption for _, caption in pairs]


def _records(corpus: Corpus, shards: list[int]) -> Iterator[dict[str, Any]]:
    for number in shards:
        end = corpus._ends[number]
        for row in range(end - corpus._shards[number].num_samples, end):
            sample = corpus[row]
            yield {
                "key": sample.key,
                "caption": sample.caption,
                "url": sample.url,
                "source": sample.source,
                "image": {"bytes": sample.image_bytes, "path": None},
            }


def _folder(path: str) -> str:
    is_recipe = os.path.basename(path) == path and "." not in path and not store.exists(path)
    if not path.endswith(".toml") and not is_recipe:
        return path
    from pipeline.catalog import load

    run, _ = load(path)
    return run.folder
