"""Concepts: entries from files and captions, matches and draws as published, and the stages of a run."""

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import cnclip
from data_prep.concepts import matching
from data_prep.concepts.entries import count_ngrams, plain, read_entries
from pipeline.catalog import load
from pipeline.cli import main
from pipeline.core.records import ConfigError, InputError
from pipeline.last_start import start
from tests.helpers.corpus_files import answer_with_drawings


def as_compared(texts: list[str]) -> pl.Series:
    return pl.DataFrame({"text": texts}).select(plain(pl.col("text"))).to_series()


def numbers(texts: list[str], entries: list[str]) -> list[list[int]]:
    found: list[list[int]] = matching.match(pl.Series(texts), as_compared(entries)).to_list()
    return found


def test_entries_are_found_anywhere_in_chinese_and_as_words_in_latin() -> None:
    entries = ["红色", "色手", "cat", "iphone 12", "手机"]
    texts = [
        "红色手机",
        "红红色色",
        "category",
        "一只Cat和狗",
        "红色iPhone　12手机",
        "ＣＡＴ",
        "",
        "cats cat",
    ]
    expected = [[0, 1, 4], [0], [], [2], [0, 3, 4], [2], [], [2]]
    assert numbers(texts, entries) == expected


def test_an_entry_in_an_entry_and_twice_in_a_text_counts_once() -> None:
    assert numbers(["小猫小猫咪"], ["猫", "小猫", "猫咪", "小猫咪"]) == [[0, 1, 2, 3]]


def test_texts_of_a_row_are_all_its_captions_but_no_entry_lies_across_two() -> None:
    rows = pl.LazyFrame(
        {
            "key": ["a", "b", "c"],
            "caption": ["红色", "猫咪", "手机"],
            "captions": [["红色", "手机"], None, []],
        }
    )
    texts = matching.texts_of(rows).collect()
    assert numbers(texts["text"].to_list(), ["红色", "手机", "色手", "猫咪"]) == [[0, 1], [3], [1]]


def published(
    texts: list[str], entries: list[str], cap: int, draw: Any
) -> tuple[list[list[int]], list[int], list[bool]]:
    """MetaCLIP's algorithm as its paper has it (algorithm 1), with `draw(text, entry)` for random numbers."""
    matched = [[number for number, entry in enumerate(entries) if entry in text] for text in texts]
    counts = [sum(number in found for found in matched) for number in range(len(entries))]
    chance = [cap / max(count, cap) for count in counts]
    kept = [any(draw(row, number) < chance[number] for number in found) for row, found in enumerate(matched)]
    return matched, counts, kept


def test_equal_to_the_published_algorithm() -> None:
    rng = random.Random(0)
    letters = "猫狗红蓝山水车人花树" + "ab 1"
    texts = ["".join(rng.choices(letters, k=rng.randint(0, 12))) for _ in range(4000)]
    entries = as_compared(["猫狗", "红", "红蓝", "山水车", "人", "花花树", "树", "a", "b1", "车 a"])
    keys = pl.Series([f"{rng.getrandbits(128):032x}" for _ in texts])
    matches = matching.match(pl.Series(texts), entries)
    counts = matching.counted(matches, len(entries))
    table = pl.DataFrame({"entry": entries, "count": counts, "seed": matching.entry_seeds(entries)})
    rows = pl.DataFrame({"key": keys, "concepts": matches})
    judged = matching.balance(7, rows, table, 300)
    key_N, seed_E = matching.key_seeds(keys).to_numpy(), table["seed"].to_numpy()

    def draw(row: int, entry: int) -> float:
        return float(matching.draws(7, key_N[row : row + 1], seed_E[entry : entry + 1])[0])

    matched, count, kept = published(as_compared(texts).to_list(), entries.to_list(), 300, draw)
    assert matches.to_list() == matched
    assert counts.tolist() == count
    assert judged["is_kept"].to_list() == kept
    rarest = [min(found, key=lambda entry: (count[entry], entry)) if found else None for found in matched]
    assert judged["rarest"].to_list() == rarest
    # Draws are even, and the chances that rows carry add up to the rows that stay.
    assert judged["concept_chance"].sum() == pytest.approx(judged["is_kept"].sum(), rel=0.05)


