"""Measure feature files: `.npy` as this project keeps them, against CN-CLIP's JSON lines; 30,000 × 512.

The peer's lines are written and read as extract_features.py and make_topk_predictions.py do. `--full` takes
all rows; without it JSON lines are measured on a tenth and scaled.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import json
import tempfile
import time

import numpy as np

from benchmarks.harness import parse, parser, record, report
from eval.features.layout import read_vectors

NUM_ROWS, DIM = 30_000, 512


def main() -> int:
    options = parse(parser(__doc__, full="measure all rows of JSON lines"))
    count = NUM_ROWS if options.full else NUM_ROWS // 10
    rows = np.random.default_rng(0).normal(size=(NUM_ROWS, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as name:
        npy, lines = Path(name) / "img_emb_0.npy", Path(name) / "img_feat.jsonl"
        writes, reads = [], []
        for _ in range(5):
            start = time.perf_counter()
            np.save(npy, rows)
            writes.append(time.perf_counter() - start)
            start = time.perf_counter()
            ours = read_vectors(str(npy))  # checks every row as well
            reads.append(time.perf_counter() - start)
        start = time.perf_counter()
        with open(lines, "w") as file:
            for image_id, feature in enumerate(rows[:count].tolist()):
                file.write("{}\n".format(json.dumps({"image_id": image_id, "feature": feature})))
        peer_write = (time.perf_counter() - start) * NUM_ROWS / count
        start = time.perf_counter()
        with open(lines) as file:
            theirs = np.array([json.loads(line.strip())["feature"] for line in file], dtype=np.float32)
        peer_read = (time.perf_counter() - start) * NUM_ROWS / count
    equal = bool(np.array_equal(ours, rows) and np.array_equal(theirs, rows[:count]))
    total, peer_total = min(writes) + min(reads), peer_write + peer_read
    print(f"ours: write {min(writes):.3f} s, read and check {min(reads):.3f} s")
    print(f"JSON lines: write {peer_write:.1f} s, read {peer_read:.1f} s")
    return report(record("features_io", ours=total, peer=peer_total, unit="s", equal=equal))


if __name__ == "__main__":
    sys.exit(main())
