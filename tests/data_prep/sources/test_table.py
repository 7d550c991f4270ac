"""Caption tables of every make become one table; what cannot be read says so in one line."""

import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from data_prep import corpus
from data_prep.accounting.funnel import lost_captions
from data_prep.corpus import CorpusStageConfig, TablesConfig
from data_prep.filters import text as filter_text
from data_prep.filters.text import FilterTextConfig
from data_prep.formats.parquet import holds_values
from data_prep.sources import regions as convert
from data_prep.sources import text_file
from data_prep.sources.table import (
    TableSource,
    describe,
    find_files,
    from_description,
    scan,
)
from pipeline import runner
from pipeline.core.records import ConfigError, InputError
from pipeline.core.run import Run, read_manifest
from pipeline.core.stage import Stage
from tests.helpers.sources import kept, key_of, manifest, take_in, why

LAION = {
    "SAMPLE_ID": [7, 8],
    "URL": ["http://a.cn/1.jpg", "http://a.cn/2.jpg"],
    "TEXT": ["一只黑色的猫", "两只白色的狗"],
    "HEIGHT": [10.0, 20.0],
    "WIDTH": [30.0, None],
    "LANGUAGE": ["zh", "en"],
    "similarity": [0.3, None],
    "NSFW": ["UNLIKELY", None],
    "punsafe": [0.1, None],
}


def _source(path: Path | str, **fields: Any) -> TableSource:
    return TableSource(path=str(path), name="mine", **fields)


def _read(path: Path, **fields: Any) -> pl.DataFrame:
    source = _source(path, **fields)
    if text_file.is_text(str(path)):  # the corpus stage writes these as Parquet first
        table = path.with_name(f"{path.name}.parquet")
        aside = (str(path.with_name(f"{name}.parquet")) for name in ("malformed", "dropped"))
        convert.convert_text(str(path), source, convert.Places(str(table), *aside))
        path = table
    return scan(str(path), source).collect()


