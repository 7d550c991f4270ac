"""Text rules at their boundaries, and in their order."""

from collections.abc import Mapping
from typing import Any

import polars as pl
import pytest

from data_prep.filters.text import FilterTextConfig, rules_for
from data_prep.rules import text as text_rules
from data_prep.rules.text import TextRule
from pipeline.core.records import ConfigError, Manifest

SCHEMA = {"url": pl.String, "caption": pl.String, "language": pl.String, "score": pl.Float32}
GOOD = {"url": "http://a.cn/1.jpg", "caption": "一只黑色的猫", "language": "zh", "score": 0.3}


def _reason(rules: TextRule | list[TextRule], **changes: Any) -> str | None:
    rules = rules if isinstance(rules, list) else [rules]
    row = pl.DataFrame([{**GOOD, **changes}], schema=SCHEMA)
    reason: str | None = row.select(text_rules.first_reason(rules)).item()
    return reason


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("四个字的", "too_short"),
        ("五个字的猫", None),
        ("猫" * 50, None),
        ("猫" * 51, "too_long"),
        ("  四个字的　\n", "too_short"),  # white space at both ends, full-width too, does not count
        ("　五个字的猫\t", None),
        (" " + "猫" * 50 + "　", None),
        ("一 二 三", None),  # inside it does
        ("ＡＢＣＤ", "too_short"),  # full-width letters are one each
        ("ＡＢＣＤＥ", None),
        ("😀😀😀😀", "too_short"),  # outside the basic plane: one each, not two UTF-16 units or four bytes
        ("😀😀😀😀😀", None),
        ("👍🏽" * 2 + "好", None),  # base and skin tone: two
        ("e\u0301e\u0301", "too_short"),  # combining marks: one each
        ("e\u0301e\u0301e", None),
        ("abcd", "too_short"),
        ("", "too_short"),
    ],
)
def test_length_at_the_boundaries(caption: str, reason: str | None) -> None:
    assert _reason(text_rules.characters_between(5, 50), caption=caption) == reason


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (0.26, None),
        (0.2600001, None),
        (0.25999, "score_below_threshold"),
        (-0.1, "score_below_threshold"),
        (0.0, "score_below_threshold"),
        (1.0, None),
        (None, "score_missing"),
        (float("nan"), "score_missing"),
    ],
)
def test_score_at_the_threshold(score: float | None, reason: str | None) -> None:
    assert _reason(text_rules.score_at_least(0.26), score=score) == reason


def test_a_score_of_exactly_the_threshold_stays_in_both_precisions() -> None:
    rule = text_rules.score_at_least(0.26)
    for dtype in (pl.Float32, pl.Float64):
        frame = pl.DataFrame({"score": pl.Series([0.26], dtype=dtype)})
        for engine in ("in-memory", "streaming"):
            judged = frame.lazy().select(rule.reason).collect(engine=engine)  # type: ignore[call-overload]
            assert judged.item() is None, (dtype, engine)


@pytest.mark.parametrize(
    ("language", "reason"),
    [("zh", None), (None, None), ("en", "language"), ("zh-TW", "language"), ("", "language")],
)
def test_language(language: str | None, reason: str | None) -> None:
    assert _reason(text_rules.language_is("zh"), language=language) == reason


@pytest.mark.parametrize(
    ("caption", "missing"),
    [(None, True), ("", True), (" \t\n", True), ("\u3000", True), ("。", False), ("猫", False)],
)
def test_a_caption_must_say_something(caption: str | None, missing: bool) -> None:
    assert _reason(text_rules.caption_present(), caption=caption) == ("caption_missing" if missing else None)


@pytest.mark.parametrize(
    ("url", "valid"),
    [
        ("http://a.cn/1.jpg", True),
        ("https://a.cn", True),
        ("HTTPS://A.CN/图.jpg?x=1#y", True),
        ("http://127.0.0.1:8000/a", True),
        (r"http:\\a.cn\1.jpg", True),  # as browsers read it
        (r"http://\a.jpg", False),
        (None, False),
        ("", False),
        ("http://", False),
        ("http:///a.jpg", False),
        ("http://?a", False),
        (" http://a.cn", False),
        ("ftp://a.cn/1.jpg", False),
        ("data:image/png;base64,AA", False),
        ("//a.cn/1.jpg", False),
        ("file:///etc/passwd", False),
    ],
)
def test_url(url: str | None, valid: bool) -> None:
    assert _reason(text_rules.url_valid(), url=url) == (None if valid else "url_invalid")


