"""Blacklist matching on generated captions: ours beside a Python row loop and duckdb's RE2.

    python benchmarks/filter_text.py [--full] [--rows N]

Each engine says of every caption whether it holds any of the words; the answers are compared row by row. The
loop is timed on a part of the rows, and its rate is used. duckdb is a peer only where it is installed.
Last line: one JSON list, a record a peer and list size, ratio = ours / peer in rows per second.
"""

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable

import polars as pl

from data_prep.text_rules import first_reason, not_blacklisted

WORD_COUNTS = (100, 1000, 5000)
LOOP_ROWS = 20_000
# Common characters: captions of them are as dense as real ones, words of them are seldom hit by chance.
CHARACTERS = "".join(chr(0x4E00 + 7 * number % 3000) for number in range(3000))


def make_words(count: int, rng: random.Random) -> list[str]:
    """Distinct words of 2 to 6 characters, a tenth of them Latin."""
    words: dict[str, None] = {}
    while len(words) < count:
        alphabet = "abcdefghijklmnopqrstuvwxyz" if rng.random() < 0.1 else CHARACTERS
        words["".join(rng.choices(alphabet, k=rng.randint(3, 6)))] = None
    return list(words)


def make_captions(count: int, words: list[str], rng: random.Random) -> pl.Series:
    """Captions of 5 to 50 characters; a tenth of them hold a word of the list, in either case."""
    pool = []
    for _ in range(min(count, 50_000)):
        caption = "".join(rng.choices(CHARACTERS, k=rng.randint(5, 44)))
        if rng.random() < 0.1:
            at, word = rng.randint(0, len(caption)), rng.choice(words)
            caption = caption[:at] + (word.upper() if rng.random() < 0.5 else word) + caption[at:]
        pool.append(caption)
    frame = pl.DataFrame({"caption": pool})
    indices = pl.int_range(count, eager=True) % len(pool)
    # A number in front makes every caption a string of its own: no engine answers from a dictionary.
    numbered = indices.cast(pl.String) + pl.int_range(count, eager=True).cast(pl.String)
    return (numbered + frame["caption"].gather(indices)).alias("caption")


def ours(captions: pl.Series, words: list[str]) -> list[bool]:
    rule = not_blacklisted({"list": words})
    return captions.to_frame().select(first_reason([rule]).is_not_null()).to_series().to_list()


def loop(captions: pl.Series, words: list[str]) -> list[bool]:
    lowered = [word.lower() for word in words]
    return [any(word in folded for word in lowered) for caption in captions for folded in [caption.lower()]]


def duckdb_re2(captions: pl.Series, words: list[str]) -> list[bool]:
    import duckdb

    table = captions.to_frame().to_arrow()
    connection = duckdb.connect(config={"threads": os.cpu_count() or 1})
    connection.register("captions", table)
    query = "SELECT regexp_matches(caption, ?) FROM captions"
    return [row[0] for row in connection.execute(query, ["(?i)" + "|".join(words)]).fetchall()]


def timed(
    engine: Callable[[pl.Series, list[str]], list[bool]], *arguments: object
) -> tuple[float, list[bool]]:
    started = time.perf_counter()
    answers = engine(*arguments)  # type: ignore[arg-type]
    return time.perf_counter() - started, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--full", action="store_true", help="2 million rows")
    options = parser.parse_args()
    num_rows = 2_000_000 if options.full else options.rows
    try:
        import duckdb  # noqa: F401

        has_duckdb = True
    except ImportError:
        has_duckdb = False
        print("duckdb is not installed: pip install duckdb to compare with its RE2")
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    records = []
    for count in WORD_COUNTS:
        rng = random.Random(count)
        words = make_words(count, rng)
        captions = make_captions(num_rows, words, rng)
        seconds, answers = timed(ours, captions, words)
        rate = num_rows / seconds
        print(f"{count:>5} words  ours   {rate / 1e6:8.3f} million rows/s  {sum(answers):,} hits")
        peers: list[tuple[str, Callable[[pl.Series, list[str]], list[bool]], int]] = [
            ("loop", loop, min(LOOP_ROWS, num_rows))
        ]
        if has_duckdb:
            peers.append(("duckdb", duckdb_re2, num_rows))
        for name, engine, rows in peers:
            peer_seconds, peer_answers = timed(engine, captions[:rows], words)
            peer_rate = rows / peer_seconds
            equal = peer_answers == answers[:rows]
            print(f"{count:>5} words  {name:<6} {peer_rate / 1e6:8.3f} million rows/s")
            records.append(
                {
                    "name": f"filter_text/{name}@{count}",
                    "ours": round(rate),
                    "peer": round(peer_rate),
                    "unit": "rows/s",
                    "ratio": round(rate / peer_rate, 2),
                    "equal": equal,
                    "machine": machine,
                }
            )
    print(json.dumps(records))


if __name__ == "__main__":
    main()
