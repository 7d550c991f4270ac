"""What the report takes from a run's files: logged steps, and examples of answers with small images."""

import io
from collections.abc import Sequence
from typing import TypeVar

from PIL import Image

from eval.datasets.cnclip_tsv import RetrievalSet
from eval.report.data import ExampleGallery, ExampleRow, RecallPoint, Thumbnail, TrainingPoint
from eval.retrieval.predictions import read_predictions
from pipeline.core import store
from pipeline.core.files.foreign import parse_json
from pipeline.core.files.images import decode_upright
from pipeline.core.records import InputError

Item = TypeVar("Item")


def read_training_metrics(path: str, stage: str) -> tuple[list[TrainingPoint], list[RecallPoint]]:
    """The points of one stage's `metrics.jsonl`: logged steps and validations, without steps left out.

    Raises InputError naming file and line for a line that is neither.
    """
    training: list[TrainingPoint] = []
    recall: list[RecallPoint] = []
    for line_number, line in enumerate(store.read_text(path).splitlines(), start=1):
        try:
            record = parse_json(line)
            if "evaluation" in record:
                point = (stage, record["samples_seen"], record["evaluation"], record["recall"])
                recall.append(RecallPoint(*point))
            elif not record.get("skipped"):
                names = ("samples_seen", "loss", "temperature", "learning_rate")
                training.append(TrainingPoint(stage, *(record[name] for name in names)))
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path}:{line_number}: neither a logged step nor a validation: {line[:80]}"
            ) from None
    return training, recall


def make_gallery(evaluation: RetrievalSet, predictions_path: str, *, num_rows: int = 6) -> ExampleGallery:
    """At most `num_rows` hits and as many misses of a text-to-image prediction file, spread over the texts.

    A hit has a right image in the first place, a miss none in the first five.
    """
    right = {
        int(text_id): [int(evaluation.image_ids[row]) for row in rows]
        for text_id, rows in zip(evaluation.text_ids, evaluation.images_of_text, strict=True)
    }
    text = {int(text_id): text for text_id, text in zip(evaluation.text_ids, evaluation.texts, strict=True)}
    hits: list[tuple[int, int | None, list[int]]] = []
    misses: list[tuple[int, int | None, list[int]]] = []
    for text_id, image_ids in read_predictions(predictions_path, ("text_id", "image_ids")):
        rank = next((place for place, i in enumerate(image_ids, start=1) if i in right[text_id]), None)
        if rank == 1:
            hits.append((text_id, rank, image_ids[:5]))
        elif rank is None or rank > 5:
            misses.append((text_id, rank, image_ids[:5]))
    row_of_image = {int(image_id): row for row, image_id in enumerate(evaluation.image_ids)}

    def thumbnail(image_id: int, is_right: bool) -> Thumbnail:
        data = next(evaluation.image_bytes([row_of_image[image_id]]))
        return Thumbnail(image_id, is_right, "image/webp", small_image(data))

    def rows(found: list[tuple[int, int | None, list[int]]]) -> tuple[ExampleRow, ...]:
        return tuple(
            ExampleRow(
                query=text[text_id],
                rank=rank,
                results=tuple(thumbnail(image_id, image_id in right[text_id]) for image_id in image_ids),
                answer=None if rank is not None and rank <= 5 else thumbnail(right[text_id][0], True),
            )
            for text_id, rank, image_ids in _spread(found, num_rows)
        )

    return ExampleGallery(evaluation.name, rows(hits), rows(misses))


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items at even distances, all of them where there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def small_image(data: bytes) -> bytes:
    """Return an image file as a WebP of at most 96 pixels a side; BadImageError if it does not decode."""
    small = decode_upright(data)
    small.thumbnail((96, 96), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return file.getvalue()
