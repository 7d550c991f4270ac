"""Measure how often different images count as copies of each other, and how many altered copies are found.

    python benchmarks/data_prep/image_copies.py [--full] [--photographs FOLDER] [--emoji FOLDER] [--seed N]

The rules are that of `evaluation_image` (hashes within 32 of 384 bits) and that of `[dedup_image]` with
`max_distance = 7`: the peer goes only by the hash, ours by hash and signature. Different images are
drawings of nine kinds (benchmarks/data_prep/plain_images.py), pieces of photographs in colour and in grey,
and, from a folder that `data_prep/corpora/build_emoji.py` has made, emoji without flags; every pair of one
kind is compared, and every pair of all kinds together. Copies are the same images re-encoded, scaled,
squashed and cropped. Photographs come from scikit-learn and matplotlib; more of them lie in scikit-image's
wheel (0.25.2, `skimage/data`), which --photographs takes.
Last line: one JSON list; a false rate counts pairs in 10,000, a share of copies is in percent.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import io
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from PIL import Image

from benchmarks.data_prep.plain_images import ALTERATIONS, KINDS, cut_photographs, drawn
from benchmarks.harness import parse, parser, record, report, significant
from data_prep.rules.image import perceptual_hash
from data_prep.rules.image_signature import are_copies, image_signature, signature_array

RULES = {"evaluation_image": 32, "dedup_image": 7}  # bits
ROWS_AT_ONCE = 256


class Marks:
    """Hashes uint8 [N, 48] and signatures uint8 [N, 384] of images."""

    def __init__(self, images: list[Image.Image]) -> None:
        pixels = [np.asarray(image) for image in images]
        self.hashes = np.frombuffer(b"".join(map(perceptual_hash, pixels)), np.uint8).reshape(len(images), -1)
        self.signatures = signature_array(list(map(image_signature, pixels)))

    def __len__(self) -> int:
        return len(self.hashes)


def photographs(folders: list[Path]) -> list[Image.Image]:
    """Return the pieces of all photographs in a fixed order; pieces without content are left out."""
    pieces = [piece for folder in folders for piece in cut_photographs(folder)]
    pieces = [piece for piece in pieces if np.asarray(piece.convert("L")).std() > 12]
    random.Random(0).shuffle(pieces)
    return pieces


def emoji(folder: Path) -> Iterator[tuple[str, list[Image.Image]]]:
    """Yield the images of each vendor's table, each once, flags left out."""
    for path in sorted(folder.glob("*.parquet")):
        table = pl.read_parquet(path).filter(pl.col("category_en") != "Flags")
        data = table["png"].unique(maintain_order=True)
        yield f"emoji {path.stem}", [Image.open(io.BytesIO(each)).convert("RGB") for each in data]


def false_pairs(marks: Marks, distance: int) -> tuple[int, int, int]:
    """Count the pairs, and those that are copies only by the hash and by hash and signature."""
    by_hash = by_both = 0
    for start in range(0, len(marks), ROWS_AT_ONCE):
        rows = marks.hashes[start : start + ROWS_AT_ONCE]
        near = np.bitwise_count(rows[:, None] ^ marks.hashes[None]).sum(axis=2, dtype=np.int32) <= distance
        one, two = np.nonzero(near & (np.arange(len(marks)) > start + np.arange(len(rows))[:, None]))
        by_hash += len(one)
        by_both += int(are_copies(marks.signatures, marks.signatures, start + one, two).sum())
    return len(marks) * (len(marks) - 1) // 2, by_hash, by_both


def found(marks: Marks, copies: Marks, distance: int) -> npt.NDArray[np.bool_]:
    """Return which copies the rules find, bool [2, N]: by the hash only, by hash and signature."""
    near = np.bitwise_count(marks.hashes ^ copies.hashes).sum(axis=1, dtype=np.int32) <= distance
    each = np.arange(len(marks))
    return np.stack([near, near & are_copies(marks.signatures, copies.signatures, each, each)])


def result(
    name: str, ours: float, peer: float, unit: str, ratio: float | None, **more: Any
) -> dict[str, Any]:
    made = record(f"image_copies/{name}", ours, None, unit, **more)
    return made | {"peer": significant(peer), "ratio": None if ratio is None else significant(ratio)}


def main() -> int:
    made = parser(__doc__, full="1,000 images of each kind in place of 200")
    made.add_argument("--photographs", type=Path, action="append", default=[])
    made.add_argument("--emoji", type=Path)
    made.add_argument("--seed", type=int, default=0)
    options = parse(made)
    count, num_altered = (1000, 300) if options.full else (200, 60)

    import matplotlib
    import sklearn

    folders = [
        Path(sklearn.__file__).parent / "datasets/images",
        Path(matplotlib.get_data_path(), "sample_data"),
    ]
    pieces = photographs(folders + options.photographs)[:count]
    sets = {kind: drawn(kind, count, options.seed) for kind in KINDS}
    sets["photographs"] = pieces
    sets["grey photographs"] = [piece.convert("L").convert("RGB") for piece in pieces]
    if options.emoji is not None:
        sets |= dict(emoji(options.emoji))

    records = []
    marks = {kind: Marks(images) for kind, images in sets.items()}
    # A photograph and its grey version are copies of each other, and so are some emoji of two vendors.
    together = [kind for kind in marks if kind != "grey photographs" and not kind.startswith("emoji")]
    everything = Marks([image for kind in together for image in sets[kind]])
    for rule, distance in RULES.items():
        for kind, seen in [*marks.items(), ("all kinds together", everything)]:
            pairs, by_hash, by_both = false_pairs(seen, distance)
            ours, peer = 1e4 * by_both / pairs, 1e4 * by_hash / pairs
            ratio = peer / ours if ours else None
            print(f"{rule:<17} {kind:<20} {pairs:>9,} pairs, false by hash {by_hash:>7,}, ours {by_both:>4,}")
            records.append(
                result(
                    f"false@{rule}, {kind}",
                    ours,
                    peer,
                    "in 10,000 pairs",
                    ratio,
                    pairs=pairs,
                    false_pairs=by_both,
                )
            )
    shares: dict[tuple[str, str], list[npt.NDArray[np.bool_]]] = {}
    for kind, images in sets.items():
        originals = Marks(images[:num_altered])
        for alteration, alter in ALTERATIONS.items():
            copies = Marks([alter(image) for image in images[:num_altered]])
            for rule, distance in RULES.items():
                flags = found(originals, copies, distance)
                shares.setdefault((rule, f"copies, {alteration}"), []).append(flags)
                shares.setdefault((rule, f"copies of {kind}"), []).append(flags)
    for (rule, name), parts in shares.items():
        by_hash, by_both = np.concatenate(parts, axis=1).mean(axis=1) * 100
        kept = 100 * by_both / by_hash if by_hash else 100.0
        shown = f"by hash {by_hash:5.1f}%, ours {by_both:5.1f}%, of those by hash {kept:5.1f}%"
        print(f"{rule:<17} {name:<28} {shown}")
        records.append(
            result(f"found@{rule}, {name}", by_both, by_hash, "%", by_both / by_hash if by_hash else None)
        )
    started = time.process_time()
    many = np.arange(20_000) % len(everything)
    are_copies(everything.signatures, everything.signatures, many, np.roll(many, 1))
    spent = time.process_time() - started
    same = many[:4096]
    started = time.process_time()
    are_copies(everything.signatures, everything.signatures, same, same)
    print(
        f"{20_000 / spent:,.0f} pairs a CPU second; {4096 / (time.process_time() - started):,.0f} of copies"
    )
    return report(records)


if __name__ == "__main__":
    sys.exit(main())
