"""Our labels and templates: complete, distinct, Chinese; a user's own files replace them."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from eval.datasets.labels import labels_for, prompts, read_labels, shipped_labels, shipped_sets, templates_for
from eval.paper.published import protocols
from pipeline.core.records import InputError

SETS = [item.id for item in protocols().classification]


def test_all_20_sets_are_there_and_no_other() -> None:
    assert shipped_sets() == sorted(SETS)


@pytest.mark.parametrize("dataset", SETS)
def test_labels_are_complete_distinct_and_chinese(dataset: str) -> None:
    labels = shipped_labels(dataset)
    assert labels is not None
    expected = next(item for item in protocols().classification if item.id == dataset).classes
    assert len(labels.keys) == len(labels.names) == expected
    assert len({key.lower() for key in labels.keys}) == expected
    for name in labels.names:
        assert name == name.strip()
        # product names may be Latin, but a label that is nothing else was forgotten
        assert re.search(r"[\u4e00-\u9fff]", name) or re.fullmatch(r"[A-Z0-9 -]+", name), name


@pytest.mark.parametrize("choice", ["own", "paper"])
@pytest.mark.parametrize("dataset", SETS)
def test_templates_are_distinct_and_fit_52_tokens(dataset: str, choice: str) -> None:
    templates = templates_for(dataset, choice)
    assert len(templates) >= 2
    assert len(set(templates)) == len(templates)
    labels = shipped_labels(dataset, choice)
    assert labels is not None
    # a Chinese character is one token; [CLS] and [SEP] take two of 52
    longest = max(
        len(re.findall(r"[\u4e00-\u9fff]|[a-zA-Z]+|\S", text)) for text in prompts(labels.names, templates)
    )
    assert longest <= 50


@pytest.mark.skipif(
    find_spec("cn_clip") is None, reason="cn_clip, which has the vocabulary, is not installed"
)
@pytest.mark.parametrize("dataset", SETS)
def test_labels_differ_in_the_eyes_of_the_21128_word_pieces(dataset: str) -> None:
    """A character that the vocabulary lacks is [UNK]: no two labels may become the same, nor one nothing."""
    import cn_clip

    from training.model.tokenizer import Tokenizer

    labels = shipped_labels(dataset)
    assert labels is not None
    tokenizer = Tokenizer.load(str(Path(cn_clip.__file__).parent / "clip" / "vocab.txt"))
    unknown = tokenizer.encode(["鸸"], 3)[0, 1]
    tokens = [tuple(row[row != 0]) for row in tokenizer.encode(labels.names, 52)]
    assert len(set(tokens)) == len(tokens)
    for name, row in zip(labels.names, tokens, strict=True):
        assert set(row[1:-1]) - {unknown}, f"{name} is unknown altogether"


def test_general_templates_are_80_and_serve_any_set() -> None:
    assert len(set(templates_for("anything", "own"))) == 80
    assert templates_for("mnist", "general") == templates_for("anything", "own")


def test_the_prompts_that_the_paper_quotes_are_chosen_by_name() -> None:
    aircraft = templates_for("fgvc-aircraft-2013b-variants102", "paper")
    assert aircraft == ("{}，一张飞机的照片", "{}，一张战斗机的放大图像")
    general = templates_for("mnist", "paper")
    assert len(set(general)) == len(general) == 90
    assert templates_for("anything", "paper") == templates_for("../paper", "paper") == general
    assert templates_for("mnist", "own") != general


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        ("patch-camelyon", ("主要是红色", "中间有绿色块")),
        ("kitti-distance", ("在一辆车旁边", "在一辆车附近", "离一辆车有一段距离", "其他")),
    ],
)
def test_the_labels_that_the_paper_quotes_come_with_its_templates(
    dataset: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    ours, quoted = shipped_labels(dataset), shipped_labels(dataset, "paper")
    assert ours is not None
    assert quoted is not None
    assert (quoted.keys, quoted.names) == (ours.keys, names)
    assert labels_for(str(tmp_path), dataset, None, "paper") == quoted
    assert labels_for(str(tmp_path), dataset, None, "general") == ours
    (tmp_path / "label_cn.txt").write_text("\n".join("甲乙丙丁"[: len(names)]), encoding="utf-8")
    assert labels_for(str(tmp_path), dataset, None, "paper").names[0] == "甲"  # a set's own go first


def test_the_paper_quotes_no_labels_for_other_sets() -> None:
    assert shipped_labels("mnist", "paper") == shipped_labels("mnist")
    assert shipped_labels("anything", "paper") is None


def test_a_user_s_labels_in_both_forms(tmp_path: Path) -> None:
    path = tmp_path / "label_cn.txt"
    path.write_text("\ufeff猫\r\n狗\r\n", encoding="utf-8")
    assert read_labels(str(path)).names == ("猫", "狗")
    path.write_text("cat\t猫\ndog\t狗", encoding="utf-8")
    assert read_labels(str(path)).keys == ("cat", "dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\t猫\n狗\n", "not both"),
        ("猫\n\n狗\n", ":2: an empty line"),
        ("猫\n猫\n", "'猫' names two classes"),
        ("1\t猫\n1\t狗\n", "the key '1' belongs to two classes"),
        ("cat\t猫\n\t狗\n", ":2: a key or a name is empty"),
    ],
)
def test_bad_labels(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "label_cn.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_labels(str(path))


def test_bad_templates(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("{}的照片\n照片\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"templates.txt:2: a template needs \{\} once"):
        templates_for("mnist", str(path))
    with pytest.raises(InputError, match="no such file"):
        templates_for("mnist", "nowhere.txt")


def test_names_with_braces_are_taken_as_they_are() -> None:
    assert prompts(["{x}"], ["{}的照片"]) == ["{x}的照片"]
