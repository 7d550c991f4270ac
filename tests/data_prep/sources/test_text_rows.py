"""No row of a text table becomes another one: each line is in a row that arrives, or is counted."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources import text_file, text_lines
from data_prep.sources.table import TableSource, find_files, scan, text_layout
from pipeline.core.records import InputError
from tests.helpers.sources import manifest, take_in

URL = "http://a.cn/{}.jpg"


def read(path: Path, **fields: Any) -> tuple[list[str], list[str], list[str]]:
    """Addresses, captions and reasons of the malformed rows of a text table."""
    source = TableSource(path=str(path), name="a", **fields)
    _, layout = text_layout(str(path), source)
    columns = [str(layout.url), str(layout.caption)]
    batches = list(text_file.read_batches(str(path), columns, layout))
    rows = pl.concat([batch.rows for batch in batches])
    return (
        rows.to_series(0).to_list(),
        rows.to_series(1).to_list(),
        [str(item.reason) for batch in batches for item in batch.malformed],
    )


def table(folder: Path, text: str | bytes, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


WORDS = st.text(alphabet="猫狗在窗台上 真好ab", min_size=1, max_size=8).map(lambda text: f"一{text}只")
CLEAN = WORDS.map(lambda text: (text, 1, True))
DIRT = st.one_of(
    CLEAN,
    WORDS.map(lambda text: (f'{text[:2]}"{text[2:]}', 1, True)),  # a quote inside
    WORDS.map(lambda text: (f'"{text}', 1, False)),  # one that opens
    WORDS.map(lambda text: (f'{text}"', 1, True)),  # one that closes
    WORDS.map(lambda text: (f'"{text}" 说', 1, True)),  # a word in quotes at the beginning
    WORDS.map(lambda text: (f"{text},{text}", 1, False)),  # a field too many
)


@settings(max_examples=150, deadline=None)
@given(st.lists(DIRT, min_size=1, max_size=12), st.booleans(), st.integers(1, 4))
def test_every_line_of_a_dirty_table_is_a_row_or_counted(
    tmp_path_factory: pytest.TempPathFactory, dirt: list[tuple[str, int, bool]], first: bool, at_once: int
) -> None:
    """Rows in = rows kept + malformed, by the count of lines; and no caption holds another row's address."""
    folder = tmp_path_factory.mktemp("dirt")
    pairs = [(URL.format(number), caption) for number, (caption, _, _) in enumerate(dirt)]
    lines = [f"{url},{caption}" if first else f"{caption},{url}" for url, caption in pairs]
    text = "\n".join(["url,caption" if first else "caption,url", *lines]) + "\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_lines, "LINES_AT_ONCE", at_once)
        urls, captions, reasons = read(table(folder, text))
    if first:  # there, a caption of two lines may be what quotes on two lines in sequence are
        two = sum("\n" in caption for caption in captions)
        assert len(urls) + len(reasons) == len(dirt) - two
    else:
        assert len(urls) + len(reasons) == len(dirt)
        assert not any("http" in caption for caption in captions)
        whole = {url for (url, _), (_, _, is_good) in zip(pairs, dirt, strict=True) if is_good}
        assert whole <= set(urls)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.text(alphabet='猫狗, "\n真a\\', min_size=1, max_size=12).map(lambda text: f"一{text}只"),
        min_size=1,
        max_size=10,
    ),
    st.booleans(),
    st.integers(1, 4),
)
def test_what_a_writer_of_csv_writes_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, captions: list[str], first: bool, at_once: int
) -> None:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["url", "caption"] if first else ["caption", "url"])
    for number, caption in enumerate(captions):
        pair = (URL.format(number), caption)
        writer.writerow(pair if first else pair[::-1])
    path = table(tmp_path_factory.mktemp("csv"), out.getvalue())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_lines, "LINES_AT_ONCE", at_once)
        urls, found, reasons = read(path, escape="")
    assert (found, reasons) == (captions, [])
    assert urls == [URL.format(number) for number in range(len(captions))]


def test_a_quote_that_the_next_row_closes_swallows_nothing(tmp_path: Path) -> None:
    text = 'caption,url\n"甲猫,http://a.cn/1\n乙猫",http://a.cn/2\n丙猫,http://a.cn/3\n'
    urls, captions, reasons = read(table(tmp_path, text))
    assert urls == ["http://a.cn/2", "http://a.cn/3"]
    assert captions == ['乙猫"', "丙猫"]
    assert reasons == ["malformed:quote"]


