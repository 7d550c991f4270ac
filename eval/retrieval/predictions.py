"""From embeddings to prediction files and scores, in the files that MUGE and CN-CLIP define.

For an evaluation `<name>` this writes

    <name>.predictions.jsonl     {"text_id": int, "image_ids": [10 distinct ints]}, a line for each text
    <name>.tr.predictions.jsonl  {"image_id": int, "text_ids": [10 distinct ints]}, for each image with a text
    <name>.scores.json           {"success", "score", "scoreJson": {score, mean_recall, r1, r5, r10}}
    <name>.tr.scores.json        the same for image-to-text

Scores are in percent, counted from the prediction files, as the official scorer does, not from the vectors.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from eval.datasets.cnclip_tsv import RetrievalSet, check_scorable
from eval.features.layout import Side, read_vectors, vectors_path
from eval.features.model_identity import check_same_model, read_identity
from eval.index.flat import read_index, search
from eval.metrics.recall import CUTOFFS, RecallAtK, recall_at_k, retrieval_scores
from eval.retrieval.measure import RetrievalResult, image_queries
from pipeline.core import store
from pipeline.core.arrays import Int64Array
from pipeline.core.files.foreign import parse_json
from pipeline.core.records import InputError

K = max(CUTOFFS)
_QUERIES_PER_WRITE = 8192


def retrieve(
    evaluation: RetrievalSet, embeddings_folder: str, index_folder: str, out_folder: str
) -> RetrievalResult:
    """Search the ways that are scored; write prediction and score files, and return what they score.

    `embeddings_folder` is what `eval.features.evaluation_set.embed_evaluation` wrote, `index_folder` holds
    `image.index` and `text.index` of it. Image-to-text queries are the images that some text names;
    a set that is scored text-to-image only has no files of that direction.

    Raises:
        InputError: if the set is too small for recall at 10 or has no pairing, features are NaN or not
            unit-norm, features or indices are not of this evaluation, or the index is of another model.
    """
    check_scorable(evaluation, k=K)
    check_same_model(index_folder, read_identity(index_folder), read_identity(embeddings_folder))
    t2i_path = store.join(out_folder, f"{evaluation.name}.predictions.jsonl")
    _write_predictions(
        t2i_path,
        ("text_id", "image_ids"),
        queries=("text", np.arange(evaluation.num_texts), evaluation.text_ids),
        gallery=("image", evaluation.image_ids),
        folders=(embeddings_folder, index_folder),
    )
    t2i_ranks = rank_text_to_image(t2i_path, evaluation)
    write_scores(store.join(out_folder, f"{evaluation.name}.scores.json"), recall_at_k(t2i_ranks))
    if not evaluation.image_to_text:
        return RetrievalResult(t2i_ranks, None)

    i2t_path = store.join(out_folder, f"{evaluation.name}.tr.predictions.jsonl")
    image_rows, _ = image_queries(evaluation)
    _write_predictions(
        i2t_path,
        ("image_id", "text_ids"),
        queries=("image", image_rows, evaluation.image_ids),
        gallery=("text", evaluation.text_ids),
        folders=(embeddings_folder, index_folder),
    )
    i2t_ranks = rank_image_to_text(i2t_path, evaluation)
    write_scores(store.join(out_folder, f"{evaluation.name}.tr.scores.json"), recall_at_k(i2t_ranks))
    return RetrievalResult(t2i_ranks, i2t_ranks)


def rank_text_to_image(predictions_path: str, evaluation: RetrievalSet) -> Int64Array:
    """Rank the texts of a `{"text_id", "image_ids"}` file by the first of their images; 11 without one.

    Raises:
        InputError: as the official scorer does: for a text without a line, and a line without exactly 10
            distinct known ids.
    """
    right = {
        int(text_id): {int(evaluation.image_ids[row]) for row in rows}
        for text_id, rows in zip(evaluation.text_ids, evaluation.images_of_text, strict=True)
    }
    return _ranks(predictions_path, ("text_id", "image_ids"), right, evaluation.image_ids)


def rank_image_to_text(predictions_path: str, evaluation: RetrievalSet) -> Int64Array:
    """Rank the images that some text names in a `{"image_id", "text_ids"}` file; errors likewise."""
    right = {
        int(image_id): {int(evaluation.text_ids[row]) for row in rows}
        for image_id, rows in zip(evaluation.image_ids, evaluation.texts_of_image, strict=True)
        if len(rows)
    }
    return _ranks(predictions_path, ("image_id", "text_ids"), right, evaluation.text_ids)


def read_predictions(path: str, keys: tuple[str, str]) -> Iterator[tuple[int, list[int]]]:
    """Yield (query id, 10 gallery ids best first) of each line.

    Raises:
        InputError: for a malformed line; it names file and line.
    """
    query_key, gallery_key = keys
    with store.open_read(path) as file:
        for line_number, line in enumerate(file, start=1):
            where = f"{path}:{line_number}"
            try:
                record = parse_json(line)
                query_id, gallery_ids = record[query_key], record[gallery_key]
                well_formed = type(query_id) is int and all(type(value) is int for value in gallery_ids)
            except (ValueError, KeyError, TypeError):
                well_formed = False
            if not well_formed:
                raise InputError(f'{where}: expected {{"{query_key}": int, "{gallery_key}": [{K} ints]}}')
            if len(gallery_ids) != K or len(set(gallery_ids)) != K:
                raise InputError(
                    f"{where}: {gallery_key} of {query_key} {query_id} must be {K} distinct ids, found"
                    f" {len(gallery_ids)} with {len(set(gallery_ids))} distinct"
                )
            yield query_id, gallery_ids


def write_scores(path: str, recall: RecallAtK) -> None:
    """Write the official score file; `score` is the mean of the three recalls, all in percent."""
    mean_recall = retrieval_scores(recall, None)["mean_recall"]
    body = {"score": mean_recall, "mean_recall": mean_recall, **recall}
    store.write_text(
        path, json.dumps({"success": True, "score": mean_recall, "scoreJson": body}, indent=1) + "\n"
    )


def _write_predictions(
    path: str,
    keys: tuple[str, str],
    *,
    queries: tuple[Side, Int64Array, Int64Array],  # side, rows to ask for, ids of all rows
    gallery: tuple[Side, Int64Array],  # side, ids of all rows
    folders: tuple[str, str],  # of embeddings and of indices
) -> None:
    query_side, query_rows, query_ids = queries
    gallery_side, gallery_ids = gallery
    embeddings_folder, index_folder = folders
    features_path = vectors_path(embeddings_folder, query_side)
    vectors_ND = read_vectors(features_path)
    index_path = store.join(index_folder, f"{gallery_side}.index")
    index = read_index(index_path)
    for source, found, wanted in (
        (features_path, len(vectors_ND), len(query_ids)),
        (index_path, index.ntotal, len(gallery_ids)),
    ):
        if found != wanted:
            raise InputError(f"{source}: {found} rows, but the evaluation has {wanted}; embed it again")
    if index.d != vectors_ND.shape[1]:
        raise InputError(
            f"{index_path}: an index of width {index.d}, but {features_path} has {vectors_ND.shape[1]}: it"
            " belongs to another model; build it again"
        )
    with store.publish(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for start in range(0, len(query_rows), _QUERIES_PER_WRITE):
            rows = query_rows[start : start + _QUERIES_PER_WRITE]
            _, found_QK = search(index, vectors_ND[rows], K)
            for row, best_K in zip(rows, found_QK, strict=True):
                record = {keys[0]: int(query_ids[row]), keys[1]: gallery_ids[best_K].tolist()}
                file.write(json.dumps(record) + "\n")


def _ranks(
    path: str, keys: tuple[str, str], right: Mapping[int, set[int]], gallery_ids: Int64Array
) -> Int64Array:
    known = set(gallery_ids.tolist())
    rank_of_query: dict[int, int] = {}
    for query_id, predicted in read_predictions(path, keys):
        if query_id not in right:
            raise InputError(f"{path}: {keys[0]} {query_id} is none of the evaluation's queries")
        if query_id in rank_of_query:
            raise InputError(f"{path}: {keys[0]} {query_id} occurs twice")
        unknown = set(predicted) - known
        if unknown:
            raise InputError(
                f"{path}: {keys[0]} {query_id} predicts {min(unknown)}, which the set does not hold"
            )
        rank_of_query[query_id] = _rank(predicted, right[query_id])
    missing = right.keys() - rank_of_query.keys()
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(right)} queries are missing, first {min(missing)}")
    return np.array(list(rank_of_query.values()), dtype=np.int64)


def _rank(predicted: Sequence[int], right: set[int]) -> int:
    """Return the position (from 1) of the first correct id, or K + 1."""
    return next((place for place, value in enumerate(predicted, start=1) if value in right), K + 1)
