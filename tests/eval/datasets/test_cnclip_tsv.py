"""The reader of CN-CLIP's evaluation layout: order, pairing, and errors that name file and line."""

import base64
import dataclasses
import json
from pathlib import Path

import pytest

from data_prep.formats import base64_image
from eval.datasets import cnclip_tsv
from eval.datasets.cnclip_tsv import check_scorable, read_evaluation
from pipeline.core.records import InputError
from tests.helpers.evaluation_files import png_bytes, small_evaluation, write_evaluation


def test_rows_are_in_id_order_whatever_the_files_say(tmp_path: Path) -> None:
    folder = write_evaluation(
        tmp_path, "e", {7: b"seven", -2: b"minus two", 3: b"three"}, [(9, "九", [3, 7]), (4, "四", [-2])]
    )
    evaluation = read_evaluation(folder, "e")
    assert evaluation.image_ids.tolist() == [-2, 3, 7]
    assert list(evaluation.image_bytes(range(3))) == [b"minus two", b"three", b"seven"]
    assert evaluation.texts == ("四", "九")
    assert [rows.tolist() for rows in evaluation.images_of_text] == [[0], [1, 2]]
    assert [rows.tolist() for rows in evaluation.texts_of_image] == [[0], [1], [1]]


def test_reads_windows_line_ends_and_blank_lines(tmp_path: Path) -> None:
    encoded = base64.b64encode(b"image").decode()
    (tmp_path / "e_imgs.tsv").write_bytes(f"1\t{encoded}\r\n\r\n2\t{encoded}\r\n".encode())
    (tmp_path / "e_texts.jsonl").write_bytes(
        '{"text_id": 1, "text": "图", "image_ids": [2]}\r\n\r\n'.encode()
    )
    evaluation = read_evaluation(str(tmp_path), "e")
    assert list(evaluation.image_bytes([1, 0])) == [b"image", b"image"]


IMAGE = base64.b64encode(b"x").decode()


@pytest.mark.parametrize(
    ("images", "texts", "expected"),
    [
        (f"1\t{IMAGE}\n1\t{IMAGE}\n", None, "e_imgs.tsv:2: image id 1 already appears in line 1"),
        (f"1\t{IMAGE}\nabc\t{IMAGE}\n", None, "e_imgs.tsv:2: the image id 'abc' is not an integer"),
        (f"{2**63}\t{IMAGE}\n", None, "does not fit into 64 bits"),
        (f"1 {IMAGE}\n", None, "e_imgs.tsv:1: expected `id<TAB>base64"),
        ("", None, "holds no images"),
        (None, "", "holds no texts"),
        (None, "{\n", "e_texts.jsonl:1: not a line of UTF-8 JSON"),
        (None, "[]\n", "e_texts.jsonl:1: expected"),
        (None, '{"text_id": 1, "text": "a"}\n', "e_texts.jsonl:1: `image_ids` is missing"),
        (None, '{"text_id": "1", "text": "a", "image_ids": [1]}\n', "text_id '1' is not"),
        (None, '{"text_id": true, "text": "a", "image_ids": [1]}\n', "text_id True is not"),
        (None, '{"text_id": 1, "text": " ", "image_ids": [1]}\n', "e_texts.jsonl:1: `text` must be"),
        (None, '{"text_id": 1, "text": "a", "image_ids": [1.5]}\n', "image_ids must be a list of integers"),
        (None, '{"text_id": 1, "text": "a", "image_ids": [5]}\n', "e_texts.jsonl:1: image_ids names 5"),
        (
            None,
            '{"text_id": 1, "text": "a", "image_ids": [1]}\n' * 2,
            "e_texts.jsonl:2: text_id 1 already appears in line 1",
        ),
    ],
)
def test_errors_name_file_and_line(
    tmp_path: Path, images: str | None, texts: str | None, expected: str
) -> None:
    good_text = json.dumps({"text_id": 1, "text": "图", "image_ids": [1]})
    (tmp_path / "e_imgs.tsv").write_text(f"1\t{IMAGE}\n" if images is None else images)
    (tmp_path / "e_texts.jsonl").write_text(good_text if texts is None else texts)
    with pytest.raises(InputError) as caught:
        read_evaluation(str(tmp_path), "e")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_broken_base64_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"e_imgs\.tsv: no such file"):
        read_evaluation(str(tmp_path), "e")
    folder = write_evaluation(tmp_path, "e", {1: b"x"}, [(1, "图", [1])])
    (tmp_path / "e_imgs.tsv").write_text("1\t???\n")
    with pytest.raises(InputError, match="image 1 is not base64"):
        list(read_evaluation(folder, "e").image_bytes([0]))


def test_an_image_has_one_limit_in_base64_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_evaluation(tmp_path, "e", {1: b"x" * 90, 2: b"x" * 900}, [(1, "图", [1])])
    monkeypatch.setattr(base64_image, "MAX_IMAGE_BASE64_BYTES", 400)
    images = read_evaluation(folder, "e").images
    assert next(iter(images.read([0]))) == b"x" * 90
    with pytest.raises(InputError, match=r"image 2 .*more than 64 MiB, the most that an image may have"):
        list(images.read([1]))
    monkeypatch.setattr(cnclip_tsv, "_MAX_LINE_BYTES", 400)
    with pytest.raises(InputError, match=r"e_imgs\.tsv:2: more than 64 MiB, the most .*leave the image out"):
        read_evaluation(folder, "e")


def test_sets_smaller_than_k_say_how_many_and_what_to_do(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path, count=9)
    with pytest.raises(
        InputError, match=r"9 images are too few for recall at 10; give .* at least 10 images"
    ):
        check_scorable(read_evaluation(folder, "small"))


def test_few_texts_are_enough_where_only_images_are_searched(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path, "e", {i: png_bytes(i) for i in range(10)}, [(1, "图", [1])])
    evaluation = read_evaluation(folder, "e")
    check_scorable(dataclasses.replace(evaluation, image_to_text=False))
    with pytest.raises(InputError, match="1 texts are too few"):
        check_scorable(evaluation)


def test_unknown_pairing_is_read_but_not_scored(tmp_path: Path) -> None:
    texts = [(i, "图", [i]) for i in range(10)] + [(10, "无", [])]
    folder = write_evaluation(tmp_path, "e", dict.fromkeys(range(10), b"x"), texts)
    evaluation = read_evaluation(folder, "e")
    with pytest.raises(InputError, match="text_id 10 names no image"):
        check_scorable(evaluation)


def test_both_alphabets_of_base64_are_read(tmp_path: Path) -> None:
    """MUGE comes in the URL-safe one, in which CN-CLIP reads."""
    folder = small_evaluation(tmp_path)
    path = tmp_path / "small_imgs.tsv"
    before = list(read_evaluation(folder, "small").image_bytes(range(12)))
    text = path.read_text()
    assert "+" in text
    assert "/" in text
    path.write_text(text.translate(str.maketrans("+/", "-_")))
    assert list(read_evaluation(folder, "small").image_bytes(range(12))) == before
