"""Both matchers give the same answers, which are those of a plain search in Python."""

import random
from collections.abc import Sequence

import polars as pl
import pytest

from data_prep.rules import word_match
from data_prep.rules.word_match import first_list, first_word

HYPERSCAN = pytest.param(
    True, marks=pytest.mark.skipif(not word_match.has_hyperscan(), reason="no hyperscan")
)


def ascii_lower(text: str) -> str:
    return text.encode().lower().decode()


def expected(captions: Sequence[str | None], lists: Sequence[Sequence[str]]) -> list[int | None]:
    found: list[int | None] = []
    for caption in captions:
        hits = [
            number
            for number, words in enumerate(lists)
            if caption is not None and any(ascii_lower(word) in ascii_lower(caption) for word in words)
        ]
        found.append(hits[0] if hits else None)
    return found


@pytest.fixture(params=[False, HYPERSCAN])
def matcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_match, "HYPERSCAN_FROM_WORDS", 0 if request.param else 1 << 30)


def match(
    captions: Sequence[str | None], lists: Sequence[Sequence[str]], engine: str = "streaming"
) -> list[int | None]:
    frame = pl.LazyFrame({"caption": pl.Series(captions, dtype=pl.String)})
    return frame.select(first_list(pl.col("caption"), lists)).collect(engine=engine).to_series().to_list()  # type: ignore[call-overload,no-any-return]


@pytest.mark.usefixtures("matcher")
@pytest.mark.parametrize("engine", ["streaming", "in-memory"])
def test_answers_are_those_of_a_plain_search(engine: str) -> None:
    rng = random.Random(0)
    letters = "猫狗ab包邮加VXvx.ÄäK\u212a𠮷😀"  # the Kelvin sign and Ä: lower case of ASCII alone counts
    lists = [["".join(rng.choices(letters, k=rng.randint(1, 4))) for _ in range(20)] for _ in range(3)]
    captions: list[str | None] = ["".join(rng.choices(letters, k=rng.randint(0, 8))) for _ in range(3000)]
    captions[5] = captions[17] = None
    answers = match(captions, lists, engine)
    assert answers == expected(captions, lists)
    assert {0, 1, 2, None} == set(answers)


@pytest.mark.usefixtures("matcher")
def test_a_word_does_not_reach_into_the_next_row() -> None:
    assert match(["你包", "邮好", "", "包", "邮", None, "包邮"], [["包邮"]]) == [None] * 6 + [0]


@pytest.mark.usefixtures("matcher")
def test_pieces_of_words_of_many_lists() -> None:
    assert match(["ab", "a", "b", "cab"], [["ab"], ["a", "AB"], [], ["b"]]) == [0, 1, 3, 0]
    assert match([], [["a"]]) == []
    assert match(["a"], [[], []]) == [None]


@pytest.mark.skipif(not word_match.has_hyperscan(), reason="no hyperscan")
def test_a_column_longer_than_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_match, "_MAX_BYTES_AT_ONCE", 40)
    monkeypatch.setattr(word_match, "HYPERSCAN_FROM_WORDS", 0)
    captions = [
        f"第{number}行{'包邮' if number % 7 == 0 else ''}" + "长" * (number % 50) for number in range(500)
    ]
    assert match(captions, [["包邮"]]) == expected(captions, [["包邮"]])


def test_the_word_named_is_the_lists_first() -> None:
    captions = pl.Series(["IMG_1.JPG", "没有", "加vX吧", "一张.jpg"])
    assert first_word(captions, [".jpg", "img_", "加VX"]).to_list() == [".jpg", None, "加VX", ".jpg"]
