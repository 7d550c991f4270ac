"""Tables as sources: what becomes a row, what is set aside and why, which rules a source may switch off."""

import json
from pathlib import Path

import polars as pl
import pytest

from data_prep.accounting.funnel import by_source
from data_prep.corpus import SourcesConfig
from data_prep.filters.text import FilterTextConfig
from data_prep.sources import text_file, text_lines
from data_prep.sources.readers.source import PackedSource
from data_prep.sources.table import TableSource
from pipeline.core.config import build
from pipeline.core.records import ConfigError, InputError
from tests.helpers.sources import kept, manifest, take_in, why


def captions(path: Path) -> tuple[list[str], list[str]]:
    """Captions and reasons of the malformed rows of a text table with url and caption."""
    batches = list(text_file.read_batches(str(path), ["url", "caption"]))
    rows = [caption for batch in batches for caption in batch.rows["caption"]]
    return rows, [str(item.reason) for batch in batches for item in batch.malformed]


def test_wukong_captions_with_commas_quotes_and_newlines(tmp_path: Path) -> None:
    path = tmp_path / "wukong_100m_0.csv"
    path.write_text(
        '\ufeffurl,caption\nhttp://a.cn/1,"一只猫,\n两只狗 ""大"""\nhttp://a.cn/2,5" 的屏幕很小\r\n\nhttp://a.cn/3,\n',
        encoding="utf-8",
        newline="",
    )
    rows, reasons = captions(path)
    assert rows == ['一只猫,\n两只狗 "大"', '5" 的屏幕很小', None]
    assert reasons == []


def test_malformed_csv_rows_are_set_aside_each_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = [
        b"url,caption",
        "http://a.cn/1,好的一行".encode(),
        "http://a.cn/2,两只,白色".encode(),
        b"http://a.cn/3",
        b"http://a.cn/4,\xb0\xa1\xb0\xa1",
        'http://a.cn/5,"没有结束'.encode(),
        "http://a.cn/6,被吞掉的一行".encode(),
        'http://a.cn/7,"被吞掉的另一行"'.encode(),
        "http://a.cn/8,最后的好行".encode(),
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    rows, reasons = captions(path)
    assert sorted(rows) == sorted(["好的一行", "被吞掉的一行", "被吞掉的另一行", "最后的好行"])
    assert sorted(reasons) == [
        "malformed:columns", "malformed:columns", "malformed:encoding", "malformed:quote",
    ]  # fmt: skip


def test_an_unclosed_quote_at_the_end_swallows_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        'url,caption\nhttp://a.cn/1,"没有结束\n' + "".join(f"http://a.cn/{n},行{n}\n" for n in range(2, 9))
    )
    rows, reasons = captions(path)
    assert rows == [f"行{number}" for number in range(2, 9)]
    assert reasons == ["malformed:quote"]


def test_malformed_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"url": "http://a.cn/1", "caption": '猫 "x"', "n": 3})
    path.write_text("\n".join([good, '{"url": "http://a.cn/2", "cap', "[1]", "", '{"url": "http://a.cn/3"}']))
    rows, reasons = captions(path)
    assert rows == ['猫 "x"', None]
    assert reasons == ["malformed:json"] * 2


def test_rows_across_block_boundaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_lines, "BLOCK_BYTES", 1000)
    expected = [f"第{number}只猫，在草地上" for number in range(500)]
    table, lines = tmp_path / "a.csv", tmp_path / "a.jsonl"
    table.write_text(
        "url,caption\n" + "".join(f"http://a.cn/{n},{text}\n" for n, text in enumerate(expected))
    )
    rows = [{"url": "http://a.cn", "caption": text} for text in expected]
    lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert captions(table) == (expected, [])
    assert captions(lines) == (expected, [])


def test_malformed_rows_are_counted_by_the_stage(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "url,caption\nhttp://a.cn/1,一只黑色的猫\nhttp://a.cn/2,两只,白色的狗\nhttp://a.cn/3,三\n"
    )
    run = take_in(tmp_path / "run", TableSource(path=str(path), name="w", kind="wukong"))
    found = manifest(run, "corpus")
    assert (found.num_in, found.num_kept, found.dropped) == (3, 2, {"malformed:columns": 1})
    malformed = pl.read_parquet(f"{run.folder}/corpus/malformed/00000.parquet")
    assert malformed.rows() == [("malformed:columns", "http://a.cn/2,两只,白色的狗")]
    assert why(run, "http://a.cn/2") == [
        "w  'http://a.cn/2,两只,白色的狗'", "  dropped by corpus: malformed:columns"
    ]  # fmt: skip
    with pytest.raises(InputError, match="not in any caption table"):
        why(run, "http://a.cn/")
    assert by_source(manifest(run, "filter_text")) == {"w": {"in": 2, "kept": 1, "dropped": {"too_short": 1}}}
    assert by_source(found) == {"w": {"in": 3, "kept": 2, "dropped": {"malformed:columns": 1}}}


