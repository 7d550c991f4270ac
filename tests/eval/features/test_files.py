"""`cnclip embed`, `convert` and `inspect` from the command line."""

import base64
import json
import os
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import ExifTags, Image

from eval.features.files import embed_files
from pipeline.cli import main
from pipeline.core.records import ConfigError, InputError
from tests.helpers.tiny_model import write_tiny_model
from training.encoder import load

TEXTS = ["红色的猫", "", "蓝色的狗" * 20]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("weights"), words="红蓝色的猫狗")[0]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, name in enumerate(("b.png", "a.png", "sub/c.jpg", "A.webp", "notes.txt")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".txt"):
            path.write_text("no image")
            continue
        pixels = np.random.default_rng(number).integers(0, 256, (30, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def test_folder_and_lines_in_clip_retrievals_layout(
    weights: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    out = tmp_path / "out"
    command = [
        "embed",
        weights,
        "--images",
        str(images),
        "--texts",
        str(tmp_path / "texts.txt"),
        "--out",
        str(out),
    ]
    assert main(command) == 0
    captured = capsys.readouterr()
    printed = captured.out
    assert re.findall(r"^(images|texts): (\d+) of \2\b", captured.err, re.MULTILINE) == [
        ("images", "4"),
        ("texts", "3"),
    ]
    assert "1 of 3 texts are truncated to 52 tokens; raise --context to keep more" in printed
    image_ND = np.load(out / "img_emb" / "img_emb_0.npy", mmap_mode="r")
    text_ND = np.load(out / "text_emb" / "text_emb_0.npy", mmap_mode="r")
    assert image_ND.dtype == text_ND.dtype == np.float32
    assert (image_ND.shape, text_ND.shape) == ((4, 32), (3, 32))
    np.testing.assert_allclose(np.linalg.norm(image_ND, axis=1), 1, atol=1e-6)
    table = pl.read_parquet(out / "metadata" / "metadata_0.parquet")
    names = [str(images / name) for name in ("A.webp", "a.png", "b.png", "sub/c.jpg")]
    assert table["image_path"].to_list() == names
    assert table["caption"].to_list() == [*TEXTS, None]
    encoder = load(weights)
    np.testing.assert_allclose(image_ND, encoder.embed_images(names), atol=1e-6)
    with pytest.warns(UserWarning, match="1 of 3"):
        np.testing.assert_allclose(text_ND, encoder.embed_texts(TEXTS), atol=1e-6)


def test_tables_of_paths_and_of_bytes(weights: str, images: Path, tmp_path: Path) -> None:
    encoder = load(weights)
    names = ["b.png", "a.png", "b.png"]
    pl.DataFrame({"image_path": names, "caption": ["猫", "狗", "红"]}).write_csv(images / "table.csv")
    data = [(images / name).read_bytes() for name in names]
    pl.DataFrame({"png": data, "image_id": [7, 8, 9], "caption": ["猫", "狗", "红"]}).write_parquet(
        tmp_path / "table.parquet"
    )
    for table, labels in ((images / "table.csv", names), (tmp_path / "table.parquet", ["7", "8", "9"])):
        out = tmp_path / f"out_{table.suffix}"
        done = embed_files(encoder, images=str(table), texts=str(table), out=str(out), context_length=52)
        assert (done.num_images, done.num_texts, done.num_truncated, done.dim) == (3, 3, 0, 32)
        image_ND = np.load(out / "img_emb" / "img_emb_0.npy")
        np.testing.assert_allclose(image_ND, encoder.embed_images(data), atol=1e-6)
        np.testing.assert_array_equal(image_ND[0], image_ND[2])
        metadata = pl.read_parquet(out / "metadata" / "metadata_0.parquet")
        assert metadata["image_path"].to_list() == labels
        assert metadata["caption"].to_list() == ["猫", "狗", "红"]


def test_cn_clips_own_tables(weights: str, images: Path, tmp_path: Path) -> None:
    """`_imgs.tsv` has no names of columns; rows stay in the order of its lines."""
    data = [(images / name).read_bytes() for name in ("b.png", "a.png", "A.webp")]
    images, texts = tmp_path / "valid_imgs.tsv", tmp_path / "valid_texts.jsonl"
    rows = zip((90, 7, 1000), data, strict=True)
    images.write_text("".join(f"{key}\t{base64.urlsafe_b64encode(png).decode()}\n" for key, png in rows))
    texts.write_text(json.dumps({"text_id": 3, "text": "红色的猫", "image_ids": [7]}) + "\n")
    encoder, out = load(weights), tmp_path / "out"
    main(["embed", weights, "--images", str(images), "--texts", str(texts), "--out", str(out)])
    np.testing.assert_allclose(
        np.load(out / "img_emb" / "img_emb_0.npy"), encoder.embed_images(data), atol=1e-6
    )
    metadata = pl.read_parquet(out / "metadata" / "metadata_0.parquet")
    assert metadata.to_dict(as_series=False) == {
        "image_path": ["90", "7", "1000"], "caption": ["红色的猫", None, None],
    }  # fmt: skip
    images.write_text(
        f"90\t{base64.b64encode(data[0]).decode()}\n7\t{base64.b64encode(b'<html>').decode()}\n"
    )
    done = embed_files(encoder, images=str(images), texts=None, out=str(out), context_length=52, redo=True)
    ((name, reason),) = done.left_out
    assert (name, reason[:13]) == (f"{images}: image 7", "not_an_image:")


def test_faiss_searches_what_was_written(weights: str, images: Path, tmp_path: Path) -> None:
    import faiss

    embed_files(load(weights), images=str(images), texts=None, out=str(tmp_path / "out"), context_length=52)
    image_ND = np.load(tmp_path / "out" / "img_emb" / "img_emb_0.npy")
    index = faiss.IndexFlatIP(image_ND.shape[1])
    index.add(image_ND)
    _, found = index.search(image_ND, 1)
    assert found[:, 0].tolist() == list(range(len(image_ND)))
    assert not (tmp_path / "out" / "text_emb").exists()


def test_bad_input_is_one_line(
    weights: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = load(weights)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "z.png").write_bytes(b"broken")
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match=r"z\.png: no image that can be decoded"):
        embed_files(encoder, images=str(tmp_path / "bad"), texts=None, out=out, context_length=52)
    assert not (tmp_path / "out" / "img_emb" / "img_emb_0.npy").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no image in it"):
        embed_files(encoder, images=str(tmp_path / "empty"), texts=None, out=out, context_length=52)
    (tmp_path / "t.txt").write_bytes("红".encode("gbk"))
    with pytest.raises(InputError, match=r"t\.txt: not UTF-8 .* save it as UTF-8"):
        embed_files(encoder, images=None, texts=str(tmp_path / "t.txt"), out=out, context_length=52)
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"no column of images .* it has x"):
        embed_files(encoder, images=str(tmp_path / "x.parquet"), texts=None, out=out, context_length=52)
    assert main(["embed", weights, "--out", out]) == 2
    assert main(["embed", weights, "--texts", str(tmp_path / "t.txt"), "--out", out, "--context", "65"]) == 2
    assert main(["embed", str(tmp_path / "absent.pt"), "--texts", "t.txt", "--out", out]) == 1
    (tmp_path / "page.pt").write_text("<html></html>")
    assert main(["inspect", str(tmp_path / "page.pt")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert "--context 65" in lines[1]
    assert "takes 3 to 64 tokens" in lines[1]
    assert lines[2].endswith("absent.pt: no such file or folder: give the path of weights")
    assert "a web page" in lines[3]


def test_convert_and_inspect_commands(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", weights, str(tmp_path / "out.pt")]) == 0
    assert main(["inspect", str(tmp_path / "out.pt")]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path}/out.pt" in printed
    assert "Chinese CLIP, torch.save" in printed
    assert main(["convert", str(tmp_path / "out.pt"), str(tmp_path / "folder"), "--to", "safetensors"]) == 0
    assert (tmp_path / "folder" / "README.md").exists()


def test_images_that_cannot_be_read_have_no_row_and_are_listed(
    weights: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:200])
    os.mkfifo(images / "p.jpg")
    (images / "zero.jpg").symlink_to("/dev/zero")
    (images / "._a.png").write_bytes(b"\0\5\x16\7")
    out = tmp_path / "out"
    assert main(["embed", weights, "--images", str(images), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "1 images cannot be decoded and have no row" in printed
    listed = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    reasons = {item["image"].removeprefix(f"{images}/"): item["reason"] for item in listed}
    assert reasons.pop("cut.png").startswith("truncated: ")
    assert reasons == {
        "p.jpg": "no_file: a FIFO",
        "zero.jpg": "no_file: a device",
        "._a.png": "hidden",
        f"{images}: 1 files with the ending .txt": "no image by its name",
    }
    names = pl.read_parquet(out / "metadata" / "metadata_0.parquet")["image_path"].to_list()
    assert names == [str(images / name) for name in ("A.webp", "a.png", "b.png", "sub/c.jpg")]
    image_ND = np.load(out / "img_emb" / "img_emb_0.npy", mmap_mode="r")
    np.testing.assert_allclose(image_ND, load(weights).embed_images(names), atol=1e-6)


def test_a_pair_whose_image_cannot_be_read_goes_as_one(weights: str, images: Path, tmp_path: Path) -> None:
    names, captions = ["b.png", "absent.png", "a.png"], ["猫", "狗", "红"]
    pl.DataFrame({"image_path": names, "caption": captions}).write_csv(images / "table.csv")
    table, out, encoder = str(images / "table.csv"), str(tmp_path / "out"), load(weights)
    done = embed_files(encoder, images=table, texts=table, out=out, context_length=52)
    assert (done.num_images, done.num_texts, done.num_texts_left_out) == (2, 2, 1)
    metadata = pl.read_parquet(tmp_path / "out" / "metadata" / "metadata_0.parquet")
    assert metadata.rows() == [("b.png", "猫"), ("a.png", "红")]
    assert "no_file: no such file" in (tmp_path / "out" / "left_out.jsonl").read_text()
    pl.DataFrame({"image_path": names[:1], "caption": captions[:1]}).write_csv(images / "table.csv")
    with pytest.raises(ConfigError, match=r"other images, 'a\.png' among them; give another"):
        embed_files(encoder, images=table, texts=table, out=out, context_length=52)
    embed_files(encoder, images=table, texts=table, out=out, context_length=52, redo=True)
    assert not (tmp_path / "out" / "left_out.jsonl").exists()
    pl.DataFrame({"image_path": names[::2], "caption": captions[::2]}).write_csv(images / "table.csv")
    assert embed_files(encoder, images=table, texts=table, out=out, context_length=52).num_images == 2
    with pytest.raises(ConfigError, match="of other images"):
        embed_files(encoder, images=None, texts=table, out=out, context_length=52)
    (tmp_path / "out" / "metadata" / "metadata_0.parquet").unlink()  # as a kill leaves it
    embed_files(encoder, images=table, texts=table, out=out, context_length=52)
    (tmp_path / "out" / "img_emb" / "img_emb_1.npy").touch()
    with pytest.raises(ConfigError, match="features of several files"):
        embed_files(encoder, images=table, texts=table, out=out, context_length=52)
    encoder.decode = "reference"
    with pytest.raises(ConfigError, match=r"holds features of .* with --decode upright; give another --out"):
        embed_files(encoder, images=table, texts=table, out=out, context_length=52)
    (tmp_path / "out" / "model.json").unlink()
    with pytest.raises(ConfigError, match="features of an unknown model"):
        embed_files(encoder, images=table, texts=table, out=out, context_length=52)


def test_decoding_is_chosen_and_noted(weights: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save(tmp_path / "images" / "turned.png", exif=exif)
    features = {}
    for decode in ("upright", "reference"):
        out = tmp_path / decode
        command = [
            "embed",
            weights,
            "--images",
            str(tmp_path / "images"),
            "--out",
            str(out),
            "--decode",
            decode,
        ]
        assert main(command) == 0
        features[decode] = np.load(out / "img_emb" / "img_emb_0.npy")[0]
        assert json.loads((out / "model.json").read_text())["decode"] == decode
    plain, turned = Image.fromarray(pixels), Image.fromarray(np.rot90(pixels, -1))
    expected = load(weights).embed_images([turned, plain])
    np.testing.assert_allclose(features["upright"], expected[0], atol=1e-6)
    np.testing.assert_allclose(features["reference"], expected[1], atol=1e-6)