def test_an_address_on_a_captions_second_line_tears_nothing(tmp_path: Path) -> None:
    text = 'url,caption\nhttp://a.cn/1,"见图\nhttp://b.cn/1.jpg,好看"\nhttp://a.cn/2,狗\n'
    assert read(table(tmp_path, text)) == (
        ["http://a.cn/1", "http://a.cn/2"], ["见图\nhttp://b.cn/1.jpg,好看", "狗"], [],
    )  # fmt: skip


def test_tsv_has_quotes_only_where_they_are_asked_for(tmp_path: Path) -> None:
    path = table(tmp_path, 'caption\turl\n"甲\thttp://a.cn/1\n"乙"\thttp://a.cn/2\n', "a.tsv")
    assert read(path)[1:] == (['"甲', '"乙"'], [])
    quoted = table(tmp_path, 'caption\turl\n"甲\t乙"\thttp://a.cn/1\n', "b.tsv")
    assert read(quoted, quote='"')[1] == ["甲\t乙"]


def test_settings_of_a_table(tmp_path: Path) -> None:
    path = table(tmp_path, "caption;url\n'猫;狗';http://a.cn/1\n", "a.csv")
    assert read(path, separator=";", quote="'")[1] == ["猫;狗"]
    with pytest.raises(InputError, match='set separator = ";"'):
        read(path)
    spark = table(tmp_path, 'url,caption\nhttp://a.cn/1,"他说\\"好, 猫\\" \\\\ 吗"\n', "b.csv")
    assert read(spark)[1] == ['他说"好, 猫" \\ 吗']
    cc3m = table(tmp_path, "猫\thttp://a.cn/1\n狗\thttp://a.cn/2\n", "c.tsv")
    with pytest.raises(InputError, match='header = false, url_column = "2", caption_column = "1"'):
        read(cc3m)
    assert read(cc3m, header=False, url_column="2", caption_column="1")[1] == ["猫", "狗"]
    macintosh = table(tmp_path, "url,caption\rhttp://a.cn/1,猫\r", "d.csv")
    assert read(macintosh)[1] == ["猫"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "gb18030"])
def test_another_encoding_is_named_and_read(tmp_path: Path, encoding: str) -> None:
    text = "url,caption\n" + "".join(f"http://a.cn/{n},第{n}只猫在窗台上\n" for n in range(20))
    path = table(tmp_path, text.encode(encoding))
    with pytest.raises(InputError, match=f'set encoding = "{encoding}"'):
        read(path)
    urls, captions, reasons = read(path, encoding=encoding)
    assert (len(urls), captions[0], reasons) == (20, "第0只猫在窗台上", [])


def test_settings_that_are_none(tmp_path: Path) -> None:
    for fields in (
        {"separator": ",,"},
        {"quote": ","},
        {"escape": '"', "quote": '"'},
        {"encoding": "klingon"},
    ):
        with pytest.raises(ValueError, match=next(iter(fields))):
            TableSource(path="a.csv", name="a", **fields)  # type: ignore[arg-type]


def test_json_in_its_forms(tmp_path: Path) -> None:
    rows = [{"url": f"http://a.cn/{n}", "caption": f"[图]猫{n}"} for n in range(3)]
    for name, text in {
        "a.json": json.dumps(rows, ensure_ascii=False),
        "b.json": json.dumps(rows, indent=2),
        "c.json": "".join(json.dumps(row) + "\n" for row in rows),
        "d.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
    }.items():
        assert read(table(tmp_path, text, name))[1:] == ([row["caption"] for row in rows], []), name
    with pytest.raises(InputError, match="one JSON object over several lines with images, annotations"):
        read(table(tmp_path, '{\n"images": [],\n"annotations": []}', "e.json"))
    with pytest.raises(InputError, match="cut off after 3 items"):
        read(table(tmp_path, json.dumps(rows)[:-1], "f.json"))


def test_json_loses_a_value_and_not_its_row(tmp_path: Path) -> None:
    text = '{"url": "http://a.cn/1", "caption": "猫 NaN", "n": NaN}\n'
    text += '{"url": "http://a.cn/2", "caption": "狗\\ud83d"}\n'
    assert read(table(tmp_path, text, "a.jsonl"))[1:] == (["猫 NaN", "狗"], [])


