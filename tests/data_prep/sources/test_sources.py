"""Every kind of source through the corpus stage: what becomes a row, what is set aside and why."""

import base64
import hashlib
import io
import json
import pickle
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import lmdb
import polars as pl
import pytest
from PIL import Image

from data_prep import corpus
from data_prep.accounting.funnel import by_source
from data_prep.corpus import CorpusStageConfig, SourcesConfig
from data_prep.corpus_facts import packed_folders
from data_prep.decontamination import guarded_ids, guarded_marks, make_guard
from data_prep.filters import text as filter_text
from data_prep.filters.text import FilterTextConfig
from data_prep.formats.tar import TarWriter
from data_prep.sources import text_file
from data_prep.sources.local_server import HOST, serve
from data_prep.sources.packed import PackedSource
from data_prep.sources.table import TableSource
from pipeline import runner
from pipeline.cli import main
from pipeline.core.config import build
from pipeline.core.records import ConfigError, InputError, Manifest
from pipeline.core.run import Run, make_context, read_manifest
from pipeline.core.stage import Stage
from pipeline.tools.why import explain


def picture(colour: tuple[int, int, int] = (200, 30, 30), side: int = 20) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (side, side), (255, 255, 255))
    image.paste(colour, (0, 0, side // 2, side))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def take_in(
    folder: Path,
    *sources: TableSource | PackedSource,
    guards: tuple[str, ...] = (),
    filters: FilterTextConfig | None = None,
) -> Run:
    """Run the corpus and filter_text stages over some sources."""
    config = CorpusStageConfig(corpus=SourcesConfig(kind="sources", sources=sources, guards=guards))
    filters = filters or FilterTextConfig()
    stages = (
        Stage("corpus", "", 1, config, (), corpus.plan, corpus.run),
        Stage("filter_text", "", 1, filters, ("corpus",), filter_text.plan, filter_text.run),
    )
    run = Run(str(folder), 0, "local", 1, stages)
    runner.execute(run, stages, redo=False)
    return run


def manifest(run: Run, stage: str) -> Manifest:
    found = read_manifest(run, stage)
    assert found is not None
    return found


def why(run: Run, key_or_url: str) -> list[str]:
    filters: FilterTextConfig = run.stage("filter_text").config
    return explain(run, filters, key_or_url)


def key_of(url: str, caption: str) -> str:
    return hashlib.sha256(f"{url}\0{caption}".encode()).hexdigest()[:32]


def kept(run: Run) -> pl.DataFrame:
    paths = sorted(Path(run.folder, "filter_text", "kept").glob("*.parquet"))
    return pl.concat([pl.read_parquet(path) for path in paths], how="diagonal").sort("file", "row")


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
    monkeypatch.setattr(text_file, "BLOCK_BYTES", 1000)
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


def _regions(path: Path) -> None:
    rows = [
        (1, "vg/1.jpg", "一只猫在桌子上面"), (2, "vg/2.jpg", "蓝色的天空"), (1, "vg/1.jpg", "桌子是棕色的"),
        (1, "vg/1.jpg", "一只猫在桌子上面"), (3, "vg/3.jpg", "一个人"), (1, "vg/1.jpg", "猫" * 60),
        (None, "x", "无"),
    ]  # fmt: skip
    lines = [{"image_id": i, "url": f"http://a.cn/{u}", "caption": c} for i, u, c in rows]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines) + "{broken\n")


def test_region_captions_are_joined_exempt_from_length_and_guarded(tmp_path: Path) -> None:
    path, table = tmp_path / "vg.jsonl", tmp_path / "image_data.json"
    _regions(path)
    table.write_text(
        json.dumps(
            [
                {"image_id": 1, "coco_id": None, "flickr_id": 777, "width": 3},
                {"image_id": 2, "coco_id": 391895, "flickr_id": None},
                {"image_id": 3, "coco_id": None, "flickr_id": 391895},
            ]
        )
    )
    ids, guard = tmp_path / "coco-cn_test.txt", tmp_path / "guard.parquet"
    ids.write_text("COCO_val2014_000000391895\n")
    assert main(["guard", str(ids), "--family", "coco", "--out", str(guard)]) == 0
    source = TableSource(path=str(path), name="vg", kind="visual_genome", image_table=str(table))
    run = take_in(tmp_path / "run", source, guards=(str(guard),))
    found = manifest(run, "corpus")
    assert (found.num_in, found.num_kept) == (8, 2)
    assert found.dropped == {
        "guarded_id": 1, "image_id_missing": 1, "joined_with_image": 3, "malformed:json": 1,
    }  # fmt: skip
    assert kept(run)["caption"].to_list() == ["一只猫在桌子上面，桌子是棕色的，" + "猫" * 60, "一个人"]
    # Rows that never reached the table can be asked about, by key and by address.
    guarded = key_of("http://a.cn/vg/2.jpg", "蓝色的天空")
    assert why(run, guarded) == why(run, "http://a.cn/vg/2.jpg")
    assert why(run, guarded) == [f"{guarded}  vg", "  dropped by corpus: guarded_id"]
    assert why(run, "http://a.cn/x")[1] == "  dropped by corpus: image_id_missing"
    text = kept(run)["key"][0]
    joined = why(run, "http://a.cn/vg/1.jpg")
    assert joined[0] == "vg: 3 further captions of one image"
    assert joined[1] == f"  dropped by corpus: joined_with_image (part of the text {text})"
    assert joined[2].startswith(f"{text}  vg row 0  http://a.cn/vg/1.jpg")
    assert joined[3] == "  kept so far; the shards are not made yet"
    assert why(run, key_of("http://a.cn/vg/1.jpg", "桌子是棕色的"))[1] == joined[1]
    with pytest.raises(InputError, match="not in any caption table"):
        why(run, "http://a.cn/vg/2")
    bare = TableSource(path=str(path), name="vg", kind="visual_genome")
    with pytest.raises(InputError, match="give image_table"):
        take_in(tmp_path / "bare", bare, guards=(str(guard),))