def _message(path: Path, **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        _read(path, **fields)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_laion_columns(tmp_path: Path) -> None:
    path = tmp_path / "laion.parquet"
    pl.DataFrame(LAION).write_parquet(path)
    assert _read(path).to_dict(as_series=False) == {
        "source": ["mine", "mine"],
        "row": [0, 1],
        "url": LAION["URL"],
        "caption": LAION["TEXT"],
        "language": ["zh", "en"],
        "score": [pytest.approx(0.3), None],
        "width_px": [30, None],
        "height_px": [10, 20],
        "nsfw": ["UNLIKELY", None],
        "unsafe": [pytest.approx(0.1), None],
        "watermark": [None, None],
    }


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.tsv", "a.jsonl", "a.csv.gz", "A.CSV"])
def test_lower_case_columns_in_every_format(tmp_path: Path, name: str) -> None:
    rows = [
        {"url": "http://a.cn/1.jpg", "caption": '一只，黑"色"的猫', "width": 30, "extra": "x"},
        {"url": "http://a.cn/2.jpg", "caption": "007", "width": 40, "extra": "y"},
    ]
    path, frame = tmp_path / name, pl.DataFrame(rows)
    if name.endswith("parquet"):
        frame.write_parquet(path)
    elif name.endswith("jsonl"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        is_tsv = name.endswith("tsv")
        text = frame.write_csv(
            separator="\t" if is_tsv else ",", quote_style="never" if is_tsv else "necessary"
        )
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    table = _read(path, carry_columns=("extra",))
    assert tuple(table.columns) == (
        "source", "row", "url", "caption", "language", "score", "width_px", "height_px",
        "nsfw", "unsafe", "watermark", "extra",
    )  # fmt: skip
    assert table["caption"].to_list() == ['一只，黑"色"的猫', "007"]  # digits stay the text they are
    assert table["width_px"].to_list() == [30, 40]
    assert table["extra"].to_list() == ["x", "y"]
    assert table["language"].is_null().all()
    assert table["score"].is_null().all()


def test_columns_by_other_names(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"address": ["http://a.cn/1"], "title": ["猫"], "clip": [0.5]}).write_parquet(path)
    table = _read(path, url_column="address", caption_column="title", score_column="clip")
    assert table.select("url", "caption", "score").row(0) == ("http://a.cn/1", "猫", 0.5)
    message = _message(path, url_column="address", caption_column="titel")
    assert "no column 'titel' (caption_column of source mine); found address, title, clip" in message


def test_a_missing_column_lists_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"url": ["http://a.cn/1"], "label": ["猫"]}).write_parquet(path)
    message = _message(path)
    assert "no column for the caption (source mine); found url, label; name it with caption_column" in message
    assert "no column 'x' to carry; found url, label" in _message(
        path, caption_column="label", carry_columns=("x",)
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_parquet_file(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame(LAION).write_parquet(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "not a readable table (" in _message(path)


def test_kinds_that_are_no_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"PK")
    assert "unknown kind of table; give .parquet, .csv, .tsv, .jsonl, .json or .txt" in _message(path)
    empty = tmp_path / "empty.csv"
    empty.write_bytes(b"")
    assert "cannot be read as a table: it is empty" in _message(empty)


def test_files_by_pattern(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "c.txt"):
        (tmp_path / name).write_text("url,caption\n")
    assert find_files(_source(tmp_path / "*.csv")) == [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]
    for path in (tmp_path / "none.csv", tmp_path / "*.parquet"):
        with pytest.raises(InputError, match=r"no such file \(source mine\); correct `path`"):
            find_files(_source(path))


def test_a_source_survives_the_way_through_a_receipt() -> None:
    source = _source("a.csv", carry_columns=("x",), exempt_from=("score",))
    assert from_description(json.loads(json.dumps(describe(source)))) == source


def _run(folder: Path, *tables: TableSource) -> Run:
    config = CorpusStageConfig(corpus=TablesConfig(kind="tables", tables=tables))
    return Run(
        str(folder),
        0,
        "local",
        1,
        (
            Stage("corpus", "", 1, config, (), corpus.plan, corpus.run),
            Stage("filter_text", "", 1, FilterTextConfig(), ("corpus",), filter_text.plan, filter_text.run),
        ),
    )


def _execute(run: Run) -> None:
    runner.execute(run, run.stages, redo=False)


def _garbled_parquet(path: Path) -> None:
    captions = [f"第{number}只猫在{number * 7919 % 1000}号" for number in range(5000)]
    urls = [f"http://a.cn/{number}" for number in range(5000)]
    pl.DataFrame({"url": urls, "caption": captions, "score": [0.5] * 5000}).write_parquet(path)
    data = bytearray(path.read_bytes())
    end = (
        len(data) - int.from_bytes(data[-8:-4], "little") - 8
    )  # the footer, where the columns stand, is whole
    data[4:end] = bytes(end - 4)
    path.write_bytes(data)


def _not_utf8(path: Path) -> None:
    path.write_bytes("url,caption\nhttp://a.cn/1,一只黑色的猫\n".encode("gb18030"))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.parquet", _garbled_parquet),
        ("b.csv", _not_utf8),
    ],
)
def test_damage_inside_a_table_is_named(tmp_path: Path, name: str, make: Any) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(InputError) as caught:
        _execute(_run(tmp_path / "run", _source(path)))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_an_empty_source_and_no_source(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("url,caption\n")
    with pytest.raises(InputError, match=r"a\.csv: no rows \(source mine\)"):
        _execute(_run(tmp_path / "run", _source(path)))
    with pytest.raises(ConfigError, match=r"corpus\.tables: empty"):
        _execute(_run(tmp_path / "run2"))


def test_tables_of_two_sources_are_judged_each_by_its_columns(tmp_path: Path) -> None:
    scored, plain = tmp_path / "scored.parquet", tmp_path / "plain.csv"
    pl.DataFrame(LAION).write_parquet(scored)
    plain.write_text("url,caption\nhttp://b.cn/1,  一只棕色的兔子 \nhttp://b.cn/2,兔子\n")
    run = _run(tmp_path / "run", _source(scored), _source(plain))
    _execute(run)
    manifest = read_manifest(run, "filter_text")
    assert manifest is not None
    assert (manifest.num_in, manifest.num_kept, manifest.dropped) == (4, 2, {"language": 1, "too_short": 1})
    kept = pl.concat(
        [pl.read_parquet(f"{run.folder}/filter_text/kept/0000{number}.parquet") for number in (0, 1)]
    )
    assert kept["caption"].to_list() == ["一只黑色的猫", "一只棕色的兔子"]  # without white space at the ends
    assert kept["file"].to_list() == [0, 1]


def test_nothing_left_names_the_rule(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("url,caption\nhttp://a.cn/1,猫\nhttp://a.cn/2,狗\n")
    with pytest.raises(InputError, match=r"no rows left of 2 after filter_text \(too_short removed 2\)"):
        _execute(_run(tmp_path / "run", _source(path)))


def test_what_is_around_an_address_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    around = [" ", "\t\r\n", "\u3000", "\xa0", "\ufeff", "\u200b", "\u2028", "\x00"]
    rows = [f"{mark}http://a.cn/{number}.jpg{mark}" for number, mark in enumerate(around)]
    pl.DataFrame(
        {"url": [*rows, None, "//b.cn/1.jpg", r"\\b.cn\2.jpg"], "caption": "一只黑色的猫"}
    ).write_parquet(path)
    plain = [f"http://a.cn/{number}.jpg" for number in range(len(around))]
    assert _read(path)["url"].to_list() == [*plain, None, "//b.cn/1.jpg", r"\\b.cn\2.jpg"]
    given = _read(path, address_scheme="https")["url"].to_list()
    assert given == [*plain, None, "https://b.cn/1.jpg", r"https://b.cn\2.jpg"]
    # A name on disk keeps its blanks.
    pl.DataFrame({"url": ["a .jpg "], "caption": ["一只黑色的猫"]}).write_parquet(path)
    assert _read(path, picture_folder=str(tmp_path))["url"][0].endswith("/a .jpg ")


def test_a_row_keeps_all_captions_that_the_rules_admit(tmp_path: Path) -> None:
    lists = [["一只黑色的猫在草地上", "短", "两只白色的狗狗"], ["短"], ["窗台上的一只橘猫"], []]
    plain = "雪山下的红色小屋"
    rows = [
        {"url": f"http://a.cn/{number}", "captions": texts} for number, texts in enumerate([*lists, plain])
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    pl.DataFrame({"url": [row["url"] for row in rows[:4]], "captions": lists}).write_parquet(
        tmp_path / "a.parquet"
    )
    settings: Any = {"name": "s", "caption_column": "captions", "list_captions": "random"}
    for name, more in (("a.jsonl", [plain]), ("a.parquet", [])):
        run = take_in(tmp_path / f"run {name}", TableSource(path=str(tmp_path / name), **settings))
        found = kept(run).sort("row")
        assert found["captions"].to_list() == [
            [lists[0][0], lists[0][2]],
            lists[2],
            *([text] for text in more),
        ]
        assert found["caption"].to_list() == [texts[0] for texts in found["captions"]]
        assert found["key"][0] == key_of("http://a.cn/0", lists[0][0])
        assert manifest(run, "filter_text").dropped == {"caption_missing": 1, "too_short": 1}
        assert lost_captions(manifest(run, "filter_text")) == (
            "filter_text: rows that stay lost 1 of their captions: too_short 1"
        )
        assert why(run, "http://a.cn/1")[1].startswith("  dropped by filter_text: too_short")
    with pytest.raises(ValueError, match="carry_columns names captions"):
        TableSource(path="a", carry_columns=("captions",), **settings)


@pytest.mark.parametrize("list_captions", [None, "each", "first"])
def test_a_part_of_a_table_has_the_rows_and_numbers_that_the_whole_has(
    list_captions: Any, tmp_path: Path
) -> None:
    texts = [[f"第{row}只猫", f"第{row}条狗"][: 1 + row % 2] for row in range(50)]
    captions = texts if list_captions else [text[0] for text in texts]
    urls = [f"http://a.cn/{row}" for row in range(50)]
    path = str(tmp_path / "a.parquet")
    pl.DataFrame({"url": urls, "caption": captions}).write_parquet(path, row_group_size=7)
    source = _source(path, list_captions=list_captions)
    whole = scan(path, source, is_whole=True).collect()
    assert len(whole) == (75 if list_captions == "each" else 50)
    for first, count in ((0, 10), (9, 20), (40, 35), (60, 10)):
        part = scan(path, source, is_whole=True, first=first, count=count).collect()
        assert part.equals(whole.slice(first, count))
    # A slice of its own in the plan would mean that what lies before it is read, too.
    plan = scan(path, source, is_whole=True, first=9, count=20).explain()
    assert ("SLICE[" in plan) == (list_captions == "each")


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        (pl.Series([None] * 6, dtype=pl.Float32), False),
        (pl.Series([None, None, None, None, 0.3, None], dtype=pl.Float64), True),
        (pl.Series([1, 2, 3, 4, 5, 6], dtype=pl.Int64), True),
        (pl.Series(["0.3", None, None, None, None, None]), None),
    ],
)
def test_a_footer_tells_whether_a_table_has_scores(
    scores: pl.Series, told: bool | None, tmp_path: Path
) -> None:
    path = str(tmp_path / "a.parquet")
    pl.DataFrame({"similarity": scores}).write_parquet(path, row_group_size=2)
    assert holds_values(path, "similarity") is told
    assert holds_values(path, "other") is None
    pl.DataFrame({"similarity": scores}).write_parquet(path, statistics=False)
    assert holds_values(path, "similarity") is None
