"""What a score must beat: chance, and a nearest neighbour that knows only letters and pixels.

The pixel baseline answers a query text with the most similar training caption (cosine of TF-IDF over
character n-grams), takes the mean of the training images that bear this caption, and ranks the gallery by
pixel distance to it at 16 × 16 RGB. The other way round, a query image finds its nearest training image,
and the gallery's texts are ranked by similarity to that image's caption. It solves what is memorised or
drawn alike, such as flags, and nothing that needs understanding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from eval.datasets.cnclip_tsv import RetrievalSet
from eval.metrics.recall import (
    Positives,
    RetrievalScores,
    chance_recall_at_k,
    ranks_from_scores,
    retrieval_scores,
)
from eval.retrieval.measure import RetrievalResult, image_queries
from pipeline.core.arrays import Float64Array, Int64Array, UInt8Array
from pipeline.core.files.images import BadImageError, decode_upright
from pipeline.core.records import InputError
from pipeline.core.shard_format import ByteRanges, read_sidecar_frame, sidecar_of

SIDE_PX = 16
NGRAM_CHARACTERS = (1, 3)
MAX_TRAINING_IMAGES = 200_000  # shards are shuffled, so the first ones are a fair sample of a larger corpus
_BLOCK_ELEMENTS = 1 << 22


def chance(evaluation: RetrievalSet) -> RetrievalScores:
    """Return the expected recall of random orders, in percent, in closed form."""
    num_images = np.array([len(rows) for rows in evaluation.images_of_text])
    t2i = chance_recall_at_k(evaluation.num_images, num_images)
    if not evaluation.image_to_text:
        return retrieval_scores(t2i, None)
    num_texts = np.array([len(rows) for rows in evaluation.texts_of_image])
    return retrieval_scores(t2i, chance_recall_at_k(evaluation.num_texts, num_texts[num_texts > 0]))


@dataclass(frozen=True, slots=True)
class PixelBaseline:
    """Training captions and images, ready to answer evaluation sets.

    Ties go to the training caption that comes first in lexical order, to the training image that comes
    first in the shards, and in the gallery to the lower id.
    """

    captions: tuple[str, ...]  # distinct, in lexical order
    caption_of_image: Int64Array  # [num_images], row in `captions`
    pixels_ND: UInt8Array  # [num_images, 768], RGB at 16 × 16
    vectorizer: Any  # scikit-learn's TfidfVectorizer, fitted on `captions`
    caption_vectors: Any  # scipy CSR matrix [num_captions, num_ngrams], unit-norm

    @classmethod
    def from_shards(cls, tar_paths: Sequence[str], *, caption_column: str = "caption") -> "PixelBaseline":
        """Read the first images of these shards (at most `MAX_TRAINING_IMAGES`) through their sidecars.

        Raises:
            InputError: for a sidecar without the columns or an image that is missing; it names shard and key.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer

        pairs = list(islice(_training_images(tar_paths, caption_column), MAX_TRAINING_IMAGES))
        if not pairs:
            raise InputError("the pixel baseline found no training image; give it at least one shard")
        captions = sorted({caption for caption, _ in pairs})
        row_of_caption = {caption: row for row, caption in enumerate(captions)}
        vectorizer = TfidfVectorizer(analyzer="char", ngram_range=NGRAM_CHARACTERS)
        return cls(
            captions=tuple(captions),
            caption_of_image=np.array([row_of_caption[caption] for caption, _ in pairs], dtype=np.int64),
            pixels_ND=np.stack([pixels for _, pixels in pairs]),
            caption_vectors=vectorizer.fit_transform(captions),
            vectorizer=vectorizer,
        )

    def evaluate(self, evaluation: RetrievalSet) -> RetrievalResult:
        """Rank the directions that are scored; check the set by `check_scorable` before."""
        gallery_ND = np.stack(
            [
                thumbnail(data, f"{evaluation.images_path}: image {evaluation.image_ids[row]}")
                for row, data in enumerate(evaluation.image_bytes(range(evaluation.num_images)))
            ]
        )
        return RetrievalResult(
            self._text_to_image(evaluation, gallery_ND),
            self._image_to_text(evaluation, gallery_ND) if evaluation.image_to_text else None,
        )

    def _text_to_image(self, evaluation: RetrievalSet, gallery_ND: UInt8Array) -> Int64Array:
        positives = Positives.of(evaluation.images_of_text)
        similar = self._most_similar_caption(evaluation.texts)
        order = np.argsort(self.caption_of_image, kind="stable")
        starts = np.searchsorted(self.caption_of_image[order], np.arange(len(self.captions) + 1))
        distinct, query_of_text = np.unique(similar, return_inverse=True)
        # Rounded to whole pixel values: then distances are exact, and equal images are equally far.
        mean_SD = np.stack(
            [self.pixels_ND[order[starts[c] : starts[c + 1]]].mean(axis=0).round() for c in distinct]
        )
        ranks = np.empty(evaluation.num_texts, dtype=np.int64)
        for start, stop in _blocks(evaluation.num_texts, len(gallery_ND)):
            closeness = _closeness(mean_SD[query_of_text[start:stop]], gallery_ND)
            ranks[start:stop] = ranks_from_scores(closeness, positives.block(start, stop))
        return ranks

    def _image_to_text(self, evaluation: RetrievalSet, gallery_ND: UInt8Array) -> Int64Array:
        queries, positives = image_queries(evaluation)
        nearest_caption = self.caption_of_image[self._nearest_image(gallery_ND[queries])]
        text_vectors = self.vectorizer.transform(evaluation.texts)
        ranks = np.empty(len(queries), dtype=np.int64)
        for start, stop in _blocks(len(queries), evaluation.num_texts):
            similarity = (self.caption_vectors[nearest_caption[start:stop]] @ text_vectors.T).toarray()
            ranks[start:stop] = ranks_from_scores(similarity, positives.block(start, stop))
        return ranks

    def _most_similar_caption(self, texts: Sequence[str]) -> Int64Array:
        """Return the row of the training caption nearest to each text; the first if nothing is shared."""
        vectors = self.vectorizer.transform(texts)
        rows = np.empty(len(texts), dtype=np.int64)
        for start, stop in _blocks(len(texts), len(self.captions)):
            rows[start:stop] = (vectors[start:stop] @ self.caption_vectors.T).toarray().argmax(axis=1)
        return rows

    def _nearest_image(self, query_QD: UInt8Array) -> Int64Array:
        best = np.full(len(query_QD), -np.inf)
        rows = np.zeros(len(query_QD), dtype=np.int64)
        for start, stop in _blocks(len(self.pixels_ND), len(query_QD)):
            closeness = _closeness(query_QD.astype(np.float64), self.pixels_ND[start:stop])
            candidate = closeness.argmax(axis=1)
            value = closeness[np.arange(len(query_QD)), candidate]
            better = value > best
            best[better], rows[better] = value[better], candidate[better] + start
        return rows