def test_coco_pictures_are_guarded_by_the_number_in_their_name(tmp_path: Path) -> None:
    path, guard = tmp_path / "coco.csv", tmp_path / "guard.parquet"
    path.write_text(
        "url,caption\nhttp://a.cn/COCO_val2014_000000391895.jpg,一个人\nhttp://a.cn/COCO_val2014_000000000007.jpg,两个人\n"
    )
    (tmp_path / "ids.txt").write_text("COCO_val2014_000000391895#0\t一个人\n")
    make_guard(str(tmp_path / "ids.txt"), "coco", str(guard))
    run = take_in(
        tmp_path / "run", TableSource(path=str(path), name="coco", kind="coco"), guards=(str(guard),)
    )
    assert kept(run)["caption"].to_list() == ["两个人"]
    assert manifest(run, "corpus").dropped == {"guarded_id": 1}


def _cn_clip(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    images = {5: picture(), 9: picture((0, 0, 255))}
    lines = [f"{number}\t{base64.b64encode(data).decode()}\n" for number, data in images.items()]
    (folder / "train_imgs.tsv").write_text("".join(lines) + "no picture\n")
    texts = [
        {"text_id": 1, "text": "左边红色的图片", "image_ids": [5, 9]},
        {"text_id": 2, "text": "没有配对的文字", "image_ids": []},
        {"text_id": 3, "text": "图片不在这里吧", "image_ids": [77]},
        {"text_id": 4, "text": "编号不是一个表", "image_ids": {"a": 1}},
    ]
    (folder / "train_texts.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts)
    )


def _fetch(run: Run, at: str) -> bytes:
    found = manifest(run, "corpus")
    context = make_context(run, run.stage("filter_text"))
    assert context is not None
    assert found.extra
    with (
        serve(None, packed=packed_folders(context)) as address,
        urllib.request.urlopen(at.replace(f"http://{HOST}", address)) as response,
    ):
        return bytes(response.read())


def test_cn_clip_tsv(tmp_path: Path) -> None:
    _cn_clip(tmp_path / "own")
    run = take_in(tmp_path / "run", PackedSource(kind="cn_clip_tsv", path=str(tmp_path / "own"), name="own"))
    found = manifest(run, "corpus")
    assert (found.num_in, found.num_kept) == (6, 2)
    assert found.dropped == {
        "image_missing": 1, "malformed:columns": 1, "malformed:picture_line": 1, "unpaired": 1,
    }  # fmt: skip
    missing = f"http://{HOST}/packed/own/train/77"
    assert why(run, missing) == [
        f"{key_of(missing, '图片不在这里吧')}  own", "  dropped by corpus: image_missing"
    ]  # fmt: skip
    assert why(run, key_of("", "没有配对的文字"))[1] == "  dropped by corpus: unpaired"
    rows = kept(run)
    assert rows["url"].to_list() == [f"http://{HOST}/packed/own/train/{number}" for number in (5, 9)]
    assert [_fetch(run, at) for at in rows["picture_at"]] == [picture(), picture((0, 0, 255))]


def test_broken_lines_of_a_picture_tsv_are_counted_each_with_its_reason(tmp_path: Path) -> None:
    _cn_clip(tmp_path)
    encoded = base64.b64encode(picture((0, 200, 0)))
    with open(tmp_path / "train_imgs.tsv", "ab") as file:
        file.write(
            b"\n" + b"12\n" + b"12\t\r\n" + b"x\t" + encoded + b"\n" + b"9" * 19 + b"\t" + encoded + b"\n"
        )
        file.write(b"\xff\xfe\n" + b"5\t" + encoded)  # the last line of a number counts, as in LMDB
    with open(tmp_path / "train_texts.jsonl", "a") as file:
        file.write('{"text_id": 9, "text": "编号长得不像话", "image_ids": [' + "9" * 30 + "]}\n")
    run = take_in(tmp_path / "run", PackedSource(kind="cn_clip_tsv", path=str(tmp_path), name="own"))
    found = manifest(run, "corpus")
    assert found.dropped == {
        "image_missing": 1, "malformed:columns": 2, "malformed:picture_line": 6,
        "malformed:picture_repeated": 1, "unpaired": 1,
    }  # fmt: skip
    assert found.num_kept == 2
    assert _fetch(run, kept(run)["picture_at"][0]) == picture((0, 200, 0))
    assert pl.read_parquet(Path(run.folder, "corpus", "malformed", "00000.parquet")).height == 9


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("evil"),)


