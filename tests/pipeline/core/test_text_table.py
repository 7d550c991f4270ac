"""Columns line up in a terminal in any script."""

import pytest

from pipeline.core.text_table import align, display_width, pad


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("", 0),
        ("cat", 3),
        ("黑色的猫", 8),
        ("，。：", 6),  # full-width punctuation
        ("ＡＢ", 4),  # full-width letters
        ("ｶﾅ", 2),  # half-width kana
        ("한글", 4),
        ("café", 4),
        ("cafe\N{COMBINING ACUTE ACCENT}", 4),
        ("a\N{COMBINING ENCLOSING CIRCLE}", 1),
        ("か\N{COMBINING KATAKANA-HIRAGANA VOICED SOUND MARK}", 2),
        ("猫\N{VARIATION SELECTOR-16}", 2),
        ("a\N{ZERO WIDTH JOINER}b", 2),
        ("→ × …", 5),
    ],
)
def test_wide_characters_take_two_columns_and_marks_none(text: str, columns: int) -> None:
    assert display_width(text) == columns
    assert display_width(pad(text, 12)) == display_width(pad(text, 12, numeric=True)) == 12


def test_columns_line_up_and_lines_end_without_spaces() -> None:
    rows = [("name", "rows"), ("猫", "1"), ("cafe\N{COMBINING ACUTE ACCENT}", "23"), ("", "456")]
    assert align(rows, (False, True)).split("\n") == [
        "name  rows",
        "猫       1",
        "cafe\N{COMBINING ACUTE ACCENT}    23",
        "       456",
    ]
    assert align([("猫", "x"), ("ab", "")], (True, False)) == "猫  x\nab"
