"""Measure classification from features: 10,000 images × 1,000 classes × 80 templates × 512.

Ours folds the templates into one vector a class, once; the peer scores every prompt and takes the mean of the
scores, as section 2.1 of the paper words it. Both are given the same text features. The peer runs on a tenth
of the images unless `--full`, and its time is scaled.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import time

import numpy as np

from benchmarks.harness import parse, parser, record, report
from eval.zeroshot.classifier import class_vectors, scores_of

NUM_IMAGES, NUM_CLASSES, NUM_TEMPLATES, DIM = 10_000, 1_000, 80, 512


def main() -> int:
    options = parse(parser(__doc__, full="score every image by the peer"))
    count = NUM_IMAGES if options.full else NUM_IMAGES // 10
    rng = np.random.default_rng(0)
    text_CTD = rng.normal(size=(NUM_CLASSES, NUM_TEMPLATES, DIM)).astype(np.float32)
    text_CTD /= np.linalg.norm(text_CTD, axis=2, keepdims=True)
    image_ND = rng.normal(size=(NUM_IMAGES, DIM)).astype(np.float32)
    image_ND /= np.linalg.norm(image_ND, axis=1, keepdims=True)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        ours = scores_of(image_ND, class_vectors(text_CTD, "scores"))
        seconds.append(time.perf_counter() - start)
    flat_PD = text_CTD.reshape(-1, DIM)
    difference = 0.0
    start = time.perf_counter()
    for first in range(0, count, 100):
        scores_NP = image_ND[first : first + 100] @ flat_PD.T
        theirs = scores_NP.reshape(-1, NUM_CLASSES, NUM_TEMPLATES).mean(axis=2)
        difference = max(difference, float(np.abs(theirs - ours[first : first + 100]).max()))
    peer = (time.perf_counter() - start) * NUM_IMAGES / count
    print(f"ours {min(seconds):.2f} s, every prompt scored {peer:.1f} s, largest difference {difference:.1e}")
    return report(record("zeroshot", ours=min(seconds), peer=peer, unit="s", equal=difference < 1e-6))


if __name__ == "__main__":
    sys.exit(main())
