"""The official scorer: Recall@1, 5 and 10 of a prediction file against a reference file.

Same rules, numbers and score file as Chinese-CLIP's `evaluation.py` (text-to-image) and `evaluation_tr.py`
(image-to-text), its tolerance included: of a query predicted twice the last line counts, and predictions for
queries that the reference does not have are ignored. Both are noted, as the official scorer does not.
"""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from eval.metrics.recall import CUTOFFS
from pipeline.core import store
from pipeline.core.records import InputError

K = max(CUTOFFS)
_MAX_LISTED = 20  # missing ids named in an error; the official scorer lists all, thousands in one line


@dataclass(frozen=True, slots=True)
class Direction:
    """Keys and words of one direction of retrieval."""

    name: str
    query_key: str
    gallery_key: str
    query_word: str  # as the official messages write it
    gallery_word: str


TEXT_TO_IMAGE = Direction("text-to-image", "text_id", "image_ids", "Text_id", "images")
IMAGE_TO_TEXT = Direction("image-to-text", "image_id", "text_ids", "Image_id", "texts")


@dataclass(frozen=True, slots=True)
class ScoreFile:
    """What the score file holds, and what the official scorer would not say."""

    body: dict[str, Any]  # {"success", "score", "scoreJson"} or {"errorDetail", "errorMsg", …}
    direction: Direction
    notes: tuple[str, ...]

    @property
    def success(self) -> bool:
        return bool(self.body["success"])


def score_files(reference_path: str, predictions_path: str, out_path: str) -> ScoreFile:
    """Score a prediction file and write the official score file; bad input makes `success: false`.

    The reference has lines `{"text_id", "image_ids"}` or `{"image_id", "text_ids"}`; its first line says
    which direction is scored. A hit is any of the query's ids among the first k of its 10 predictions.

    Raises:
        OSError: if `out_path` cannot be written; nothing else raises.
    """
    direction, notes = TEXT_TO_IMAGE, list[str]()
    try:
        direction = _direction(reference_path)
        right = _read_reference(reference_path, direction)
        predictions = _read_predictions(predictions_path, right, direction, notes)
        body = _scores(right, predictions)
    except InputError as error:
        message = str(error)
        body = {"errorDetail": message, "errorMsg": message, "score": 0, "scoreJson": {}, "success": False}
    store.write_text(out_path, json.dumps(body))
    return ScoreFile(body, direction, tuple(notes))


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """Yield (place, stripped line).

    Raises:
        InputError: if the file is missing or not UTF-8.
    """
    try:
        with io.TextIOWrapper(store.open_read(path), encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}:{number}", line.strip()
    except FileNotFoundError:
        raise InputError(f"{path}: the file is not found") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 ({error})") from None


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: Cannot parse this line into json object: {line[:200]}") from None


def _direction(reference_path: str) -> Direction:
    """Return the direction of the reference's first line; text-to-image if it has the keys of neither."""
    for where, line in _lines(reference_path):
        keys = _parse(line, where)
        for direction in (TEXT_TO_IMAGE, IMAGE_TO_TEXT):
            if isinstance(keys, dict) and {direction.query_key, direction.gallery_key} <= keys.keys():
                return direction
        break
    return TEXT_TO_IMAGE


def _read_reference(path: str, direction: Direction) -> dict[Any, frozenset[Any]]:
    """Return the right ids of each query.

    Ids may be anything hashable, as in the official scorer.
    """
    right: dict[Any, frozenset[Any]] = {}
    for where, line in _lines(path):
        record = _parse(line, where)
        try:
            right[record[direction.query_key]] = frozenset(record[direction.gallery_key])
        except (KeyError, TypeError, IndexError):
            raise InputError(
                f"{where}: a reference line needs {direction.query_key} and a list of"
                f" {direction.gallery_key}, found {line[:200]}"
            ) from None
    if not right:
        raise InputError(f"{path}: the reference is empty; there is nothing to score")
    return right


def _read_predictions(
    path: str, right: Mapping[Any, Any], direction: Direction, notes: list[str]
) -> dict[int, list[int]]:
    """Return the 10 ids of each predicted query; the messages after the place are the official ones."""
    query_key, gallery_key = direction.query_key, direction.gallery_key
    word, lower = direction.query_word, query_key
    predictions: dict[int, list[int]] = {}
    num_repeated = 0
    for where, line in _lines(path):
        record = _parse(line, where)
        if not isinstance(record, dict) or query_key not in record:
            advice = ""
            if isinstance(record, dict) and gallery_key.removesuffix("s") in record:
                advice = (
                    f"; the reference is {direction.name}, these predictions are of the other direction: give"
                    f' a reference with lines {{"{gallery_key.removesuffix("s")}": …, "{query_key}s": […]}}'
                )
            raise InputError(f"{where}: There exists one line not containing {lower}: {line[:200]}{advice}")
        query_id = record[query_key]
        if not isinstance(query_id, int):
            raise InputError(
                f"{where}: Found an invalid {lower} {query_id!r}, it should be an integer (not string),"
                " please check your schema"
            )
        if gallery_key not in record:
            raise InputError(
                f"{where}: There exists one line not containing the predicted {gallery_key}: {line[:200]}"
            )
        found = record[gallery_key]
        if not isinstance(found, list):
            raise InputError(
                f"{where}: The {gallery_key} field of {lower} {query_id} is not a list, please check your"
                " schema"
            )
        if len(found) != K:
            raise InputError(
                f"{where}: {word} {query_id} has wrong number of predicted {gallery_key}! Require {K}, but"
                f" {len(found)} founded."
            )
        for place, item in enumerate(found, start=1):
            if not isinstance(item, int):
                raise InputError(
                    f"{where}: {word} {query_id} has an invalid predicted"
                    f" {gallery_key.removesuffix('s')} {item!r} at rank {place}, it should be an integer"
                    " (not string), please check your schema"
                )
        if len(set(found)) != K:
            raise InputError(
                f"{where}: {word} {query_id} has duplicate topk {direction.gallery_word} in your"
                " prediction. Please check again!"
            )
        num_repeated += query_id in predictions
        predictions[query_id] = found
    missing = [query_id for query_id in right if query_id not in predictions]
    if missing:
        listed = ", ".join(str(query_id) for query_id in missing[:_MAX_LISTED])
        more = f" and {len(missing) - _MAX_LISTED} more" if len(missing) > _MAX_LISTED else ""
        raise InputError(
            f"{path}: The following {lower}s have no prediction in your submission, please check again:"
            f" {listed}{more}"
        )
    if num_repeated:
        notes.append(f"{path}: {num_repeated} lines repeat a {lower}; the last line of each counts")
    if len(predictions) > len(right):
        notes.append(
            f"{path}: {len(predictions) - len(right)} {lower}s are not in the reference and are ignored"
        )
    return predictions


def _scores(right: Mapping[Any, frozenset[Any]], predictions: Mapping[int, list[int]]) -> dict[str, Any]:
    """Return the official body; operations have the scorer's order, so that floats are equal to the bit."""
    hits = [0] * len(CUTOFFS)
    for query_id, wanted in right.items():
        place = next((i for i, item in enumerate(predictions[query_id], 1) if item in wanted), K + 1)
        for column, cutoff in enumerate(CUTOFFS):
            hits[column] += place <= cutoff
    r1, r5, r10 = (count * 1.0 / len(right) for count in hits)
    score = (r1 + r5 + r10) / 3.0 * 100
    recalls = {"r1": r1 * 100, "r5": r5 * 100, "r10": r10 * 100}
    return {"success": True, "score": score, "scoreJson": {"score": score, "mean_recall": score, **recalls}}
