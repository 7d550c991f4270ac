"""Measure concept balancing: ours against the published algorithm and against a loop over an automaton.

    python benchmarks/data_prep/concepts.py [--full] [--rows N]

`concepts/published@300`: 300 entries in a million random captions, with MetaCLIP's algorithm 1 as a loop over
texts and entries and the draws in plain integers; `equal` says that each caption's entries, the counts and
the kept rows are the same. `concepts/ahocorasick_rs@N`: matching N entries, with ahocorasick_rs in a loop
over captions (left out if it is not installed). Rates are captions in a processor second of one thread, with
the building of the automaton. Last line: one JSON list.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import os
import time
from typing import Any

os.environ["POLARS_MAX_THREADS"] = "1"  # polars reads it once, when it is imported

import numpy as np
import polars as pl

from benchmarks.harness import parse, parser, record, report
from data_prep.concepts import matching
from data_prep.concepts.entries import plain

CHARACTERS = np.array([chr(0x4E00 + number) for number in range(3_500)])
CAP, SEED = 2_000, 3
_64 = (1 << 64) - 1


def strings(count: int, shortest: int, longest: int, rng: np.random.Generator) -> list[str]:
    """Return strings of characters that are as uneven as those of a language (Zipf)."""
    chances = 1 / np.arange(1, len(CHARACTERS) + 1)
    length_N = rng.integers(shortest, longest + 1, count)
    text = "".join(rng.choice(CHARACTERS, length_N.sum(), p=chances / chances.sum()))
    ends = np.cumsum(length_N)
    return [text[end - length : end] for end, length in zip(ends.tolist(), length_N.tolist(), strict=True)]


def make_entries(count: int, rng: np.random.Generator) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found |= dict.fromkeys(strings(count, 2, 4, rng))
    return list(found)[:count]


def mix(value: int) -> int:
    """SplitMix64 in plain integers."""
    value = (value + 0x9E3779B97F4A7C15) & _64
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _64
    return value ^ value >> 31


def published(
    texts: list[str], keys: list[str], entries: list[str], seeds: list[int]
) -> tuple[Any, Any, Any]:
    """Algorithm 1 of MetaCLIP: matched entries of each text, counts, kept texts."""
    matched = [[number for number, entry in enumerate(entries) if entry in text] for text in texts]
    counts = [0] * len(entries)
    for found in matched:
        for number in found:
            counts[number] += 1
    chances = [CAP / max(count, CAP) for count in counts]
    of_seed = mix(SEED)
    kept = []
    for key, found in zip(keys, matched, strict=True):
        of_key = mix(int(key[-16:], base=16) ^ of_seed)
        kept.append(any((mix(seeds[number] ^ of_key) >> 11) * 2.0**-53 < chances[number] for number in found))
    return matched, counts, kept


def against_published(num_rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    texts, entries = pl.Series(strings(num_rows, 2, 30, rng)), pl.Series("entry", make_entries(300, rng))
    keys = pl.Series([f"{number:032x}" for number in rng.integers(0, 1 << 62, num_rows).tolist()])
    started = time.process_time()
    matches = matching.match(texts, entries)
    counts = matching.counted(matches, len(entries))
    table = pl.DataFrame({"entry": entries, "count": counts, "seed": matching.entry_seeds(entries)})
    judged = matching.balance(SEED, pl.DataFrame({"key": keys, "concepts": matches}), table, CAP)
    ours = num_rows / (time.process_time() - started)
    as_lists = texts.to_list(), keys.to_list(), entries.to_list(), table["seed"].to_list()
    started = time.process_time()
    found, count, kept = published(*as_lists)
    peer = num_rows / (time.process_time() - started)
    equal = matches.to_list() == found and counts.tolist() == count and judged["is_kept"].to_list() == kept
    print(
        f"{num_rows:,} captions, {sum(kept):,} kept; {sum(n > CAP for n in count)} of 300 entries above"
        f" the cap of {CAP:,}"
    )
    return record(
        "concepts/published@300", ours=ours, peer=peer, unit="captions/CPU s", equal=equal, rows=num_rows
    )


def against_automaton(num_rows: int, num_entries: int) -> dict[str, Any] | None:
    try:
        import ahocorasick_rs
    except ImportError:
        print("ahocorasick_rs is not installed: left out")
        return None
    rng = np.random.default_rng(num_entries)
    texts, entries = (
        pl.Series(strings(num_rows, 2, 30, rng)),
        pl.Series("entry", make_entries(num_entries, rng)),
    )
    started = time.process_time()
    matches = matching.match(texts, entries)
    ours = num_rows / (time.process_time() - started)
    started = time.process_time()
    find = ahocorasick_rs.AhoCorasick(entries.to_list()).find_matches_as_indexes
    compared = pl.DataFrame({"text": texts}).select(plain(pl.col("text"))).to_series().to_list()
    found = [sorted({number for number, _, _ in find(text, overlapping=True)}) for text in compared]
    peer = num_rows / (time.process_time() - started)
    return record(
        f"concepts/ahocorasick_rs@{num_entries}",
        ours=ours, peer=peer, unit="captions/CPU s", equal=matches.to_list() == found, rows=num_rows,
        matches_per_caption=round(float(np.mean(matches.list.len().to_numpy())), 2),
    )  # fmt: skip


def main() -> None:
    made = parser(__doc__, full="2 million captions for the automaton")
    made.add_argument("--rows", type=int, default=1_000_000)
    options = parse(made)
    num_rows = 2_000_000 if options.full else options.rows
    records = [against_published(options.rows)]
    records += [found for size in (5_000, 50_000, 500_000) if (found := against_automaton(num_rows, size))]
    if wrong := [found["name"] for found in records if not found["equal"]]:
        raise SystemExit(f"different rows: {', '.join(wrong)}")
    report(records)


if __name__ == "__main__":
    main()
