"""Readers of classification sets: the same images in three layouts, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval.datasets.classification import is_classification_set, read_classification
from pipeline.core.records import InputError
from tests.helpers.classification_files import square_image, write_cnclip, write_torchvision, write_web


def test_three_layouts_hold_the_same_set(tmp_path: Path) -> None:
    write_torchvision(tmp_path / "tv")
    sets = [
        read_classification(str(write_cnclip(tmp_path / "cn"))),
        read_classification(str(tmp_path / "tv"), labels_path=str(tmp_path / "tv.tsv")),
        read_classification(str(write_web(tmp_path / "web"))),
    ]
    for data in sets:
        assert data.labels.names == ("红色", "绿色", "蓝色")
        assert data.num_images == 12
        expected = [
            square_image(colour, 100 * c + i)
            for c, colour in enumerate(("red", "green", "blue"))
            for i in range(4)
        ]
        assert [item.read() for item in data.images] == expected
        assert (data.targets_NC.argmax(axis=1) == np.repeat([0, 1, 2], 4)).all()
        assert data.submission_order is None
    assert all(is_classification_set(str(tmp_path / name)) for name in ("cn", "tv", "web"))
    assert not is_classification_set(str(tmp_path))


def test_classes_of_web_sets_go_by_their_names(tmp_path: Path) -> None:
    root = write_web(tmp_path / "web")
    labels = tmp_path / "labels.tsv"
    labels.write_text("blue\t蓝色\nred\t红色\ngreen\t绿色\n", encoding="utf-8")
    data = read_classification(str(root), labels_path=str(labels))
    assert (data.targets_NC.argmax(axis=1) == np.repeat([1, 2, 0], 4)).all()
    (root / "classnames.txt").write_text("red\nlime\nblue")
    with pytest.raises(
        InputError, match=r"class 0, 'red', is class 1 of the labels, and 1 names are unknown"
    ):
        read_classification(str(root), labels_path=str(labels))
    (root / "classnames.txt").write_text("crimson\nlime\nnavy")  # other words: by number
    assert (
        read_classification(str(root), labels_path=str(labels)).targets_NC.argmax(axis=1)
        == np.repeat([0, 1, 2], 4)
    ).all()
    (root / "classnames.txt").write_text("red\nlime")
    with pytest.raises(InputError, match=r"classnames.txt: has 2 classes, but the labels 3"):
        read_classification(str(root), labels_path=str(labels))


def test_class_folders_by_number_of_any_padding(tmp_path: Path) -> None:
    root = write_cnclip(tmp_path / "set")
    for number in range(3):
        (root / "test" / f"{number:03d}").rename(root / "test" / str(number + 1))
    data = read_classification(str(root))
    assert (data.targets_NC.argmax(axis=1) == np.repeat([0, 1, 2], 4)).all()


def test_ten_comes_after_two(tmp_path: Path) -> None:
    for number in range(11):
        (tmp_path / "s" / "test" / str(number)).mkdir(parents=True)
        (tmp_path / "s" / "test" / str(number) / "a.png").write_bytes(square_image("red", number))
    (tmp_path / "s" / "label_cn.txt").write_text("\n".join(f"第{n}类" for n in range(11)), encoding="utf-8")
    data = read_classification(str(tmp_path / "s"))
    assert data.targets_NC.argmax(axis=1).tolist() == list(range(11))
    assert [item.read() for item in data.images] == [square_image("red", n) for n in range(11)]


def test_shipped_labels_serve_english_folders(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "cifar-10" / name).mkdir(parents=True)
        (tmp_path / "cifar-10" / name / "a.png").write_bytes(square_image("red", 1))
    data = read_classification(str(tmp_path / "cifar-10"))
    assert [data.labels.names[c] for c in data.targets_NC.argmax(axis=1)] == ["猫", "狗"]


def test_one_image_in_two_classes(tmp_path: Path) -> None:
    for number, name in ((0, "a"), (1, "a"), (1, "b")):
        folder = tmp_path / "voc" / "test" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(square_image("red", 1))
    (tmp_path / "voc" / "label_cn.txt").write_text("猫\n狗", encoding="utf-8")
    data = read_classification(str(tmp_path / "voc"), multi_label=True)
    assert data.targets_NC.tolist() == [[True, True], [False, True]]


def test_submission_order(tmp_path: Path) -> None:
    root = write_cnclip(tmp_path / "set", count=1)
    (root / "index.json").write_text("[2, 0, 1]")
    order = read_classification(str(root)).submission_order
    assert order is not None
    assert order.tolist() == [2, 0, 1]
    (root / "index.json").write_text(json.dumps([0, 0, 1]))
    with pytest.raises(InputError, match=r"index.json: must hold each of 0 to 2 once"):
        read_classification(str(root))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: (root / "label_cn.txt").write_text("红\n绿\n", encoding="utf-8"),
            "has class 2, but the labels name only 2",
        ),
        (lambda root: (root / "label_cn.txt").unlink(), "has no label_cn.txt, and set is no set of ICinW"),
        (
            lambda root: (
                (root / "test" / "zebra").mkdir()
                or (root / "test" / "zebra" / "a.png").write_bytes(square_image("red", 0))
            ),
            "folders 000, 001, 002 are numbers, but zebra are not",
        ),
        (lambda root: [p.unlink() for p in (root / "test").rglob("*.png")], "holds no images"),
    ],
)
def test_what_is_refused(tmp_path: Path, change: object, message: str) -> None:
    root = write_cnclip(tmp_path / "set")
    change(root)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        read_classification(str(root))


def test_damaged_web_sets(tmp_path: Path) -> None:
    root = write_web(tmp_path / "web")
    (root / "test" / "1.tar").write_bytes(b"no tar")
    with pytest.raises(InputError, match=r"1.tar: not a readable tar"):
        read_classification(str(root))
    (root / "test" / "nshards.txt").write_text("many")
    with pytest.raises(InputError, match="expected the number of tars"):
        read_classification(str(root))
