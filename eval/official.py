"""Feature files in CN-CLIP's form: lines `{"image_id" or "text_id": int, "feature": [floats]}`."""

import json

import numpy as np
import numpy.typing as npt

from pipeline import store


def write_features(
    path: str, id_key: str, ids: npt.NDArray[np.int64], vectors_ND: npt.NDArray[np.float32]
) -> None:
    """Write what CN-CLIP's `extract_features.py` writes and its `make_topk_predictions.py` reads.

    Digits are those that give the same float32 back.
    """
    with store.publish(path) as temporary, open(temporary, "w", encoding="ascii") as file:
        for row_id, vector_D in zip(ids.tolist(), vectors_ND, strict=True):
            file.write(json.dumps({id_key: row_id, "feature": vector_D.tolist()}) + "\n")