def thumbnail(data: bytes, name: str) -> UInt8Array:
    """Return RGB at 16 × 16, flat [768], each pixel the mean of what it covers.

    Raises:
        InputError: for bytes that are not an image; it begins with `name`.
    """
    try:
        small = decode_upright(data).resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    except BadImageError as error:
        raise InputError(f"{name}: cannot be decoded ({error})") from None
    return np.asarray(small, dtype=np.uint8).reshape(-1)


def _training_images(tar_paths: Sequence[str], caption_column: str) -> Iterator[tuple[str, UInt8Array]]:
    for tar_path in tar_paths:
        samples = read_sidecar_frame(
            sidecar_of(tar_path), ("key", "offset_bytes", "size_bytes", caption_column)
        )
        with ByteRanges(tar_path) as images:
            for key, offset_bytes, size_bytes, caption in samples.iter_rows():
                if caption is None:
                    continue  # a carried column may have gaps
                name = f"{key}.jpg"
                yield caption, thumbnail(images.read(offset_bytes, size_bytes, name), f"{tar_path}: {name}")


def _closeness(query_QD: Float64Array, gallery_ND: UInt8Array) -> Float64Array:
    """Return minus the squared distance, up to a constant of the query.

    These are whole numbers, so exact in float64.
    """
    gallery = gallery_ND.astype(np.float64)
    closeness_QN: Float64Array = 2 * (query_QD @ gallery.T) - np.einsum("nd,nd->n", gallery, gallery)
    return closeness_QN


def _blocks(count: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK_ELEMENTS // width)
    for start in range(0, count, step):
        yield start, min(start + step, count)