def test_a_text_table_without_its_columns_says_which_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("link,title\nhttp://a.cn/1,一只黑色的猫\n")
    with pytest.raises(InputError, match=r"a\.csv: no column for the url .* found link, title"):
        take_in(tmp_path / "run", TableSource(path=str(path), name="w", kind="wukong"))


def _laion(path: Path) -> None:
    pl.DataFrame(
        {
            "SAMPLE_ID": range(5),
            "URL": [f"http://a.cn/{number}.jpg" for number in range(5)],
            "TEXT": ["一只黑色的猫", "a cat 的图片", "两只白色的狗狗", "三只灰色的兔子", "四只棕色的马"],
            "HEIGHT": [1.0] * 5,
            "WIDTH": [1.0] * 5,
            "LANGUAGE": ["zh"] * 5,
            "NSFW": ["UNLIKELY", None, "NSFW", "UNLIKELY", "UNLIKELY"],
            "similarity": [0.3] * 5,
            "punsafe": [float("nan"), None, 0.1, 0.9, 0.1],  # unknown in either way
            "pwatermark": [float("nan"), None, 0.1, 0.1, 0.95],
            "__index_level_0__": range(5),
        }
    ).write_parquet(path)


def test_rules_that_the_paper_does_not_have_are_off_and_can_be_switched_per_source(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    _laion(path)
    source = TableSource(path=str(path), name="laion", kind="laion")
    assert manifest(take_in(tmp_path / "off", source), "filter_text").dropped == {}
    on = FilterTextConfig(min_chinese_share=0.5, drop_nsfw=("NSFW",), max_unsafe=0.5, max_watermark=0.8)
    dropped = manifest(take_in(tmp_path / "on", source, filters=on), "filter_text").dropped
    assert dropped == {"chinese_share": 1, "nsfw": 2, "watermark": 1}
    exempt = TableSource(path=str(path), name="laion", kind="laion", exempt_from=("nsfw", "chinese_share"))
    dropped = manifest(take_in(tmp_path / "exempt", exempt, filters=on), "filter_text").dropped
    assert dropped == {"watermark": 1}


def test_normalised_duplicates_share_a_key_where_a_run_asks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    pairs = [
        ("http://a.cn/1.jpg", "一只ABC黑猫。"), ("https://www.a.cn/1.jpg#top", "一只 ＡＢＣ 黑猫"),
        ("http://a.cn/2.jpg", "一只ABC黑猫。"), ("http://a.cn/3.jpg", "！！！！！"),
        ("http://a.cn/3.jpg", "？？？？？"),
    ]  # fmt: skip
    path.write_text("url,caption\n" + "".join(f"{url},{caption}\n" for url, caption in pairs))
    source = TableSource(path=str(path), name="a")
    assert kept(take_in(tmp_path / "off", source))["key"].n_unique() == 5
    on = FilterTextConfig(normalise_duplicates=True)
    keys = kept(take_in(tmp_path / "on", source, filters=on))["key"].to_list()
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_sources_are_strict_toml() -> None:
    table = {"kind": "sources", "sources": [{"kind": "laion", "path": "a", "nmae": "x"}]}
    with pytest.raises(ConfigError, match=r"sources\.nmae: unknown key; did you mean sources\.name"):
        build(SourcesConfig, table, "run.toml")
    table = {"kind": "sources", "sources": [{"kind": "img2dataset", "path": "a", "name": "x"}]}
    assert build(SourcesConfig, table, "run.toml").sources == (
        PackedSource(kind="img2dataset", path="a", name="x"),
    )


def test_a_table_cannot_carry_the_column_of_exemptions(tmp_path: Path) -> None:
    """Under that name a run keeps which rules do not apply to a row: own words would be taken for them."""
    path = tmp_path / "a.parquet"
    pl.DataFrame({"url": ["u"], "caption": ["一只猫"], "exempt_from": ["length"]}).write_parquet(path)
    source = TableSource(path=str(path), name="mine", carry_columns=("exempt_from",))
    with pytest.raises(ConfigError, match=r"corpus\.sources mine: carry_columns names 'exempt_from', the"):
        take_in(tmp_path / "run", source)