def test_lists_of_captions(tmp_path: Path) -> None:
    rows = [{"url": "http://a.cn/1", "caption": ["甲", "乙"]}, {"url": "http://a.cn/2", "caption": []}]
    path = table(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "a.jsonl")
    parquet = tmp_path / "a.parquet"
    pl.DataFrame(rows).write_parquet(parquet)
    for name in (path, parquet):
        with pytest.raises(InputError, match="'caption' holds lists of captions; set list_captions"):
            take_in(tmp_path / f"refused-{name.name}", TableSource(path=str(name), name="a"))
    assert read(path, list_captions="each")[1] == ["甲", "乙", None]
    assert read(path, list_captions="first")[1] == ["甲", None]
    for mode, expected in (("each", ["甲", "乙", None]), ("first", ["甲", None])):
        source = TableSource(path=str(parquet), name="a", list_captions=mode)  # type: ignore[arg-type]
        found = scan(str(parquet), source).collect()
        assert found["caption"].to_list() == expected
        assert found["row"].to_list() == list(range(len(expected)))


def test_objects_name_their_fields(tmp_path: Path) -> None:
    talk = {"url": "http://a.cn/1", "caption": [{"from": "human", "value": "猫"}]}
    path = table(tmp_path, json.dumps(talk) + "\n", "a.jsonl")
    with pytest.raises(InputError, match="'caption' holds lists of objects with from, value"):
        read(path, list_captions="each")
    pl.DataFrame({"url": [{"bytes": b"", "path": "a"}], "caption": ["猫"]}).write_parquet(
        tmp_path / "b.parquet"
    )
    with pytest.raises(InputError, match="'url' holds objects with bytes, path"):
        scan(str(tmp_path / "b.parquet"), TableSource(path="b", name="b"))


def _bad_parquet(path: Path) -> None:
    captions = ["第一只猫在窗台上", "XXXX只猫在窗台上", "第三只猫在窗台上"]
    frame = pl.DataFrame({"url": [f"http://a.cn/{n}" for n in range(3)], "caption": captions})
    frame.write_parquet(
        path, compression="uncompressed", use_pyarrow=True, pyarrow_options={"use_dictionary": False}
    )
    data = path.read_bytes()
    assert data.count(b"XXXX")
    path.write_bytes(data.replace(b"XXXX", b"\xff\xfeXX"))


def test_a_bad_cell_in_parquet_costs_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    _bad_parquet(path)
    run = take_in(tmp_path / "run", TableSource(path=str(path), name="a"))
    found = manifest(run, "corpus")
    assert (found.num_in, found.num_kept, found.dropped) == (3, 2, {"malformed:encoding": 1})
    assert manifest(run, "filter_text").num_kept == 2


def test_a_folder_of_parts_some_of_them_empty(tmp_path: Path) -> None:
    folder = tmp_path / "out.parquet"
    (folder / "day=1").mkdir(parents=True)
    (folder / "_SUCCESS").touch()
    (folder / ".part-0.parquet.crc").write_bytes(b"crc")
    whole = pl.DataFrame({"url": ["http://a.cn/1"], "caption": ["第一只猫在窗台上"]})
    whole.write_parquet(folder / "part-0.parquet")
    whole.clear().write_parquet(folder / "part-1.parquet")
    whole.write_parquet(folder / "day=1" / "part-2.parquet")
    (folder / "part-3.csv").touch()
    (folder / "part-4.csv").write_text("url,caption\n")
    source = TableSource(path=str(folder), name="a")
    assert len(find_files(source)) == 5
    run = take_in(tmp_path / "run", source)
    assert manifest(run, "corpus").num_kept == manifest(run, "filter_text").num_kept == 2
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="a folder without tables"):
        find_files(TableSource(path=str(tmp_path / "none"), name="a"))


def test_a_caption_a_line(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("2.jpg", "10.jpg", "1.PNG", "notes.md"):
        (images / name).touch()
    path = table(tmp_path, "甲\n乙\n丙\n", "a.txt")
    assert read(path, picture_folder=str(images))[:2] == (["1.PNG", "2.jpg", "10.jpg"], ["甲", "乙", "丙"])
    with pytest.raises(InputError, match="set picture_folder"):
        read(path)
    with pytest.raises(InputError, match="2 captions, one per line, for 3 images"):
        read(table(tmp_path, "甲\n乙", "b.txt"), picture_folder=str(images))


def test_files_that_were_joined_have_a_header_inside(tmp_path: Path) -> None:
    text = 'url,caption\nhttp://a.cn/1,猫\nurl,caption\nhttp://a.cn/2, "狗, 大"\n'
    assert read(table(tmp_path, text))[1:] == (["猫", "狗, 大"], ["malformed:header"])
