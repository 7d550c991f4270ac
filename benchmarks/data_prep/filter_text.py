"""Measure the matching of word lists: ours against a Python row loop, duckdb and the fastest engine.

    python benchmarks/data_prep/filter_text.py [--full] [--rows N]

Each engine says of every caption whether it holds any of the words; the answers are compared row by row.
Engines take turns on one thread and the best time counts, in processor seconds, which other work on the
machine hardly moves; one that is slow is timed on a part of the rows, and its rate is used. Peers: a row
loop with `in`, duckdb (RE2 over lower case), polars' `contains_any` and regex, pyarrow's RE2, ahocorasick_rs
and pyahocorasick in a row loop; those that are not installed are left out and named. Last line: one JSON
list, ratio = ours / peer in rows a processor second; the peer of `filter_text/fastest@N` is the fastest of
them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import os
import random
import re
import time
from collections.abc import Callable
from typing import Any

os.environ["POLARS_MAX_THREADS"] = "1"  # polars reads it once, when it is imported

import numpy as np
import numpy.typing as npt
import polars as pl

from benchmarks.harness import parse, parser, record, report
from data_prep.rules.text import first_reason, not_blacklisted
from data_prep.rules.word_match import has_hyperscan

WORD_COUNTS = (100, 1000, 5000)
PROBE_ROWS = 2_000  # first rate of an engine
SECONDS = 3.0  # of one timing of a slow engine, about
REPEATS = 7  # of an engine that does all rows in so many seconds
REPEATS_OF_SLOW = 2
# Common characters: captions of them are as dense as real ones, words of them are seldom hit by chance.
CHARACTERS = "".join(chr(0x4E00 + 7 * number % 3000) for number in range(3000))


def make_words(count: int, rng: random.Random) -> list[str]:
    """Return distinct words of 2 to 6 characters, a tenth of them Latin."""
    words: dict[str, None] = {}
    while len(words) < count:
        alphabet = "abcdefghijklmnopqrstuvwxyz" if rng.random() < 0.1 else CHARACTERS
        words["".join(rng.choices(alphabet, k=rng.randint(3, 6)))] = None
    return list(words)


def make_captions(count: int, words: list[str], rng: random.Random) -> pl.Series:
    """Return captions of 5 to 50 characters; a tenth of them hold a word of the list, in either case."""
    pool = []
    for _ in range(min(count, 50_000)):
        caption = "".join(rng.choices(CHARACTERS, k=rng.randint(5, 44)))
        if rng.random() < 0.1:
            at, word = rng.randint(0, len(caption)), rng.choice(words)
            caption = caption[:at] + (word.upper() if rng.random() < 0.5 else word) + caption[at:]
        pool.append(caption)
    frame = pl.DataFrame({"caption": pool})
    indices = pl.int_range(count, eager=True) % len(pool)
    # A number in front makes every caption a different string, so that no engine answers from a dictionary.
    numbered = indices.cast(pl.String) + pl.int_range(count, eager=True).cast(pl.String)
    return (numbered + frame["caption"].gather(indices)).alias("caption")


Answers = npt.NDArray[np.bool_]
Engine = Callable[[pl.Series, list[str]], Answers]


def ours(captions: pl.Series, words: list[str]) -> Answers:
    rule = not_blacklisted({"list": words})
    judged = captions.to_frame().lazy().select(first_reason([rule]).is_not_null())
    return judged.collect(engine="streaming").to_series().to_numpy()


def loop(captions: pl.Series, words: list[str]) -> Answers:
    lowered = [word.lower() for word in words]
    return np.array(
        [any(word in folded for word in lowered) for text in captions for folded in [text.lower()]]
    )


def duckdb(captions: pl.Series, words: list[str]) -> Answers:
    import duckdb as engine

    connection = engine.connect(config={"threads": 1})
    connection.register("captions", captions.to_frame().to_arrow())
    query = "SELECT regexp_matches(lower(caption), ?) AS hit FROM captions"
    found: Answers = connection.execute(query, [_pattern(words)]).fetchnumpy()["hit"]
    return found


def contains_any(captions: pl.Series, words: list[str]) -> Answers:
    hit = pl.col("caption").str.contains_any(words, ascii_case_insensitive=True)
    return captions.to_frame().lazy().select(hit).collect(engine="streaming").to_series().to_numpy()


def polars_regex(captions: pl.Series, words: list[str]) -> Answers:
    hit = pl.col("caption").str.to_lowercase().str.contains(_pattern(words))
    return captions.to_frame().lazy().select(hit).collect(engine="streaming").to_series().to_numpy()


def pyarrow(captions: pl.Series, words: list[str]) -> Answers:
    import pyarrow.compute as pc

    lowered: Any = captions.str.to_lowercase().to_arrow()
    return pc.match_substring_regex(lowered, _pattern(words)).to_numpy(zero_copy_only=False)


def ahocorasick_rs(captions: pl.Series, words: list[str]) -> Answers:
    import ahocorasick_rs as engine

    find = engine.AhoCorasick([word.lower() for word in words]).find_matches_as_indexes
    return np.array([bool(find(text)) for text in captions.str.to_lowercase().to_list()])


def pyahocorasick(captions: pl.Series, words: list[str]) -> Answers:
    import ahocorasick as engine

    automaton = engine.Automaton()
    for word in words:
        automaton.add_word(word.lower(), True)
    automaton.make_automaton()
    return np.array([any(automaton.iter(text)) for text in captions.str.to_lowercase().to_list()])


PEERS: tuple[Engine, ...] = (
    loop, duckdb, contains_any, polars_regex, pyarrow, ahocorasick_rs, pyahocorasick,
)  # fmt: skip


def _pattern(words: list[str]) -> str:
    return "|".join(re.escape(word.lower()) for word in words)


def timed(engine: Engine, captions: pl.Series, words: list[str]) -> tuple[float, Answers]:
    started = time.process_time()
    answers = engine(captions, words)
    return time.process_time() - started, answers


def rows_for(engine: Engine, captions: pl.Series, words: list[str]) -> int:
    """Return how many rows one timing takes: all, or what a slow engine does in SECONDS."""
    seconds, _ = timed(engine, captions[:PROBE_ROWS], words)
    return min(len(captions), max(PROBE_ROWS, int(SECONDS / seconds * PROBE_ROWS)))


def measure(count: int, num_rows: int) -> list[dict[str, Any]]:
    """Return the records of one list size."""
    rng = random.Random(count)
    words = make_words(count, rng)
    captions = make_captions(num_rows, words, rng)
    engines: dict[str, tuple[Engine, int]] = {"ours": (ours, num_rows)}
    for engine in PEERS:
        try:
            engines[engine.__name__] = (engine, rows_for(engine, captions, words))
        except Exception as error:  # not installed, or it does not take so many words
            print(f"{count:>5} words  {engine.__name__} is left out: {str(error).splitlines()[0]}")
    rates: dict[str, float] = {}
    answers: dict[str, Answers] = {}
    for turn in range(REPEATS):
        for name, (engine, rows) in engines.items():
            if rows < num_rows and turn >= REPEATS_OF_SLOW:
                continue
            seconds, answers[name] = timed(engine, captions[:rows], words)
            rates[name] = max(rates.get(name, 0.0), rows / seconds)
    equal = {
        name: bool(np.array_equal(found, answers["ours"][: len(found)])) for name, found in answers.items()
    }
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        print(f"{count:>5} words  {name:<15} {rate / 1e6:8.3f} million rows/CPU s  equal: {equal[name]}")
    fastest = max((name for name in rates if name != "ours"), key=rates.__getitem__)
    peers = {name: name for name in ("loop", "duckdb") if name in rates} | {"fastest": fastest}
    return [
        record(
            f"filter_text/{label}@{count}",
            ours=rates["ours"],
            peer=rates[name],
            unit="rows/CPU s",
            equal=equal[name],
            **({"engine": name} if label == "fastest" else {}),
        )
        for label, name in peers.items()
    ]


def main() -> None:
    made = parser(__doc__, full="2 million rows")
    made.add_argument("--rows", type=int, default=400_000)
    options = parse(made)
    if not has_hyperscan():
        print("hyperscan is not installed: ours is polars' contains_any at every size")
    num_rows = 2_000_000 if options.full else options.rows
    records = [found for count in WORD_COUNTS for found in measure(count, num_rows)]
    if wrong := [found["name"] for found in records if not found["equal"]]:
        raise SystemExit(f"engines keep different rows: {', '.join(wrong)}")
    report(records)


if __name__ == "__main__":
    main()