def test_cn_clip_lmdb_is_read_without_running_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    samples: list[bytes] = [
        pickle.dumps((5, 1, "左边红色的图片")),
        pickle.dumps(_Evil()),
        pickle.dumps((6, 2, "图片不在这里吧")),
        b"\x80",
    ]
    for name, items in {
        "pairs": {**{str(n): data for n, data in enumerate(samples)}, "num_samples": b"4"},
        "imgs": {"5": base64.b64encode(picture()), "num_images": b"1"},
    }.items():
        folder = tmp_path / "lmdb" / "train" / name
        folder.mkdir(parents=True)
        with lmdb.open(str(folder), map_size=1 << 20) as environment, environment.begin(write=True) as out:
            for key, value in items.items():
                out.put(key.encode(), value)
    run = take_in(tmp_path / "run", PackedSource(kind="cn_clip_lmdb", path=str(tmp_path), name="own"))
    assert manifest(run, "corpus").dropped == {"image_missing": 1, "malformed:pickle": 2}
    assert not (tmp_path / "evil").exists()
    rows = kept(run)
    assert rows["caption"].to_list() == ["左边红色的图片"]
    assert _fetch(run, rows["picture_at"][0]) == picture()
    with (
        lmdb.open(str(tmp_path / "lmdb" / "train" / "pairs")) as environment,
        environment.begin(write=True) as out,
    ):
        out.put(b"num_samples", b"1" * 18)
    with pytest.raises(InputError, match=r"num_samples says 1+, but it holds 5 entries"):
        take_in(tmp_path / "absurd", PackedSource(kind="cn_clip_lmdb", path=str(tmp_path), name="own"))


