"""An evaluation set without the images that cannot be decoded: counted, so that its counts tell."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from eval.datasets.cnclip_tsv import ImageStore, RetrievalSet
from pipeline.core.arrays import Int64Array
from pipeline.core.records import InputError

if TYPE_CHECKING:
    import torch


class UnreadableImage(InputError):
    """An image of an evaluation set cannot be decoded."""


@dataclass(frozen=True, slots=True)
class _Subset:
    """Some of a set's images, by their rows there."""

    images: ImageStore
    rows: Int64Array

    def read(self, rows: Sequence[int] | Int64Array) -> Iterator[bytes]:
        return self.images.read(self.rows[np.asarray(rows, dtype=np.int64)])


def readable_subset(evaluation: RetrievalSet) -> tuple[RetrievalSet, str]:
    """The set without unreadable images and without texts that only these answer, and a note that counts.

    Decodes every image. Raises InputError where none is left.
    """
    from training.model.preprocess import preprocess

    def is_readable(row: int) -> bool:
        try:
            preprocess([next(iter(evaluation.image_bytes([row])))], 1)
        except InputError:
            return False
        return True

    kept = np.flatnonzero([is_readable(row) for row in range(evaluation.num_images)])
    if not len(kept):
        raise InputError(f"{evaluation.images_path}: not one image can be decoded; fetch the set again")
    new_row = np.full(evaluation.num_images, -1, dtype=np.int64)
    new_row[kept] = np.arange(len(kept))
    answers = [new_row[rows][new_row[rows] >= 0] for rows in evaluation.images_of_text]
    texts = [
        row
        for row, (old, new) in enumerate(zip(evaluation.images_of_text, answers, strict=True))
        if len(new) or not len(old)
    ]
    bad = np.setdiff1d(np.arange(evaluation.num_images), kept)
    note = (
        f"{evaluation.name}: {len(bad)} images cannot be decoded (first: {evaluation.image_ids[bad[0]]});"
        f" they are left out, with {evaluation.num_texts - len(texts)} texts that only they answer: not"
        " comparable with published figures"
    )
    return (
        replace(
            evaluation,
            image_ids=evaluation.image_ids[kept],
            text_ids=evaluation.text_ids[texts],
            texts=tuple(evaluation.texts[row] for row in texts),
            images_of_text=tuple(answers[row] for row in texts),
            images=_Subset(evaluation.images, kept),
        ),
        note,
    )


def decoded_batches(
    evaluation: RetrievalSet, image_size_px: int, batch_size: int
) -> "Iterator[torch.Tensor]":
    """Yield image_BCHW float32, normalised, in row order.

    Raises:
        UnreadableImage: if an image cannot be decoded; it names the image's id.
    """
    from training.model.preprocess import preprocess

    for start in range(0, evaluation.num_images, batch_size):
        rows = range(start, min(start + batch_size, evaluation.num_images))
        encoded = list(evaluation.image_bytes(rows))
        try:
            yield preprocess(encoded, image_size_px)
        except InputError:
            for row, data in zip(rows, encoded, strict=True):  # once more, to say which image it is
                try:
                    preprocess([data], image_size_px)
                except InputError as error:
                    image_id = evaluation.image_ids[row]
                    raise UnreadableImage(f"{evaluation.images_path}: image {image_id}: {error}") from None
            raise
