"""Readers of classification sets: the same images in three layouts, and what is refused."""

import io
import json
import os
import tarfile
from collections.abc import Sequence
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


def _folders(root: Path, names: Sequence[str], labels: str, empty: Sequence[str] = ()) -> str:
    """A set with one image in each folder, of which the first pixel says which folder it is."""
    for row, name in enumerate(names):
        (root / "test" / name).mkdir(parents=True)
        (root / "test" / name / "a.png").write_bytes(square_image("red", row))
    for name in empty:
        (root / "test" / name).mkdir(parents=True)
    (root / "label_cn.txt").write_text(labels, encoding="utf-8")
    return str(root)


def _classes(root: str, names: Sequence[str]) -> dict[str, str]:
    """Folder → Chinese name of its class."""
    data = read_classification(root)
    folders = [Path(item.path).parent.name for item in data.images]
    assert sorted(folders) == sorted(names)
    return dict(zip(folders, (data.labels.names[row] for row in data.targets_NC.argmax(axis=1)), strict=True))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("1\t猫\n0\t狗", {"0": "狗", "1": "猫"}),
        ("2\t猫\n001\t狗\n3\t鸟", {"1": "狗", "02": "猫"}),
        ("1990\t甲\n1995\t乙\n2000\t丙", {"1995": "乙", "2000": "丙"}),
        ("1990\n1995\n2000", {"2000": "2000", "1990": "1990"}),
        ("big_cat\t猫\nDog\t狗", {"Big-Cat": "猫", "dog": "狗"}),
        ("a/b\t猫\na_b\t狗", {"a_b": "狗"}),
        ("cat\t猫\ndog\t狗", {"狗": "狗", "cat": "猫"}),
        ("cafe\u0301\t咖啡\ntea\t茶", {"caf\u00e9": "咖啡"}),
        ("x\t甲\ny\t乙", {"0": "甲", "1": "乙"}),
        ("甲\n乙\n丙", {"0": "甲", "2": "丙"}),
        ("甲\n乙\n丙", {"1": "甲", "3": "丙"}),
    ],
)
def test_folders_are_matched_by_key_then_by_name_then_by_number(
    tmp_path: Path, labels: str, expected: dict[str, str]
) -> None:
    assert _classes(_folders(tmp_path / "set", list(expected), labels), list(expected)) == expected


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (
            ["1", "2", "3"],
            "甲\n乙\n丙\n丁",
            r"4 labels, and folders that may count from 0 or from 1 \(found 1, 2, 3\)",
        ),
        (
            ["0", "1", "2", "3"],
            "甲\n乙\n丙",
            r"has class 3, but the labels name only 3 classes \(found 0, 1, 2, 3\)",
        ),
        (["1990", "1991"], "甲\n乙", r"has class 1991, but the labels name only 2 .*into label_cn.txt"),
        (["0", "1"], "1\t甲\n2\t乙", r"folder 0 is not a key of the labels \(1, 2\), as are 1 of 2 folders"),
        (["1", "01"], "甲\n乙", r"two folders have the same class id"),
        (["cat", "Cat"], "cat\t甲\ndog\t乙", r"the folders 'Cat' and 'cat' are both class 0"),
        (["a-b"], "a/b\t甲\na_b\t乙", r"no label is called 'a-b'"),
        (
            ["cat", "bird"],
            "cat\t甲\ndog\t乙",
            r"no label is called 'bird' \(1 of 2 .*the labels are cat, dog\)",
        ),
        (["0", "bird"], "甲\n乙", r"folders 0 are numbers, but bird are not"),
    ],
)
def test_unclear_folders_are_refused_with_what_was_found(
    tmp_path: Path, names: list[str], labels: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_classification(_folders(tmp_path / "set", names, labels))


def test_empty_folders_decide_how_numbers_are_counted(tmp_path: Path) -> None:
    names, labels = ["1", "2"], "甲\n乙\n丙"
    assert _classes(_folders(tmp_path / "a", names, labels, empty=["3"]), names) == {"1": "甲", "2": "乙"}
    assert _classes(_folders(tmp_path / "b", names, labels, empty=["0"]), names) == {"1": "乙", "2": "丙"}


def test_what_is_passed_over_is_noted(tmp_path: Path) -> None:
    names = ["0", "1"]
    root = _folders(tmp_path / "set", names, "甲\n乙", empty=["__MACOSX", ".ipynb_checkpoints", "zebra"])
    (tmp_path / "set" / "test" / "0" / "._a.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "set" / "test" / "0" / "notes.txt").write_text("x")
    (tmp_path / "set" / "test" / "loose.png").write_bytes(square_image("red", 9))
    os.mkfifo(tmp_path / "set" / "test" / "1" / "p.png")
    assert _classes(root, names) == {"0": "甲", "1": "乙"}
    passed_over, endings, strays, loose = sorted(read_classification(root).notes)
    assert passed_over.startswith("1 empty folders are not classes (zebra)")
    assert endings == "1 images lie next to the class folders and are not part of the set"
    assert strays.startswith("4 files or folders are skipped (")
    for name in (
        "__MACOSX: hidden",
        ".ipynb_checkpoints: hidden",
        "._a.png: hidden",
        "p.png: no_file: a FIFO",
    ):
        assert name in strays
    assert loose == "files with other endings than images are skipped (1 .txt)"
    assert not is_classification_set(str(tmp_path / "set" / "test" / "0"))


@pytest.mark.parametrize("prefix", ["", "./", "v1.0/", "./a.b/c/"])
def test_keys_of_tar_members_end_after_the_last_slash(tmp_path: Path, prefix: str) -> None:
    root = tmp_path / "web"
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "label_cn.txt").write_text("甲\n乙", encoding="utf-8")
    members = {
        "s0.png": square_image("red", 1),
        "s0.cls": b"1",
        "._s0.png": b"x",
        "s1.PNG": square_image("blue", 2),
    }

    def write(members: dict[str, bytes]) -> None:
        with tarfile.open(root / "test" / "0.tar", "w") as tar:
            for name, data in members.items():
                member = tarfile.TarInfo(prefix + name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    write(members | {"s1.cls": b"0"})
    data = read_classification(str(root))
    assert [item.read() for item in data.images] == [members["s0.png"], members["s1.PNG"]]
    assert data.targets_NC.argmax(axis=1).tolist() == [1, 0]
    write(members | {"s1.cls": b"0", "s0.jpg": square_image("red", 3)})
    with pytest.raises(InputError, match=r"s0\.jpg: a second one of this key"):
        read_classification(str(root))


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
        (lambda root: (root / "label_cn.txt").unlink(), "has no label_cn.txt, and set is not a set of ICinW"),
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
    (root / "test" / "1.tar").unlink()
    os.mkfifo(root / "test" / "1.tar")
    with pytest.raises(InputError, match=r"1.tar: no such file, but nshards.txt counts 3 tars"):
        read_classification(str(root))
    (root / "test" / "nshards.txt").write_text("many")
    with pytest.raises(InputError, match="expected the number of tars"):
        read_classification(str(root))
