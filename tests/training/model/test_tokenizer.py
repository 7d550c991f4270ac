"""Token ids, and vocabularies learned from captions."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from pipeline.core.records import InputError
from training.model.tokenizer import SPECIAL_TOKENS, Tokenizer, learn_vocabulary, normalise

VOCABULARY = [*SPECIAL_TOKENS, "红", "色", "猫", "\U0002b820", "red", "##dish", "cat", '"', "!", "1", "##2"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("红色Cat", ["红", "色", "cat"]),
        ("“猫”!", ['"', "猫", '"', "!"]),
        ("Café", ["cafe"]),
        ("a\u200bb\tc\u3000d\x00", ["ab", "c", "d"]),
        (
            "x\U0002b820y\uf900",
            ["x", "\U0002b820", "y", "\u8c48"],
        ),  # an extension and a compatibility character
        ("a^b，c", ["a", "^", "b", "，", "c"]),
        ("\ue000", ["\ue000"]),  # private use: kept, unlike by a Rust BERT normaliser
        ("", []),
    ],
)
def test_normalise(text: str, words: list[str]) -> None:
    assert normalise(text).split() == words


def test_encode_frames_cuts_and_pads() -> None:
    tokenizer = Tokenizer(VOCABULARY)
    tokens_NL = tokenizer.encode(["Reddish 猫", "红色红色红色", "", "dog12 12"], 6)
    assert tokens_NL.dtype == np.int32
    assert tokens_NL.tolist() == [
        [2, 9, 10, 7, 3, 0],
        [2, 5, 6, 5, 6, 3],  # four pieces fit beside [CLS] and [SEP]
        [2, 3, 0, 0, 0, 0],
        [2, 1, 14, 15, 3, 0],
    ]
    assert tokenizer.num_truncated(["红色红色红色", "红色红色", "猫"], 6) == 1


def test_half_a_surrogate_pair_makes_its_word_unknown() -> None:
    """Broken JSON escapes give such strings; no encoding holds them, and the reference takes them."""
    tokenizer = Tokenizer([*SPECIAL_TOKENS, "猫", "a"])
    assert tokenizer.encode(["猫\ud83d", "a\udc00a a"], 6).tolist() == [
        [2, 5, 1, 3, 0, 0],
        [2, 1, 6, 3, 0, 0],
    ]


def test_special_tokens_in_a_caption_are_text() -> None:
    assert Tokenizer(VOCABULARY).encode(["[SEP]红"], 8)[0].tolist() == [2, 1, 1, 1, 5, 3, 0, 0]


def test_vocabulary_file_round_trip(tmp_path: Path) -> None:
    tokenizer = Tokenizer(VOCABULARY)
    path = str(tmp_path / "vocab.txt")
    tokenizer.save_vocabulary(path)
    for source in (path, str(tmp_path)):
        loaded = Tokenizer.load(source)
        assert loaded.vocabulary == tokenizer.vocabulary
        assert loaded.digest == tokenizer.digest
    assert Tokenizer([*VOCABULARY, "狗"]).digest != tokenizer.digest


def test_unreachable_model_id_is_one_plain_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name from a hub: tests/training/weights/hub/."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        InputError, match=r"^owner/name:vocab\.txt: http://127\.0\.0\.1:9 cannot be reached: .*"
    ):
        Tokenizer.load("owner/name")


def test_bad_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a vocabulary file"):
        Tokenizer.load(str(tmp_path / "absent.txt"))
    with pytest.raises(InputError, match="not a vocabulary file"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"vocab\.txt: not UTF-8"):
        Tokenizer.load(str(tmp_path))
    with pytest.raises(InputError, match=r"lacks the token \[MASK\]"):
        Tokenizer([token for token in VOCABULARY if token != "[MASK]"])
    with pytest.raises(InputError, match=r"\[PAD\] is line 2"):
        Tokenizer(["猫", *SPECIAL_TOKENS])
    with pytest.raises(InputError, match="'猫' occurs 2 times"):
        Tokenizer([*VOCABULARY, "猫"])


def _captions() -> list[str]:
    words = ["red", "reddish", "blue", "bluish", "红色", "蓝色的", "猫", "square", "squares", "12", "120"]
    generator = random.Random(0)
    return [" ".join(generator.choices(words, k=4)) for _ in range(200)]


def test_learned_vocabulary_covers_its_captions() -> None:
    captions = _captions()
    vocabulary = learn_vocabulary(captions, 200)
    assert vocabulary[:5] == list(SPECIAL_TOKENS)
    assert {"red", "squares", "##ish"} & set(vocabulary) >= {"red", "squares"}
    assert not any(len(piece.removeprefix("##")) > 1 and not piece.isascii() for piece in vocabulary)
    tokenizer = Tokenizer(vocabulary)
    tokens_NL = tokenizer.encode(captions, 52)
    assert not (tokens_NL == vocabulary.index("[UNK]")).any()
    lengths = (tokenizer.encode(["red square bluish"], 20) != 0).sum()
    assert lengths == 5  # words that were seen are one piece each


def test_learned_vocabulary_depends_on_nothing_but_the_captions() -> None:
    captions = _captions()
    vocabulary = learn_vocabulary(captions, 35)
    assert len(vocabulary) == 35
    assert learn_vocabulary(captions[::-1], 35) == vocabulary
    code = (
        "from tests.training.model.test_tokenizer import _captions, learn_vocabulary;"
        "print('\\n'.join(learn_vocabulary(_captions(), 35)))"
    )
    for seed in ("1", "2"):
        output = subprocess.check_output(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "utf-8"},
            encoding="utf-8",
        )
        assert output.split() == vocabulary


def test_learned_vocabulary_keeps_the_commonest_characters_when_full() -> None:
    assert learn_vocabulary(["猫猫猫狗狗鸟"], 7) == [*SPECIAL_TOKENS, "猫", "狗"]
    with pytest.raises(ValueError, match="no room"):
        learn_vocabulary(["猫"], 5)


def test_texts_that_the_vocabulary_cannot_write_are_found() -> None:
    tokenizer = Tokenizer([*SPECIAL_TOKENS, "红", "色", "猫"])
    assert tokenizer.with_unknown(["红色", "红色的猫", "狗", ""]) == ["红色的猫", "狗"]
