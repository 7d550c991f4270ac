"""Reads logged steps and examples of results with small images from a run's files."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from PIL import Image

from eval.datasets.cnclip_tsv import RetrievalSet
from eval.report.data import (
    AnswerText,
    ExampleGallery,
    ExampleRow,
    ImageQuery,
    RecallPoint,
    Thumbnail,
    TrainingPoint,
)
from eval.retrieval.predictions import read_predictions
from pipeline.core import store
from pipeline.core.files.foreign import parse_json
from pipeline.core.files.images import decode_upright
from pipeline.core.records import InputError

Item = TypeVar("Item")

MAX_POINTS = 1000  # of a stage's curve, so that the page does not grow with the training
SHOWN = 5  # answers to a query
MAX_TEXT = 200  # characters of a text that is shown


def read_training_metrics(path: str, stage: str) -> tuple[list[TrainingPoint], list[RecallPoint]]:
    """Return the points of one stage's `metrics.jsonl`: logged steps and validations.

    If there are more than MAX_POINTS steps, every n-th and the last one become points; steps that training
    skipped do not. A last line without a line end is still being written and is ignored.

    Raises:
        InputError: if a line is neither a step nor a validation; it names file and line.
    """
    training = _Thinned[TrainingPoint]()
    recall = _Thinned[RecallPoint]()
    with store.open_read(path) as file:
        for line_number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = parse_json(line)
                if "evaluation" in record:
                    point = (stage, record["samples_seen"], record["evaluation"], record["recall"])
                    recall.add(RecallPoint(*point))
                elif not record.get("skipped"):
                    names = ("samples_seen", "loss", "temperature", "learning_rate")
                    training.add(TrainingPoint(stage, *(record[name] for name in names)))
            except (ValueError, KeyError, TypeError):
                shown = line.decode("utf-8", "replace").rstrip("\n")[:80]
                raise InputError(
                    f"{path}:{line_number}: neither a logged step nor a validation: {shown}"
                ) from None
    return training.points(), recall.points()


class _Thinned(Generic[Item]):
    """Keeps every n-th added point and the last one; n doubles whenever there are too many."""

    def __init__(self) -> None:
        self._kept: list[Item] = []
        self._last: Item | None = None
        self._count, self._every = 0, 1

    def add(self, point: Item) -> None:
        if self._count % self._every == 0:
            self._kept.append(point)
            if len(self._kept) > MAX_POINTS:
                self._kept = self._kept[::2]
                self._every *= 2
        self._last = point
        self._count += 1

    def points(self) -> list[Item]:
        ends_with_last = self._last is None or (self._count - 1) % self._every == 0
        return self._kept if ends_with_last else [*self._kept, *([self._last] if self._last else [])]


def make_gallery(
    evaluation: RetrievalSet,
    predictions_path: str,
    image_predictions_path: str | None = None,
    *,
    num_rows: int = 6,
) -> ExampleGallery:
    """Return at most `num_rows` hits and misses each for each direction, spread over the queries.

    A hit has a correct result in first place, a miss none in the top five. `image_predictions_path` is the
    file of image-to-text predictions, if that direction is scored.
    """
    image_id = evaluation.image_ids.tolist()
    text_id = evaluation.text_ids.tolist()
    row_of_image = {one: row for row, one in enumerate(image_id)}
    row_of_text = {one: row for row, one in enumerate(text_id)}

    def thumbnail(row: int, is_right: bool) -> Thumbnail:
        data = next(evaluation.image_bytes([row]))
        return Thumbnail(image_id[row], is_right, "image/webp", small_image(data))

    def text(row: int, is_right: bool) -> AnswerText:
        whole = evaluation.texts[row]
        return AnswerText(whole if len(whole) <= MAX_TEXT else f"{whole[: MAX_TEXT - 1]}…", is_right)

    def of_texts(found: Iterable["_Query"]) -> Iterator[ExampleRow]:
        for query in found:
            results = tuple(thumbnail(row, row in query.right) for row in query.found)
            answer = thumbnail(query.right[0], True) if query.needs_answer else None
            yield ExampleRow(text(query.row, False).text, query.rank, results, answer)

    def of_images(found: Iterable["_Query"]) -> Iterator[ImageQuery]:
        for query in found:
            results = tuple(text(row, row in query.right) for row in query.found)
            answer = text(query.right[0], True) if query.needs_answer else None
            yield ImageQuery(thumbnail(query.row, False), query.rank, results, answer)

    hits, misses = _hits_and_misses(
        read_predictions(predictions_path, ("text_id", "image_ids")),
        row_of_text,
        row_of_image,
        lambda row: evaluation.images_of_text[row].tolist(),
        num_rows,
    )
    image_hits: Sequence[_Query] = ()
    image_misses: Sequence[_Query] = ()
    if image_predictions_path is not None:
        texts_of_image = evaluation.texts_of_image
        image_hits, image_misses = _hits_and_misses(
            read_predictions(image_predictions_path, ("image_id", "text_ids")),
            row_of_image,
            row_of_text,
            lambda row: texts_of_image[row].tolist(),
            num_rows,
        )
    return ExampleGallery(
        evaluation.name,
        tuple(of_texts(hits)),
        tuple(of_texts(misses)),
        tuple(of_images(image_hits)),
        tuple(of_images(image_misses)),
    )


class _Query:
    """A query's row, the rows of its correct answers, and its results."""

    def __init__(self, row: int, right: list[int], found: list[int]) -> None:
        self.row, self.right, self.found = row, right, found[:SHOWN]
        self.rank = next((place for place, one in enumerate(found, start=1) if one in right), None)

    @property
    def needs_answer(self) -> bool:
        """Return whether the shown results lack a correct answer although one exists."""
        return bool(self.right) and (self.rank is None or self.rank > SHOWN)


def _hits_and_misses(
    predictions: Iterable[tuple[int, list[int]]],
    row_of_query: Mapping[int, int],
    row_of_answer: Mapping[int, int],
    right_of: Callable[[int], list[int]],
    count: int,
) -> tuple[list[_Query], list[_Query]]:
    hits: list[_Query] = []
    misses: list[_Query] = []
    for query_id, answer_ids in predictions:
        row = row_of_query[query_id]
        query = _Query(row, right_of(row), [row_of_answer[one] for one in answer_ids])
        if query.rank == 1:
            hits.append(query)
        elif query.needs_answer:
            misses.append(query)
    return spread(hits, count), spread(misses, count)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` evenly spaced items, or all if there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def small_image(data: bytes, side_px: int = 96) -> bytes:
    """Return an image file as a WebP of at most `side_px` a side.

    Raises:
        BadImageError: if it does not decode.
    """
    small = decode_upright(data)
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return file.getvalue()
