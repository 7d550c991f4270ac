"""Captions longer than the context: which words are kept, and what that does to the token ids of a shard."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.shard_files import VOCABULARY, write_shards
from training.config.train import CaptionCut
from training.data.shard_table import read_shard_table
from training.data.short_captions import shorten
from training.model.tokenizer import SPECIAL_TOKENS, Tokenizer

CAPTIONS = [
    "两只可爱的小猫在草地上追逐一只红色的蝴蝶",
    "一张白色的桌子上放着三个苹果和一把银色的水果刀，旁边有一本打开的书",
    "red car 和 blue bus 在路上",
]
CHARACTERS = sorted({character for caption in CAPTIONS for character in caption if character >= "一"})
TOKENIZER = Tokenizer([*SPECIAL_TOKENS, *CHARACTERS, "red", "car", "blue", "bus"])


def test_nouns_come_first_then_verbs_and_all_in_the_order_of_the_caption() -> None:
    assert shorten(CAPTIONS[:2], "words", TOKENIZER, 10) == ["小猫 草地 红色 蝴蝶", "白色 桌子 苹果 银色"]
    assert shorten(CAPTIONS[:1], "words", TOKENIZER, 14) == ["可爱 小猫 草地 追逐 红色 蝴蝶"]
    # A word of three characters does not fit into what is left, one of a single one does.
    assert shorten(CAPTIONS[1:2], "words", TOKENIZER, 11) == ["白色 桌子 苹果 银色 书"]


def test_latin_words_stay_apart() -> None:
    (short,) = shorten(CAPTIONS[2:], "words", TOKENIZER, 6)
    assert TOKENIZER.vocabulary.index("[UNK]") not in TOKENIZER.encode([short], 6)
    assert set(short.split()) < {"red", "car", "blue", "bus", "路", "路上"}


def test_a_caption_without_a_word_that_fits_stays_whole() -> None:
    assert shorten(["红色的蝴蝶"], "words", TOKENIZER, 3) == ["的"]
    assert shorten(["蝴蝶"], "words", TOKENIZER, 3) == ["蝴蝶"]


@settings(max_examples=60, deadline=None)
@given(
    caption=st.text(alphabet=[*CHARACTERS, " ", "，", "r"], max_size=60),
    context_length=st.integers(3, 20),
    cut=st.sampled_from(["words", "random"]),
)
def test_any_caption_fits_and_keeps_its_order(caption: str, context_length: int, cut: CaptionCut) -> None:
    assert cut != "end"
    (short,) = shorten([caption], cut, TOKENIZER, context_length)
    assert shorten([caption], cut, TOKENIZER, context_length) == [short]
    assert short == caption or TOKENIZER.num_truncated([short], context_length) == 0
    rest = iter(caption)
    assert all(character in rest for character in short if character != " ")


@pytest.mark.parametrize("cut", ["end", "words", "random"])
def test_a_shard_has_the_short_captions_ids(tmp_path: Path, cut: CaptionCut) -> None:
    (shard,) = write_shards(tmp_path / "shards", [12])
    tokenizer = Tokenizer(VOCABULARY)
    read = {
        kind: read_shard_table(
            shard,
            tokenizer,
            caption_weights={"caption": 1.0},
            context_length=length,
            token_folder=str(tmp_path / "tokens"),
            cut=cut if kind == "short" else "end",
        )
        for kind, length in (("whole", 40), ("short", 6), ("first words", 6))
    }
    assert read["whole"].num_tokens.max() > 6
    assert read["short"].num_tokens.max() == 6
    is_same = np.array_equal(read["short"].token_ids, read["first words"].token_ids)
    assert is_same == (cut == "end")
