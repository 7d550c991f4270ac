"""Text rules as a user meets them: dirty captions, switches per source, scores of two encoders, why."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from data_prep import corpus
from data_prep.accounting.funnel import no_op_thresholds
from data_prep.accounting.histograms import EDGES, add, histogram
from data_prep.corpus import CorpusStageConfig, SourcesConfig
from data_prep.decontamination import GuardedIds
from data_prep.filters import text as filter_text
from data_prep.filters.text import FilterTextConfig
from data_prep.rules import text as text_rules
from data_prep.sources import regions as convert
from data_prep.sources import text_lines
from data_prep.sources.readers.source import PackedSource
from data_prep.sources.table import TableSource
from pipeline import runner
from pipeline.cli.tables import notes
from pipeline.core.records import ConfigError, Manifest
from pipeline.core.run import Run, read_manifest
from pipeline.core.stage import Stage
from pipeline.tools.why import explain


def take(folder: Path, *sources: TableSource | PackedSource, config: FilterTextConfig | None = None) -> Run:
    corpora = CorpusStageConfig(corpus=SourcesConfig(kind="sources", sources=sources))
    stages = (
        Stage("corpus", "", 1, corpora, (), corpus.plan, corpus.run),
        Stage(
            "filter_text",
            "",
            1,
            config or FilterTextConfig(),
            ("corpus",),
            filter_text.plan,
            filter_text.run,
        ),
    )
    run = Run(str(folder), 0, "local", 1, stages)
    runner.execute(run, stages, redo=False)
    return run


def table(path: Path, captions: Sequence[str], **columns: Any) -> TableSource:
    rows = {"url": [f"http://a.cn/{path.stem}/{n}" for n in range(len(captions))], "caption": captions}
    pl.DataFrame(rows | columns).write_parquet(path)
    return TableSource(path=str(path), name=path.stem)


def manifest(run: Run, stage: str = "filter_text") -> Manifest:
    found = read_manifest(run, stage)
    assert found is not None
    return found


def kept(run: Run) -> list[str]:
    paths = sorted(Path(run.folder, "filter_text", "kept").glob("*.parquet"))
    return (
        pl.concat([pl.read_parquet(p) for p in paths], how="diagonal")
        .sort("file", "row")["caption"]
        .to_list()
    )


@pytest.mark.parametrize(
    ("caption", "seen"),
    [
        ("一只黑色的猫", "一只黑色的猫"),
        ("一只\x00黑\x1b[31m色\x7f的\x85猫", "一只黑[31m色的猫"),
        ("\u202e猫的色黑只一\u202c", "猫的色黑只一"),
        ("包\u200b邮\u2066!\u2069\ufeff", "包邮!"),
        ("שלום \u200fעולם", "שלום עולם"),  # letters that run from right to left stay, their mark goes
        ("一行\n两行\t三", "一行\n两行\t三"),
        ("👨\u200d👩\u200d👧 一家三口", "👨\u200d👩\u200d👧 一家三口"),  # joined emoji stay whole
        ("❤\ufe0f红心红心", "❤\ufe0f红心红心"),
        ("e\u0301tude", "e\u0301tude"),
        (None, None),
    ],
)
def test_what_a_caption_loses(caption: str | None, seen: str | None) -> None:
    frame = pl.DataFrame({"caption": pl.Series([caption], dtype=pl.String)})
    assert frame.select(text_rules.visible(pl.col("caption"))).item() == seen


def test_hidden_characters_neither_count_nor_hide_a_word(tmp_path: Path) -> None:
    captions = ["四个字的\u200b\u200e\x01", "包\u200b邮的一只小猫", "\u202e一只黑色的猫", "\x00\u200f \x1f"]
    run = take(tmp_path / "run", table(tmp_path / "a.parquet", captions))
    assert manifest(run).dropped == {"blacklist:advertising": 1, "caption_missing": 1, "too_short": 1}
    assert kept(run) == ["一只黑色的猫"]
    # asked for by its address, the row is found by the caption as the source has it
    assert explain(run, FilterTextConfig(), "http://a.cn/a/1")[1] == (
        "  dropped by filter_text: blacklist:advertising (the word '包邮')"
    )


def test_the_word_that_hit_outlives_an_edited_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = take(tmp_path / "run", table(tmp_path / "a.parquet", ["全国包邮的一只小猫", "一只黑色的猫"]))
    monkeypatch.setattr(text_rules, "blacklist", lambda theme: ("另一个词",))
    lines = explain(run, FilterTextConfig(), "http://a.cn/a/0")
    assert lines[1] == "  dropped by filter_text: blacklist:advertising (the word '包邮')"


def test_every_rule_and_every_list_is_switched_per_source(tmp_path: Path) -> None:
    captions = ["包邮的一只小猫", "图片文件很多个.jpg", "短", "a cat on a mat", "賣書的臺灣人家"]
    config = FilterTextConfig(min_chinese_share=0.5)
    columns = {"LANGUAGE": ["zh", "zh", "zh", "en", "zh"], "similarity": [0.3, 0.3, 0.1, 0.3, 0.3]}
    plain = table(tmp_path / "a.parquet", captions, **columns)

    def dropped(*exempt: str) -> dict[str, int]:
        source = TableSource(path=plain.path, name="a", exempt_from=exempt)
        return dict(manifest(take(tmp_path / "_".join(exempt or ("all",)), source, config=config)).dropped)

    everything = {
        "blacklist:advertising": 1,
        "blacklist:file_name": 1,
        "language": 1,
        "score_below_threshold": 1,
    }
    assert dropped() == everything
    assert dropped("blacklist:advertising") == {
        k: v for k, v in everything.items() if k != "blacklist:advertising"
    }
    assert dropped("blacklist") == {"language": 1, "score_below_threshold": 1}
    short = {k: v for k, v in everything.items() if k != "score_below_threshold"} | {"too_short": 1}
    assert dropped("score") == short
    assert dropped("score", "characters", "language", "chinese_share", "blacklist") == {}
    with pytest.raises(
        ConfigError, match=r"no rule 'blacklist:adverts'; known: language, .*blacklist:advertising"
    ):
        dropped("blacklist:adverts")


def test_normalised_duplicates_are_switched_per_source(tmp_path: Path) -> None:
    captions = ["一只ＡＢＣ黑猫", "一只abc黑猫。"]
    source = table(tmp_path / "a.parquet", captions)
    pl.read_parquet(source.path).with_columns(url=pl.lit("http://a.cn/1")).write_parquet(source.path)
    config = FilterTextConfig(normalise_duplicates=True)

    def num_keys(folder: str, *exempt: str) -> int:
        run = take(
            tmp_path / folder, TableSource(path=source.path, name="a", exempt_from=exempt), config=config
        )
        path = next(Path(run.folder, "filter_text", "kept").glob("*.parquet"))
        return pl.read_parquet(path)["key"].n_unique()

    assert num_keys("on") == 1
    assert num_keys("off", "normalised_duplicates") == 2


def test_traditional_characters(tmp_path: Path) -> None:
    captions = ["賣書的臺灣人家", "卖书的台湾人家", "皇后在乾隆後面", "a cat 與狗一隻"]
    source = table(tmp_path / "a.parquet", captions)
    assert kept(take(tmp_path / "keep", source)) == captions
    pytest.importorskip("opencc")
    dropped = take(tmp_path / "drop", source, config=FilterTextConfig(traditional="drop"))
    assert manifest(dropped).dropped == {"traditional": 3}
    converted = take(tmp_path / "convert", source, config=FilterTextConfig(traditional="convert"))
    assert kept(converted) == ["卖书的台湾人家", "卖书的台湾人家", "皇后在乾隆后面", "a cat 与狗一只"]
    assert explain(converted, FilterTextConfig(traditional="convert"), "http://a.cn/a/0")[0].endswith(
        "'卖书的台湾人家'"
    )
    exempt = TableSource(path=source.path, name="a", exempt_from=("traditional",))
    assert kept(take(tmp_path / "e", exempt, config=FilterTextConfig(traditional="convert"))) == captions


def test_conversion_is_opencc_row_by_row() -> None:
    opencc = pytest.importorskip("opencc")
    from data_prep.rules.chinese_script import simplified

    captions = ["乾隆皇帝", None, "", "發財\x1e麵包", "著名", "瞭望", "頭髮"]
    frame = (
        pl.LazyFrame({"caption": captions}).select(simplified(pl.col("caption"))).collect(engine="streaming")
    )
    converter = opencc.OpenCC("t2s")
    expected = [None if c is None else converter.convert(c.replace("\x1e", " ")) for c in captions]
    assert frame["caption"].to_list() == expected


def test_a_threshold_that_removes_nothing_says_so_with_the_minimum(tmp_path: Path) -> None:
    captions = ["一只黑色的猫", "两只白色的狗", "三只灰色的兔"]
    no_op = table(tmp_path / "laion.parquet", captions, similarity=[0.2604, 0.31, None])
    judged = table(tmp_path / "other.parquet", captions, similarity=[0.2, 0.3, 0.4])
    run = take(tmp_path / "run", no_op, judged)
    sentence = "filter_text: the threshold 0.26 on scores is a no-op for laion: the minimum seen is 0.2604"
    assert [str(note) for note in no_op_thresholds(manifest(run))] == [sentence]
    dropped = "filter_text dropped 2 of 6 rows (33%): score_below_threshold 1, score_missing 1"
    assert sorted(notes(run)) == sorted([sentence, dropped])


def test_scores_of_two_encoder_pairs_never_meet_under_one_threshold(tmp_path: Path) -> None:
    captions = ["一只黑色的猫", "两只白色的狗"]
    laion = TableSource(
        path=table(tmp_path / "a.parquet", captions, similarity=[0.3, 0.4]).path, name="laion", kind="laion"
    )
    pairs = {"pair_text_encoder": ["t1", None], "pair_image_encoder": ["i1", None]}
    sidecar = table(tmp_path / "b.parquet", captions, pair_score=[0.1, None], **pairs)
    ours = TableSource(path=sidecar.path, name="ours", score_column="pair_score")
    with pytest.raises(
        ConfigError, match=r"different encoder pairs .*LAION-5B \(source laion\), t1\+i1 \(source ours\)"
    ):
        take(tmp_path / "mixed", laion, ours)
    assert len(kept(take(tmp_path / "alone", laion))) == 2
    exempt = TableSource(path=sidecar.path, name="ours", score_column="pair_score", exempt_from=("score",))
    assert len(kept(take(tmp_path / "exempt", laion, exempt))) == 4
    same = TableSource(path=sidecar.path, name="ours", score_column="pair_score", score_pair="LAION-5B")
    assert manifest(take(tmp_path / "same", laion, same)).num_in == 4
    both = pl.read_parquet(sidecar.path).with_columns(
        pair_score=pl.lit(0.5), pair_text_encoder=pl.Series(["t1", "t2"]), pair_image_encoder=pl.lit("i1")
    )
    both.write_parquet(sidecar.path)
    with pytest.raises(ConfigError, match=r"t1\+i1 \(source ours\), t2\+i1 \(source ours\)"):
        take(tmp_path / "one", ours)


def test_histograms_count_what_came_in(tmp_path: Path) -> None:
    source = table(
        tmp_path / "a.parquet", ["猫" * 4, "猫" * 5, "猫" * 5, "猫" * 60], similarity=[0.3, 0.1, 0.26, 0.4]
    )
    counts = manifest(take(tmp_path / "run", source)).extra["00000"]["histograms"]
    edges = EDGES["characters"]
    assert [i for i, n in enumerate(counts["characters"]["kept"]) if n] == [edges.index(5) + 1]
    assert sum(counts["characters"]["kept"]) == 1
    assert sum(counts["characters"]["dropped"]) == 3
    assert counts["score"]["kept"][EDGES["score"].index(0.26) + 1] == 1
    assert sum(counts["score"]["dropped"]) == 3
    assert add([counts["score"], counts["score"]])["dropped"] == [2 * n for n in counts["score"]["dropped"]]
    ends = histogram("characters", pl.Series([0, 1, 99, 100, 5000]), pl.Series([], dtype=pl.Int64))
    assert (ends["kept"][0], ends["kept"][1], ends["kept"][-2], ends["kept"][-1]) == (1, 1, 1, 2)


def _write_regions(path: Path, count: int, malformed: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write("image_id,url,caption\n")
        for number in range(count):
            file.write(f"{number % 997},http://a.cn/{number % 997},第{number}句说的是图里的一样东西\n")
        for number in range(malformed):
            file.write(f"{number},b,c,d,{'x' * 200}\n")


def test_regions_dealt_to_piles_are_those_joined_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vg.csv"
    _write_regions(path, 5000, 7)
    source = TableSource(path=str(path), name="vg", kind="visual_genome")
    nothing = GuardedIds(frozenset(), frozenset())
    monkeypatch.setattr(text_lines, "BLOCK_BYTES", 20_000)
    results = []
    for pile_bytes in (1 << 30, 10_000):
        monkeypatch.setattr(convert, "PILE_BYTES", pile_bytes)
        out = tmp_path / str(pile_bytes)
        done = convert.join_regions(
            [str(path)], source, nothing, convert.Places(*(str(out / f"{name}.parquet") for name in "tmd"))
        )
        assert done.dropped == {"joined_with_image": 5000 - 997, "malformed:columns": 7}
        assert pl.read_parquet(out / "m.parquet").height == 7
        assert sorted(item.name for item in out.iterdir()) == [
            "d.parquet",
            "m.parquet",
            "t.parquet",
        ]  # the piles are gone
        results.append(pl.read_parquet(out / "t.parquet"))
    assert results[0]["image"].to_list() == [str(number) for number in range(997)]  # one pile: in order
    assert results[1].sort(pl.col("image").cast(int)).equals(results[0])
    first = results[0].row(0, named=True)["caption"].split("，")
    assert first == [f"第{number}句说的是图里的一样东西" for number in range(0, 5000, 997)]


def test_malformed_rows_are_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_lines, "BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(convert, "_MALFORMED_AT_ONCE", 1000)
    path = tmp_path / "bad.csv"
    with open(path, "w", encoding="utf-8") as file:
        file.write("url,caption\nhttp://a.cn/1,一只黑色的猫\n")
        for number in range(80_000):
            file.write(f"http://a.cn/{number},a,b,{'x' * 250}\n")
    source = TableSource(path=str(path), name="a")
    few = tmp_path / "few.csv"
    few.write_text("url,caption\nhttp://a.cn/1,猫\na,b,c\n", encoding="utf-8")
    to = convert.Places(str(tmp_path / "t"), str(tmp_path / "m"), str(tmp_path / "d"))
    convert.convert_text(str(few), source, to)  # imports take room too
    tracemalloc.start()
    done = convert.convert_text(str(path), source, to)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert done.dropped == {"malformed:columns": 80_000}
    assert peak < 20 << 20, peak  # of 80,000 rows, 36 MB as Python's objects
