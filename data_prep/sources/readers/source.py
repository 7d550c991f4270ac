"""A source whose images are on disk, and what all its readers share: addresses, reasons, what they return."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote, urlencode

import polars as pl

from data_prep.sources.local_server import HOST, PACKED, UNPACKED
from data_prep.sources.text_rows import ListCaptions, Malformed, check_encoding
from pipeline.core.config import IN_DIGEST_IF_SET
from pipeline.core.records import DropReason
from pipeline.core.shard_format import all_captions

UNPAIRED = DropReason("unpaired")  # a text whose image_ids are empty: the pairing is unknown
IMAGE_MISSING = DropReason("image_missing")  # a text that names an image which is not there
IMAGE_OUTSIDE = DropReason("image_outside")  # a row that names an image outside its source's folder
NOT_DOWNLOADED = DropReason("not_downloaded")  # img2dataset's own table says so
IMAGE_AT = "picture_at"
_OWN = ("url", "caption", IMAGE_AT)  # columns of every caption table of these sources

PackedKind = Literal[
    "cn_clip_tsv", "cn_clip_lmdb", "img2dataset", "shards", "webdataset", "huggingface", "folder"
]
# Settings of some kinds only: elsewhere they would do nothing.
_KINDS_OF: Mapping[str, tuple[PackedKind, ...]] = {
    "image_column": ("huggingface",),
    "caption_column": ("huggingface", "webdataset", "folder"),
    "list_captions": ("huggingface", "webdataset", "folder", "shards"),
    "encoding": ("webdataset", "folder"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSource:
    """One `[[corpus.sources]]` entry whose images are on disk in a format of the ecosystem."""

    kind: PackedKind
    """Format on disk: Chinese-CLIP's TSV or LMDB, img2dataset output, the shards of another run, webdataset
    tars, a folder of Hugging Face `datasets`, or a folder of images. `webdataset` and `folder` take the
    caption of each image from `.txt`, `.caption` or `.json` of the same name.
    """
    path: str
    """Local folder that holds `<split>_imgs.tsv`, `lmdb/<split>`, `00000.tar` with `00000.parquet`, or what
    the kind needs. For `webdataset` and `huggingface` also a file or a pattern such as `sets/{a,b}/**/*.tar`.
    """
    carry_columns: tuple[str, ...] = ()
    """Further columns to keep, from the sidecars of shards or from a Hugging Face table."""
    name: str
    """The source's name in the funnel."""
    split: str = "train"
    """Split to read, for Chinese-CLIP's formats and for Hugging Face folders that have splits."""
    exempt_from: tuple[str, ...] = ()
    """Rules that do not apply to this source."""
    image_column: str | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """Column of a Hugging Face table with images or with their file names. Unset: found by type and name."""
    caption_column: str | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """Column of captions of a Hugging Face table, or key in `.json` files, which are then the only captions.
    Unset: `caption`, `captions`, `text`, `texts` or `txt`.
    """
    list_captions: ListCaptions | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """What a list of captions becomes: a row for `each`, a row with the `first`, or a row that keeps all, of
    which training draws one in each epoch at `random`. Unset: lists are refused.
    """
    encoding: str | None = field(default=None, metadata=IN_DIGEST_IF_SET)
    """Encoding of the texts next to images, such as `gb18030`. Unset: UTF-8."""

    def __post_init__(self) -> None:
        for name, kinds in _KINDS_OF.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise ValueError(f"{name} is a setting of kind {' and '.join(kinds)}, not of {self.kind}")
        if own := sorted({*self.carry_columns} & {*_OWN, all_captions("caption")}):
            raise ValueError(f"carry_columns names {own[0]}, which a caption table has anyway; take it out")
        if self.encoding is not None:
            check_encoding(self.encoding)


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a piece of a source, in order."""

    rows: pl.DataFrame  # url, caption, picture_at (unless the images are asked for by url), carried columns
    dropped: Mapping[DropReason, pl.DataFrame] = field(
        default_factory=dict
    )  # url and caption of rows left out
    malformed: list[Malformed] = field(default_factory=list)


def address(source: PackedSource, relative: str = "", **query: Any) -> str:
    """Return where the run's own server has an image: its place in a file of the source's folder."""
    return f"http://{HOST}/{PACKED}/{quote(source.name)}/{quote(relative)}?{urlencode(query)}"


def address_in_run(source: PackedSource, relative: str) -> str:
    """Return how the addresses of images begin that lie in a file of the run's folder."""
    return f"http://{HOST}/{UNPACKED}/{quote(source.name)}/{quote(relative)}?"


def known_by(source: PackedSource, image_id: object) -> str:
    """Return what a row without an address of its own is known by."""
    return f"http://{HOST}/{PACKED}/{quote(source.name)}/{source.split}/{image_id}"