def test_draws_are_even_and_depend_on_seed_key_and_entry_alone() -> None:
    keys = np.arange(50_000, dtype=np.uint64)
    one = np.full(50_000, 5, np.uint64)
    first = matching.draws(0, keys, one)
    assert 0 <= first.min() < first.max() < 1
    assert np.histogram(first, 10, (0, 1))[0] == pytest.approx(np.full(10, 5_000), rel=0.05)
    assert np.array_equal(first[::2], matching.draws(0, keys[::2], one[::2]))
    for other in (matching.draws(1, keys, one), matching.draws(0, keys, one + np.uint64(1)), first[::-1]):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.02


def test_ngrams_are_words_by_count_and_cohesion() -> None:
    rng = random.Random(0)
    filler = [chr(0x5000 + number) for number in range(300)]
    texts = ["".join([*rng.choices(filler, k=3), "蝴蝶", *rng.choices(filler, k=2)]) for _ in range(400)]
    texts += ["".join(rng.choices(filler, k=8)) + "，abc" for _ in range(400)]
    found = count_ngrams(pl.Series(texts), 3, 100, 3.0)
    assert found["entry"].to_list() == ["蝴蝶"]
    assert found["count"].to_list() == [400]
    share = 400 / sum(len(text.split("，")[0]) - 1 for text in texts)
    single = 400 / sum(len(text.split("，")[0]) for text in texts)
    assert found["cohesion"].item() == pytest.approx(np.log2(share / single**2))
    assert count_ngrams(pl.Series(dtype=pl.String), 4, 1, 0).is_empty()
    assert count_ngrams(pl.Series(["猫", "", "ab"]), 2, 1, 0).is_empty()
    whole = count_ngrams(pl.Series(["一二三四"] * 3), 4, 3, -99)
    assert set(whole["entry"]) == {"一二", "二三", "三四", "一二三", "二三四", "一二三四"}