THEMES: Mapping[str, tuple[str, ...]] = {"shop": ("加vx", "包邮"), "file": (".jpg", "img_")}


@pytest.mark.parametrize(
    ("caption", "reason", "word"),
    [
        ("想要就加VX吧", "blacklist:shop", "加vx"),
        ("想要就加vX吧", "blacklist:shop", "加vx"),
        ("IMG_0001.JPG", "blacklist:file", ".jpg"),
        ("包邮的猫.jpg", "blacklist:shop", "包邮"),  # the first theme in order names it
        ("包 邮的一只猫", None, None),
        ("一只猫的图", None, None),
    ],
)
def test_blacklist_ignores_case_and_names_its_theme(
    caption: str, reason: str | None, word: str | None
) -> None:
    assert _reason(text_rules.not_blacklisted(THEMES), caption=caption) == reason
    row = pl.DataFrame({"caption": [caption], "reason": pl.Series([reason], dtype=pl.String)})
    assert text_rules.blacklist_words(row, THEMES).to_list() == [word]


def test_blacklists_that_ship() -> None:
    for theme in ("advertising", "file_name", "boilerplate", "contacts", "adult"):
        words = text_rules.blacklist(theme)
        assert len(words) > 10
        assert len(set(words)) == len(words)
        assert all(word == word.strip() and not word.startswith("#") for word in words)
    with pytest.raises(
        ConfigError,
        match=r"no list 'adverts'; known lists: adult, advertising, boilerplate, contacts, file_name",
    ):
        text_rules.blacklist("adverts")
    assert _reason(text_rules.not_blacklisted({}), caption="包邮") is None
    assert _reason(text_rules.not_blacklisted({"empty": ()}), caption="包邮") is None


def test_evaluation_urls() -> None:
    rule = text_rules.not_an_evaluation_url(["http://a.cn/1.jpg"])
    assert _reason(rule) == "evaluation_url"
    assert _reason(rule, url="http://a.cn/2.jpg") is None
    assert _reason(text_rules.not_an_evaluation_url([])) is None


EMPTY = Manifest("corpus", 1, "", "", {}, (), 0, 0, {})


def test_the_first_rule_in_order_names_the_reason() -> None:
    rules = rules_for(FilterTextConfig(), (), (), has_scores=True)
    assert [rule.name for rule in rules] == [
        "caption_present", "url_valid", "language", "score", "characters", "blacklist",
    ]  # fmt: skip
    row: dict[str, Any] = {"caption": "", "url": "", "language": "en", "score": 0.1}
    reasons = []
    for mend in (
        {"caption": "包邮"}, {"url": GOOD["url"]}, {"language": "zh"}, {"score": 0.3},
        {"caption": "包邮的小猫"},
        {"caption": "可爱的小猫"},
    ):  # fmt: skip
        reasons.append(_reason(rules, **row))
        row |= mend
    assert reasons == [
        "caption_missing", "url_invalid", "language", "score_below_threshold", "too_short",
        "blacklist:advertising",
    ]  # fmt: skip
    assert _reason(rules, **row) is None


def test_rules_that_are_off() -> None:
    def names(config: FilterTextConfig, exempt: tuple[str, ...] = (), has_scores: bool = True) -> set[str]:
        return {rule.name for rule in rules_for(config, exempt, (), has_scores)}

    everything = names(FilterTextConfig())
    assert names(FilterTextConfig(), has_scores=False) == everything - {"score"}
    assert names(FilterTextConfig(), ("characters", "blacklist")) == everything - {"characters", "blacklist"}
    with pytest.raises(ConfigError, match=r"exempt_from: no rule 'url_valid'; known: language, score"):
        names(FilterTextConfig(), ("url_valid",))
