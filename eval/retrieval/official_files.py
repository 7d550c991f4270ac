"""Feature files in CN-CLIP's form, and predictions from them: for features that another program computed.

Feature files have lines `{"image_id" or "text_id": int, "feature": [floats]}`, as `extract_features.py`
writes them; predictions are those of `make_topk_predictions.py` and `make_topk_predictions_tr.py`.
"""

import io
import itertools
import json
from dataclasses import dataclass

import numpy as np
import polars as pl

from eval.features.layout import check_vectors
from eval.index.exact_search import top_k
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int64Array
from pipeline.core.files.foreign import parse_json
from pipeline.core.records import ConfigError, InputError

_LINES_PER_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class FeatureFile:
    """One side, in ascending order of ids."""

    path: str
    ids: Int64Array  # [num_rows]
    vectors_ND: Float32Array  # unit-norm


def write_features(path: str, id_key: str, ids: Int64Array, vectors_ND: Float32Array) -> None:
    """Write what CN-CLIP's `extract_features.py` writes and its `make_topk_predictions.py` reads.

    Digits are those that give the same float32 back.
    """
    with store.publish(path) as temporary, open(temporary, "w", encoding="ascii") as file:
        for row_id, vector_D in zip(ids.tolist(), vectors_ND, strict=True):
            file.write(json.dumps({id_key: row_id, "feature": vector_D.tolist()}) + "\n")


def read_features(path: str, id_key: str) -> FeatureFile:
    """Read a feature file, a block of lines at a time.

    Raises:
        InputError: for a line that is no feature (an id that is a string, NaN, numbers of another count than
            the first line's), a repeated id, and a feature that is not unit-norm; it names the line.
    """
    ids, vectors = list[Int64Array](), list[Float32Array]()
    schema: dict[str, pl.DataType] = {id_key: pl.Int64(), "feature": pl.List(pl.Float64)}
    first_line = 1
    try:
        with store.open_read(path) as file:
            while lines := list(itertools.islice(file, _LINES_PER_BLOCK)):
                try:
                    table = pl.read_ndjson(io.BytesIO(b"".join(lines)), schema=schema)
                    width = len(vectors[0][0]) if vectors else table["feature"].list.len()[0]
                    vector_BD = table["feature"].list.to_array(width).to_numpy().astype(np.float32)
                    if table.null_count().sum_horizontal()[0] or table.height != len(lines):
                        raise ValueError  # a key is missing, or a line is empty
                except (
                    pl.exceptions.PolarsError,
                    pl.exceptions.PanicException,
                    ValueError,
                    TypeError,
                    IndexError,
                ):
                    width = len(vectors[0][0]) if vectors else None
                    raise _bad_line(path, id_key, lines, first_line, width) from None
                ids.append(table[id_key].to_numpy())
                vectors.append(vector_BD)
                first_line += len(lines)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not ids:
        raise InputError(f"{path}: holds no features")
    all_ids = np.concatenate(ids)
    order = np.argsort(all_ids, kind="stable")
    all_ids = all_ids[order]
    twice = np.flatnonzero(np.diff(all_ids) == 0)
    if len(twice):
        raise InputError(f"{path}: {id_key} {all_ids[twice[0]]} occurs twice")
    vectors_ND = np.concatenate(vectors)[order]
    check_vectors(vectors_ND, path)
    return FeatureFile(path, all_ids, vectors_ND)


def predict(images_path: str, texts_path: str, out: str, *, image_to_text: bool, k: int = 10) -> int:
    """Write the k best of the other side for every text (or every image); return the number of lines.

    Lines are `{"text_id", "image_ids"}` or `{"image_id", "text_ids"}`, best first, equal scores by lower id.

    Raises:
        InputError: for bad feature files, sides of different width, and k above the gallery.
    """
    if k < 1:
        raise ConfigError(f"--top-k {k}: give at least 1")
    images, texts = read_features(images_path, "image_id"), read_features(texts_path, "text_id")
    queries, gallery = (images, texts) if image_to_text else (texts, images)
    keys = ("image_id", "text_ids") if image_to_text else ("text_id", "image_ids")
    if queries.vectors_ND.shape[1] != gallery.vectors_ND.shape[1]:
        raise InputError(
            f"{images_path}: features of width {images.vectors_ND.shape[1]}, but {texts_path} has"
            f" {texts.vectors_ND.shape[1]}: they are of two models"
        )
    if k > len(gallery.ids):
        raise InputError(f"{gallery.path}: k = {k}, but the gallery holds {len(gallery.ids)}")
    _, rows_QK = top_k(queries.vectors_ND, gallery.vectors_ND, k)
    found_QK = gallery.ids[rows_QK].tolist()
    with store.publish(out) as temporary, open(temporary, "w", encoding="ascii") as file:
        for query_id, found in zip(queries.ids.tolist(), found_QK, strict=True):
            file.write(json.dumps({keys[0]: query_id, keys[1]: found}) + "\n")
    return len(queries.ids)


def _bad_line(path: str, id_key: str, lines: list[bytes], first_line: int, width: int | None) -> InputError:
    """Return the first line of a block that is no feature, in words."""
    for number, line in enumerate(lines, start=first_line):
        where = f"{path}:{number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            return InputError(f"{where}: not a line of JSON ({error})")
        if not isinstance(record, dict) or not {id_key, "feature"} <= record.keys():
            return InputError(f'{where}: expected {{"{id_key}", "feature"}}, found {line[:80]!r}')
        if type(record[id_key]) is not int or not -(2**63) <= record[id_key] < 2**63:
            return InputError(f"{where}: {id_key} {record[id_key]!r} is not a 64-bit integer")
        numbers = record["feature"]
        if not isinstance(numbers, list) or not all(type(value) in (int, float) for value in numbers):
            return InputError(f"{where}: feature must be a list of numbers")
        if not np.isfinite(np.array(numbers, dtype=np.float64)).all():
            return InputError(f"{where}: the feature of {id_key} {record[id_key]} has NaN or infinity in it")
        width = len(numbers) if width is None else width
        if len(numbers) != width or not width:
            return InputError(f"{where}: {len(numbers)} numbers, but the first line has {width}")
    return InputError(f"{path}: lines {first_line} to {first_line + len(lines) - 1} are not feature lines")
