"""Searches galleries with one model: turns queries into features and rows into results for the page."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from eval.features.encoder import EvaluationEncoder
from eval.features.model_identity import check_same_model, identify
from eval.serve.gallery import Gallery
from eval.serve.sources import MAX_LOOKED_AT
from pipeline.core.arrays import Float32Array
from pipeline.core.files.images import BadImageError, decode_upright
from pipeline.core.records import InputError
from pipeline.core.shard_format import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS

MAX_QUERY_CHARACTERS = 1000
MAX_SOURCES = 200  # the largest ones of a gallery, which the page offers as filters
_THUMBNAIL_PX = 320


class Refusal(Exception):
    """A refused request: an HTTP status and one line for the user."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Asked:
    """Where to search, and which results to show."""

    gallery: int
    k: int
    min_score: float  # cosine
    source: str | None = None  # only its images
    row: int | None = None  # row that is the query; left out of its own results


@dataclass(frozen=True, slots=True)
class Searcher:
    """One model with galleries of its features.

    Raises:
        InputError: if a gallery is of another model.
    """

    encoder: EvaluationEncoder
    galleries: Sequence[Gallery]

    def __post_init__(self) -> None:
        dim = self.encoder.base.model.config.embed_dim
        for gallery in self.galleries:
            if gallery.dim != dim:
                raise InputError(
                    f"{gallery.name}: an index of width {gallery.dim}, but {self.encoder.name} gives {dim}:"
                    " it belongs to another model"
                )
        if any(gallery.model is not None for gallery in self.galleries):
            own = identify(self.encoder.base.model, self.encoder.base.decode)
            for gallery in self.galleries:
                check_same_model(gallery.name, gallery.model, own)

    def about(self) -> dict[str, Any]:
        return {
            "model": self.encoder.name,
            "galleries": [
                {
                    "name": item.name,
                    "rows": item.num_rows,
                    "sources": item.sources.largest(MAX_SOURCES) if item.sources else [],
                }
                for item in self.galleries
            ],
            "max_upload_bytes": MAX_IMAGE_BYTES,
            "max_pixels": MAX_IMAGE_PIXELS,
        }

    def text_feature(self, text: str) -> tuple[Float32Array, str]:
        """Return (feature [dim], a note if the text was truncated).

        Raises:
            Refusal: if the text is empty or too long.
        """
        text = text.strip()
        if not text:
            raise Refusal(HTTPStatus.BAD_REQUEST, "type a text or give an image")
        if len(text) > MAX_QUERY_CHARACTERS:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"at most {MAX_QUERY_CHARACTERS} characters")
        length = self.encoder.context_length
        cut = self.encoder.base.tokenizer.num_truncated([text], length)
        note = f"only the first {length - 2} word pieces were used" if cut else ""
        feature_D: Float32Array = self.encoder.texts([text])[0]
        return feature_D, note

    def image_feature(self, data: bytes) -> Float32Array:
        """Return the feature [dim] of an encoded image from a client.

        Raises:
            Refusal: if it is not an image or too large.
        """
        try:
            return self.encoder.image(data)
        except BadImageError as error:
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"unsupported image: {error}") from None

    def row_feature(self, number: int, row: int) -> Float32Array:
        """Return the feature [dim] of an image of a gallery.

        Raises:
            Refusal: if the image cannot be decoded.
        """
        try:
            return self.encoder.image(self.galleries[number].images.read(row))
        except BadImageError as error:
            raise Refusal(HTTPStatus.NOT_FOUND, f"row {row} cannot be decoded: {error}") from None

    def results(self, asked: "Asked", feature_D: Float32Array) -> tuple[list[dict[str, Any]], str]:
        """Return the results for the nearest rows of a gallery, best first, and a note.

        Raises:
            Refusal: if the gallery does not have the source.
        """
        gallery = self.galleries[asked.gallery]
        try:
            near = gallery.nearest(feature_D, asked.k + (asked.row is not None), asked.source)
        except KeyError:
            raise Refusal(HTTPStatus.BAD_REQUEST, "the gallery has no such source") from None
        pairs = [pair for pair in near.pairs if pair[0] != asked.row][: asked.k]
        found = []
        for row, score in pairs:
            if score >= asked.min_score:
                facts = gallery.images.describe(row)
                found.append(
                    {
                        "row": row,
                        "score": round(score, 6),
                        "captions": facts.captions,
                        "source": facts.source,
                        "url": facts.url,
                    }
                )
        note = ""
        if near.is_cut:
            note = f"only the nearest {MAX_LOOKED_AT:,} images were looked at for this source"
        return found, note

    def thumbnail(self, number: int, row: int) -> bytes:
        """Return a JPEG of at most 320 px.

        Raises:
            Refusal: if the gallery's image cannot be decoded.
        """
        from PIL import Image

        try:
            small = decode_upright(self.galleries[number].images.read(row))
        except BadImageError as error:
            raise Refusal(HTTPStatus.NOT_FOUND, f"row {row} cannot be decoded: {error}") from None
        small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.LANCZOS, reducing_gap=3.0)
        file = io.BytesIO()
        small.save(file, "JPEG", quality=88, subsampling=0)
        return file.getvalue()
