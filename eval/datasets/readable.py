"""Leaves images that cannot be decoded out of an evaluation set, and counts them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from eval.datasets.cnclip_tsv import ImageStore, RetrievalSet
from pipeline.core.arrays import Int64Array
from pipeline.core.files.image_files import summary
from pipeline.core.files.images import BadImageError, Decode, decode_square
from pipeline.core.records import InputError

if TYPE_CHECKING:
    import torch


class UnreadableImage(InputError):
    """An image of an evaluation set cannot be decoded."""


@dataclass(frozen=True, slots=True)
class _Subset:
    """Some of a set's images, by their rows in the set."""

    images: ImageStore
    rows: Int64Array

    def read(self, rows: Sequence[int] | Int64Array) -> Iterator[bytes]:
        return self.images.read(self.rows[np.asarray(rows, dtype=np.int64)])


def readable_subset(evaluation: RetrievalSet, decode: Decode = "upright") -> tuple[RetrievalSet, str]:
    """Return the set without unreadable images and texts that only these answer, and a note with the counts.

    This decodes every image.

    Raises:
        InputError: if no image can be decoded.
    """
    reasons = dict[int, str]()
    for row in range(evaluation.num_images):
        try:
            decode_square(next(iter(evaluation.image_bytes([row]))), 1, decode)
        except BadImageError as error:
            reasons[row] = str(error)
    kept = np.array([row for row in range(evaluation.num_images) if row not in reasons], dtype=np.int64)
    if not len(kept):
        raise InputError(f"{evaluation.images_path}: no image can be decoded; fetch the set again")
    new_row = np.full(evaluation.num_images, -1, dtype=np.int64)
    new_row[kept] = np.arange(len(kept))
    answers = [new_row[rows][new_row[rows] >= 0] for rows in evaluation.images_of_text]
    texts = [
        row
        for row, (old, new) in enumerate(zip(evaluation.images_of_text, answers, strict=True))
        if len(new) or not len(old)
    ]
    named = summary((f"image {evaluation.image_ids[row]}", reason) for row, reason in reasons.items())
    note = (
        f"{evaluation.name}: {len(reasons)} images cannot be decoded ({named});"
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
    evaluation: RetrievalSet, image_size_px: int, batch_size: int, decode: Decode = "upright"
) -> "Iterator[torch.Tensor]":
    """Yield image_BCHW float32, normalised, in row order.

    Raises:
        UnreadableImage: if an image cannot be decoded; it names the image's id.
    """
    for start in range(0, evaluation.num_images, batch_size):
        rows = np.arange(start, min(start + batch_size, evaluation.num_images))
        yield decoded_rows(evaluation, rows, image_size_px, decode)


def decoded_rows(
    evaluation: RetrievalSet, rows: Int64Array, image_size_px: int, decode: Decode = "upright"
) -> "torch.Tensor":
    """Return image_BCHW float32, normalised, of some rows.

    Raises:
        UnreadableImage: if an image cannot be decoded; it names the image's id.
    """
    from training.model.preprocess import preprocess_readable

    image_BCHW, left_out = preprocess_readable(list(evaluation.image_bytes(rows)), image_size_px, decode)
    for row, reason in left_out.items():
        image_id = evaluation.image_ids[rows[row]]
        raise UnreadableImage(f"{evaluation.images_path}: image {image_id}: cannot be decoded: {reason}")
    return image_BCHW
