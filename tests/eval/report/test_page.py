"""The report's page: both languages, bars to scale, and no text of a corpus that runs."""

import base64
import dataclasses
import hashlib
import itertools
import re
import string
from html import unescape

import pytest

from data_prep.accounting.histograms import EDGES
from data_prep.download import reasons as download_reasons
from data_prep.rules import image as image_rules
from data_prep.rules import text as text_rules
from eval.paper.comparison import _RECALLS
from eval.report.data import Live, StageState
from eval.report.page import duration, figure, render_html
from eval.report.words import LANGUAGES, gloss, say, words
from pipeline.core.files import images
from pipeline.core.records import DropReason
from tests.helpers.report_page import HOSTILE, Page, make_data, scores


def test_corpus_text_is_text_and_nothing_is_fetched() -> None:
    html = render_html(make_data())
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag in ("iframe", "object", "embed", "form", "base")]
    assert page.text.count(HOSTILE) > 30
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"url\((?!#)|@import", html)
    assert len(html.encode()) < 3_000_000


def test_the_policy_allows_our_script_only() -> None:
    page = Page(render_html(make_data()))
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert [tag for tag, _ in page.tags].count("script") == len(page.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}'; ")
    assert "fetch(" not in page.scripts[0]
    assert "innerHTML" not in page.scripts[0]


def test_page_is_accessible() -> None:
    page = Page(render_html(make_data()))
    assert page.tags[0][0] == "html"
    assert page.tags[0][1]["lang"] == "en"
    assert all("alt" in attributes for tag, attributes in page.tags if tag == "img")
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) == 3 + 2 * 2
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert all(chart["role"] == "img" and chart["aria-labelledby"] in ids for chart in charts)
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert len(ids) == len(set(ids))
    named = [attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes]
    assert {*named} <= {*ids}


def test_sections_say_what_the_data_says() -> None:
    said = " ".join(Page(render_html(make_data())).said.split())
    assert "24.0% first image right 表情, text to image, R@1" in said
    assert "chance 0.08 10.1 20.1" in said
    assert "1 of 2 classes did not meet their written fate." in said
    assert "no right answer among the first 10" in said
    assert "text-to-image R@1 50.0 48.2 … 51.8 48.1 +1.9" in said
    assert "Table 4, COCO-CN" in said
    assert "language not marked as Chinese 20 20.0%" in said
    assert "2 images of the corpus, embedded by stage2" in said
    assert "25.0% of the variance" in said


def test_every_section_has_a_sentence_in_both_languages() -> None:
    html = render_html(make_data())
    for language in LANGUAGES:
        said = Page(html, language).said
        for section in ("scores", "paper", "training", "gallery", "samples", "map", "funnel", "dropped",
                        "planted", "stages", "facts"):  # fmt: skip
            assert words(language)[section]["title"] in said
            assert words(language)[section]["lead"] in said
        other = next(one for one in LANGUAGES if one != language)
        assert words(other)["scores"]["lead"] not in said


def test_both_languages_have_the_same_words_and_values() -> None:
    english, chinese = (words(language) for language in ("en", "zh"))
    assert [*english] == [*chinese]
    for section in english:
        assert [*english[section]] == [*chinese[section]], section
        for key, text in english[section].items():
            names = [
                sorted(name for _, name, _, _ in string.Formatter().parse(one) if name)
                for one in (text, chinese[section][key])
            ]
            assert names[0] == names[1], (section, key)
            assert chinese[section][key].strip()


def test_the_chinese_page_has_chinese_figures_and_notes() -> None:
    said = " ".join(Page(render_html(make_data()), "zh").said.split())
    assert f"表 4，COCO-CN {HOSTILE}，零样本：RN50 与 CN-CLIP RN50 对比" in said
    assert "以文搜图 R@1 50.0 48.2 … 51.8 48.1 +1.9" in said
    assert f"注：filter_text 的分数阈值 0.26 对 {HOSTILE} 不起作用：出现过的最低分为 0.2604。" in said
    for english in ("text-to-image", "Table 4", "zero-shot", "no-op"):
        assert english not in said


def test_every_figure_of_the_paper_tables_has_a_chinese_name() -> None:
    labels = [*_RECALLS.values(), "Average", "Classification, own sets"]
    labels += ["VOC2007, by ELEVATER's rule", "VOC2007, by VOC's own rule"]
    for label in labels:
        english, chinese = re.findall(r"<span[^>]*>([^<]*)</span>", str(figure(label)))
        assert unescape(english) == label
        assert re.search(r"[\u4e00-\u9fff]", chinese), label
    assert str(figure("CIFAR-10")).count("CIFAR-10") == 2