def test_img2dataset_output_keeps_the_addresses_of_the_web(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, data in {
            "000000000.jpg": picture(),
            "000000000.txt": b"x",
            "000000000.json": b"{}",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    pl.DataFrame(
        {
            "url": [f"http://a.cn/{number}.jpg" for number in range(3)],
            "caption": ["左边红色的图片", "没有下载的图片", "包里没有的图片"],
            "key": ["000000000", "000000001", "000000002"],
            "status": ["success", "failed_to_download", "success"],
        }
    ).write_parquet(folder / "00000.parquet")
    run = take_in(tmp_path / "run", PackedSource(kind="img2dataset", path=str(folder), name="old"))
    assert manifest(run, "corpus").dropped == {"image_missing": 1, "not_downloaded": 1}
    assert why(run, "http://a.cn/1.jpg") == [
        f"{key_of('http://a.cn/1.jpg', '没有下载的图片')}  old", "  dropped by corpus: not_downloaded"
    ]  # fmt: skip
    assert why(run, "http://a.cn/2.jpg")[1] == "  dropped by corpus: image_missing"
    rows = kept(run)
    assert rows["url"].to_list() == ["http://a.cn/0.jpg"]
    assert _fetch(run, rows["picture_at"][0]) == picture()


def test_a_piece_without_a_single_picture_is_counted(tmp_path: Path) -> None:
    """The last shard of img2dataset's is often small: all of its addresses may have failed."""
    for name, status in (("00000", "success"), ("00001", "failed_to_download")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            if status == "success":
                member = tarfile.TarInfo("000000000.jpg")
                member.size = len(picture())
                tar.addfile(member, io.BytesIO(picture()))
        pl.DataFrame(
            {
                "url": [f"http://a.cn/{name}"],
                "caption": ["左边红色的图片"],
                "key": ["000000000"],
                "status": [status],
            }
        ).write_parquet(tmp_path / f"{name}.parquet")
    run = take_in(tmp_path / "run", PackedSource(kind="img2dataset", path=str(tmp_path), name="old"))
    assert manifest(run, "corpus").dropped == {"not_downloaded": 1}
    assert kept(run)["url"].to_list() == ["http://a.cn/00000"]
    assert why(run, "http://a.cn/00001")[1] == "  dropped by corpus: not_downloaded"


def test_a_runs_shards_are_a_source(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    pictures = [picture(), picture((0, 0, 255))]
    with TarWriter(str(folder / "00000.tar")) as tar:
        places = [tar.add(f"{number}.jpg", data) for number, data in enumerate(pictures)]
    rows = {
        "key": ["a", "b", "c"],
        "url": [f"http://a.cn/{number}.jpg" for number in range(3)],
        "caption": ["左边红色的图片", "左边蓝色的图片", "包里没有的图片"],
        "offset_bytes": [*(place.offset_bytes for place in places), 1 << 20],
        "size_bytes": [*(place.size_bytes for place in places), 9],
        "caption_en": ["red", "blue", "none"],
        "pair_score": [0.1, 0.2, 0.3],  # stays behind: another run scores anew
    }
    pl.DataFrame(rows).write_parquet(folder / "00000.parquet")
    source = PackedSource(kind="shards", path=str(folder), name="first", carry_columns=("caption_en",))
    run = take_in(tmp_path / "run", source)
    assert manifest(run, "corpus").dropped == {"image_missing": 1}
    found = kept(run)
    assert found["url"].to_list() == rows["url"][:2]
    assert found["caption_en"].to_list() == ["red", "blue"]
    assert "pair_score" not in found.columns
    assert [_fetch(run, at) for at in found["picture_at"]] == pictures
    missing = PackedSource(kind="shards", path=str(folder), name="first", carry_columns=("caption_fr",))
    with pytest.raises(InputError, match=r"00000\.parquet: no column caption_fr; found key, url"):
        take_in(tmp_path / "missing", missing)


@pytest.mark.parametrize(
    "path", ["../secret.txt?offset=0&size=3", "%2e%2e/secret.txt?offset=0&size=3", "a?offset=0"]
)
def test_the_site_serves_nothing_outside_a_packed_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.txt").write_text("abc")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a").write_text("abc")
    with serve(None, packed={"own": str(tmp_path / "own")}) as address:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/packed/own/{path}")
        with urllib.request.urlopen(f"{address}/packed/own/a?offset=1&size=2") as response:
            assert response.read() == b"bc"


def test_guard_of_pictures_gives_ids_and_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _cn_clip(tmp_path / "set")
    (tmp_path / "set" / "train_imgs.tsv").write_text(f"5\t{base64.b64encode(picture()).decode()}\n")
    pictures = tmp_path / "pictures" / "中文"
    pictures.mkdir(parents=True)
    (pictures / "1000.jfif").write_bytes(picture(side=40))  # the ending is not what makes an image
    (pictures / "labels.txt").write_text("1000 猫")
    guards = []
    for name, family in (("set", "own"), ("pictures", "flickr")):
        guards.append(str(tmp_path / f"{name}.parquet"))
        assert main(["guard", str(tmp_path / name), "--family", family, "--out", guards[-1]]) == 0
    assert "1 images" in capsys.readouterr().out
    assert guarded_ids(guards).flickr == {1000}
    assert guarded_ids(guards).coco == frozenset()
    (_, first), (_, second) = (next(guarded_marks(path)) for path in guards)
    assert first.perceptual_hash == second.perceptual_hash  # the same image at another size
    pl.read_parquet(guards[0]).drop("image_signature").write_parquet(tmp_path / "old.parquet")
    with pytest.raises(InputError, match=r"old.parquet: has hashes and no column image_signature"):
        guarded_ids([str(tmp_path / "old.parquet")])
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert main(["guard", str(tmp_path / "pictures"), "--out", str(tmp_path / "x.parquet")]) == 1
    assert main(["guard", str(tmp_path / "none"), "--out", str(tmp_path / "x.parquet")]) == 1
    assert not (tmp_path / "x.parquet").exists()
    with pytest.raises(InputError, match="make it with cnclip guard"):
        guarded_ids([str(tmp_path / "set" / "train_imgs.tsv")])


def test_sources_are_strict_toml() -> None:
    table = {"kind": "sources", "sources": [{"kind": "laion", "path": "a", "nmae": "x"}]}
    with pytest.raises(ConfigError, match=r"sources\.nmae: unknown key; did you mean sources\.name"):
        build(SourcesConfig, table, "run.toml")
    table = {"kind": "sources", "sources": [{"kind": "img2dataset", "path": "a", "name": "x"}]}
    assert build(SourcesConfig, table, "run.toml").sources == (
        PackedSource(kind="img2dataset", path="a", name="x"),
    )