def test_files_of_entries(tmp_path: Path) -> None:
    titles = tmp_path / "titles.gz"
    titles.write_bytes(gzip.compress("page_title\n红_色\n\n 猫 \n".encode()))
    assert read_entries(str(titles)).to_list() == ["红 色", "猫"]
    for name, data, said in (
        ("a.txt", b"\n \n", "no entries in it"),
        ("b.txt", "猫\n".encode() + b"\xb9\xb7\n", "line 2 is not UTF-8"),
        ("c.gz", gzip.compress(b"abc")[:-4], "cannot be unpacked"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{name}: {said}"):
            read_entries(str(tmp_path / name))
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\); correct \[concepts\] files"):
        read_entries(str(tmp_path))


RUN = """
[run]
folder = "{root}/run"
processes = 1
[corpus]
kind = "tables"
[[corpus.tables]]
path = "{root}/captions.csv"
name = "mine"
[dedup]
partitions = 2
[concepts]
files = ["{root}/entries.txt"]
[balance]
cap = 4
"""
KINDS = ["橘猫趴在窗台上", "白狗跑在草地上", "这里什么都没有了"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty cats, three dogs and two rows without a concept."""
    kinds = [0] * 20 + [1] * 3 + [2] * 2
    rows = {
        "url": [f"http://a.cn/{number}.jpg" for number in range(25)],
        "caption": [f"第{number}幅{KINDS[kind]}" for number, kind in enumerate(kinds)],
    }
    pl.DataFrame(rows).write_csv(tmp_path / "captions.csv")
    (tmp_path / "entries.txt").write_text("橘猫\n白狗\n熊猫\n猫\n橘猫\n", encoding="utf-8")
    (tmp_path / "my.toml").write_text(RUN.format(root=tmp_path), encoding="utf-8")

    answer_with_drawings(monkeypatch)
    return tmp_path


def test_a_run_balances_and_says_why(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = str(root / "my.toml")
    start(toml)
    capsys.readouterr()
    run = root / "run"
    counts = pl.read_parquet(run / "count_concepts/counts.parquet")
    assert dict(counts.select("entry", "count").iter_rows()) == {"橘猫": 20, "白狗": 3, "熊猫": 0}
    gathered = json.loads((run / "concepts/manifest.json").read_text())
    assert gathered["dropped"] == {"duplicate": 1, "too_short": 1}
    corpus = cnclip.Corpus(toml)
    rows = corpus.rows.collect()
    cats = rows.filter(pl.col("caption").str.contains("猫"))
    assert 0 < cats.height < 12
    assert rows.height == cats.height + 3
    assert cats["concept_chance"].to_list() == pytest.approx([0.2] * cats.height)
    assert rows["concepts"].explode().value_counts()["count"].sum() == rows.height
    assert dict(corpus.concepts().select("entry", "rows").iter_rows()) == {
        "橘猫": cats.height,
        "白狗": 3,
        "熊猫": 0,
    }
    assert corpus.concepts()["count"].to_list() == ([20, 3, 0] if cats.height > 3 else [3, 20, 0])

    lock = json.loads((run / "lock/corpus.lock.json").read_text())
    assert lock["funnel"]["balance"]["dropped"] == {"concept_balance": 20 - cats.height, "no_concept": 2}
    assert lock["settings"]["balance"] == {"cap": 4}
    assert lock["rules"]["balance"] == {"balance": 1}
    report = json.loads((run / "report/report.json").read_text())
    assert report["concepts"]["top"][0] == {"entry": "橘猫", "rows": 20, "kept": cats.height}
    page = (run / "report/report.html").read_text()
    assert "only concepts that prevail" in page
    assert '<th scope="row" lang="zh">橘猫</th>' in page

    assert main(["status", toml]) == 0
    said = capsys.readouterr()
    assert (
        "2 of 3 entries are in 23 of 25 captions; the most frequent: 橘猫 20, 白狗 3" in said.out + said.err
    )
    dropped = pl.concat([pl.read_parquet(path) for path in sorted((run / "balance/dropped").glob("*"))])
    cat = dropped.filter(pl.col("reason") == "concept_balance")["key"][0]
    assert main(["why", toml, cat]) == 0
    detail = "the rarest concept, 橘猫, has 20 rows; cap 4"
    assert f"dropped by balance: concept_balance ({detail})" in capsys.readouterr().out
    assert main(["why", toml, "http://a.cn/24.jpg"]) == 0
    assert "dropped by balance: no_concept\n" in capsys.readouterr().out

    # A part of the shards keeps the concepts of its rows.
    (root / "keys.txt").write_text("\n".join(rows["key"][:3]) + "\n", encoding="utf-8")
    assert main(["subset", toml, "--keys", str(root / "keys.txt"), "--out", str(root / "few")]) == 0
    few = cnclip.Corpus(root / "few")
    assert few.rows.collect()["concepts"].to_list() == rows["concepts"][:3].to_list()
    assert few.concepts()["rows"].sum() == 3
    capsys.readouterr()

    # Another cap reruns only the balance and what follows; another seed draws anew.
    assert main(["plan", toml, "--set", "run.seed=1"]) in (0, 2)
    planned = capsys.readouterr().out
    assert re.search(r"match_concepts +done", planned)
    assert re.search(r"balance +stale +.*seed", planned)
    assert start(toml, ["balance.cap=100"], redo=True, only="balance")[1] == 1
    assert json.loads((run / "balance/manifest.json").read_text())["dropped"] == {"no_concept": 2}


@pytest.mark.slow
def test_sources_may_be_exempt(root: Path) -> None:
    text = (root / "my.toml").read_text(encoding="utf-8")
    text = text.replace('name = "mine"', 'name = "mine"\nexempt_from = ["balance"]')
    (root / "my.toml").write_text(text, encoding="utf-8")
    start(str(root / "my.toml"), last="balance")
    assert json.loads((root / "run/balance/manifest.json").read_text())["num_kept"] == 25


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["concepts.files=[]"], "no entries: name files, or the length of ngrams"),
        (["concepts.ngrams=1"], "single characters are no concepts"),
        (["concepts.ngrams=5"], "concepts.ngrams"),
        (["balance.cap=0"], "balance.cap"),
    ],
)
def test_settings_are_checked(root: Path, change: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(str(root / "my.toml"), change)


def test_balance_needs_concepts_and_a_file_that_exists(root: Path) -> None:
    text = (root / "my.toml").read_text(encoding="utf-8")
    (root / "bare.toml").write_text(text.replace("[concepts]\n", "[launch]\n").replace("files =", "#"))
    with pytest.raises(ConfigError, match="balance: no concepts to balance"):
        load(str(root / "bare.toml"))
    (root / "entries.txt").unlink()
    with pytest.raises(InputError, match=r"entries\.txt: no such file; correct \[concepts\] files"):
        start(str(root / "my.toml"), last="balance")
    (root / "entries.txt").write_text("猫\n", encoding="utf-8")
    with pytest.raises(InputError, match="no entry is long or frequent enough"):
        start(str(root / "my.toml"), last="balance")