def test_values_are_escaped_in_both_languages() -> None:
    said = str(say("page.note", text="<b>"))
    assert said.startswith('<span class="en" lang="en">Note: &lt;b&gt;</span>')
    assert said.endswith('<span class="zh" lang="zh-CN">注：&lt;b&gt;</span>')
    with pytest.raises(KeyError):
        say("page.note")


def test_every_rule_is_explained() -> None:
    reasons = {
        value
        for module in (text_rules, image_rules, download_reasons, images)
        for value in vars(module).values()
        if type(value) is DropReason
    }
    assert len(reasons) > 10
    assert [reason for reason in reasons if not gloss("reasons", reason)] == []
    assert gloss("reasons", "blacklist:advertising") == gloss("reasons", "blacklist")
    assert gloss("reasons", "format:heic") == gloss("reasons", "format")
    assert gloss("reasons", HOSTILE) == ""
    assert {*EDGES} <= {*words("en")["funnel"]}


def _bars(html: str) -> list[list[float]]:
    """Return the widths of the parts of each bar, in percent."""
    tracks = re.findall(r'<span class="track" aria-hidden="true">(.*?)</span>', html)
    return [[float(width) for width in re.findall(r"width: ([\d.]+)%", track)] for track in tracks]


def test_bars_have_a_true_scale_from_0_to_100() -> None:
    data = dataclasses.replace(
        make_data(), evaluations={"set": scores(12.5)}, baselines={"set": {"chance": scores(3)}}
    )
    html = render_html(data)
    bars = _bars(html)
    assert bars[:2] == [[3.0], [12.5]]  # and not as wide as the largest
    assert bars[2] == [75.0, 25.0]  # of 100 rows 75 stay
    assert bars[3:] == [[75.0, 25.0], [75.0], [20.0], [5.0]]
    ticks = re.findall(r'<i style="left: (\d+)%">(\d+)%?</i>', html)
    assert ticks == [(tick, tick) for tick in ("0", "25", "50", "75", "100")] * 3


def test_bars_of_an_empty_run_have_no_width() -> None:
    data = make_data()
    (step,) = data.funnel
    counts = dataclasses.replace(step.total, num_in=0, num_kept=0, dropped={})
    empty = dataclasses.replace(
        data, funnel=(dataclasses.replace(step, total=counts, sources={}),), evaluations={}
    )
    assert {*itertools.chain(*_bars(render_html(empty)))} == {0.0}


def test_many_sources_share_a_column() -> None:
    data = make_data()
    (step,) = data.funnel
    one = step.sources["a"]
    sources = {f"source-{n:03d}": dataclasses.replace(one, num_in=999 - n) for n in range(300)}
    html = render_html(dataclasses.replace(data, funnel=(dataclasses.replace(step, sources=sources),)))
    assert "source-005" in html
    assert "source-006" not in html
    assert "294 others" in html


def test_same_data_same_bytes() -> None:
    assert render_html(make_data()) == render_html(make_data())


def test_a_run_without_planted_dirt_curves_or_images_has_no_such_sections() -> None:
    lists = ("planted", "training", "recall", "galleries", "funnel", "comparisons", "samples", "dropped")
    data = dataclasses.replace(make_data(), baselines={}, corpus_map=None, **dict.fromkeys(lists, ()))
    ids = {attributes.get("id") for _, attributes in Page(render_html(data)).tags}
    absent = {"planted", "training", "gallery", "funnel", "paper", "samples", "dropped", "map", "copies"}
    assert ids & absent == set()
    assert {"scores", "stages", "facts"} <= ids


def test_name_date_and_states_are_those_of_the_run() -> None:
    states = {
        "filter_text": StageState("done", 3, 3, 3725.0),
        "shards": StageState("to do", 2, 7, 61.4),
        HOSTILE: StageState("stale", 0, None, 0.0),
    }
    live = Live(HOSTILE, "2026-01-02", "2026-01-03 04:05", states, 30)
    page = Page(render_html(dataclasses.replace(make_data(), live=live)))
    assert page.tags[0][1]["data-title-zh"] == f"{HOSTILE} · 2026-01-02"
    said = " ".join(page.said.split())
    assert "run of 2026-01-02" in said
    assert "1 of 3 stages are done" in said
    assert "It reloads every 30 seconds." in said
    assert "to do , 2 of 7 tasks" in said
    assert "1 h 02 min" in said
    assert "Page written 2026-01-03 04:05 UTC" in said
    assert [a["content"] for _, a in page.tags if a.get("http-equiv") == "refresh"] == ["30"]
    plain = Page(render_html(make_data()))
    assert [a for _, a in plain.tags if a.get("http-equiv") == "refresh"] == []


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 59, 61.4, 7325)] == [
        "0 s",
        "59 s",
        "1 min 01 s",
        "2 h 02 min",
    ]
