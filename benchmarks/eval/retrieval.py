"""Measure from features to the score file: 30,000 images × 5,000 queries × 512, against CN-CLIP's loop.

The peer is the loop of CN-CLIP 1.6.0's make_topk_predictions.py, on the CPU: for each query a product with
all images, a Python list of (id, score) and a sort. It takes the same time for every query, so it runs on
`--peer-queries` of them, a third in each round, and its time is scaled; `--full` runs them all. Features are
in memory on both sides. Rounds alternate and each side's best counts: other programs slow all alike.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import json
import tempfile
import time

import numpy as np
import torch

from benchmarks.harness import parse, parser, record, report
from eval.index.exact_search import top_k
from eval.retrieval.official_scorer import score_files
from pipeline.core.arrays import Float32Array

NUM_IMAGES, NUM_QUERIES, DIM, K = 30_000, 5_000, 512, 10
NUM_ROUNDS = 3


def features(seed: int, count: int) -> Float32Array:
    rows = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    unit: Float32Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def ours(query_QD: Float32Array, image_ND: Float32Array, folder: Path) -> dict[int, list[int]]:
    _, rows_QK = top_k(query_QD, image_ND, K)
    found = dict(enumerate(rows_QK.tolist()))
    with open(folder / "predictions.jsonl", "w") as file:
        for query, rows in found.items():
            file.write(json.dumps({"text_id": query, "image_ids": rows}) + "\n")
    result = score_files(
        str(folder / "reference.jsonl"), str(folder / "predictions.jsonl"), str(folder / "scores.json")
    )
    assert result.success, result.body
    return found


def peer(query_QD: Float32Array, image_ND: Float32Array) -> dict[int, list[int]]:
    """Run CN-CLIP's inner loop, line by line; its batch of 32,768 images holds them all."""
    image_ids = list(range(len(image_ND)))
    found = {}
    for text_id, text_feat in enumerate(query_QD):
        score_tuples = []
        text_feat_tensor = torch.tensor(text_feat[None])
        batch_scores = text_feat_tensor @ torch.from_numpy(image_ND).t()
        for image_id, score in zip(image_ids, batch_scores.squeeze(0).tolist(), strict=True):
            score_tuples.append((image_id, score))
        best = sorted(score_tuples, key=lambda x: x[1], reverse=True)[:K]
        found[text_id] = [entry[0] for entry in best]
    return found


def product(query_QD: Float32Array, image_ND: Float32Array) -> None:
    """Compute the bare matrix product, in blocks that fit into memory."""
    for start in range(0, len(query_QD), 256):
        query_QD[start : start + 256] @ image_ND.T


def main() -> int:
    made = parser(__doc__, full="run the peer on all queries")
    made.add_argument("--peer-queries", type=int, default=250)
    options = parse(made)
    num_peer = NUM_QUERIES if options.full else options.peer_queries
    image_ND, query_QD = features(0, NUM_IMAGES), features(1, NUM_QUERIES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = (json.dumps({"text_id": q, "image_ids": [q]}) for q in range(NUM_QUERIES))
        (folder / "reference.jsonl").write_text("\n".join(lines))
        seconds, bare, loop, theirs = [], [], [], dict[int, list[int]]()
        for part in np.array_split(np.arange(num_peer), NUM_ROUNDS):
            start = time.perf_counter()
            product(query_QD, image_ND)
            bare.append(time.perf_counter() - start)
            start = time.perf_counter()
            found = ours(query_QD, image_ND, folder)
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            theirs |= dict(zip(part.tolist(), peer(query_QD[part], image_ND).values(), strict=True))
            loop.append((time.perf_counter() - start) * NUM_QUERIES / len(part))
    peer_seconds = min(loop)
    # Ties aside: where the sets differ, float32 cannot tell the exchanged images apart.
    equal = True
    for query, rows in theirs.items():
        mine = found[query]
        exchanged = zip(sorted(set(rows) - set(mine)), sorted(set(mine) - set(rows)), strict=True)
        for a, b in exchanged:
            equal &= bool(abs(query_QD[query] @ (image_ND[a] - image_ND[b])) < 1e-6)
    total, least = min(seconds), min(bare)
    print(f"ours {total:.2f} s, bare matrix product {least:.2f} s ({total / least:.2f} ×)")
    print(f"CN-CLIP's loop {peer_seconds:.1f} s, from {num_peer} of {NUM_QUERIES} queries")
    others = {"retrieval": peer_seconds, "retrieval/matmul": least}
    return report([record(name, total, other, "s", equal=equal) for name, other in others.items()])


if __name__ == "__main__":
    sys.exit(main())
