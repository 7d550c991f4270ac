"""What a gallery is made of: an index, its metadata and its images, which must belong together."""

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from eval.index.partitioned import Embeddings, build_parts
from eval.serve.gallery import EvaluationImages, FileImages, Gallery, open_gallery
from eval.serve.server import Searcher, SearchServer
from pipeline import cli as command_line
from pipeline.core.records import ConfigError, InputError
from tests.helpers.evaluation_files import png_bytes, write_evaluation
from tests.helpers.search_site import NUM_IMAGES, NUM_SAMPLES, Site, key_of


def test_what_does_not_belong_together_is_refused(site: Site, tmp_path: Path) -> None:
    shards = {"embeddings_folder": site.features_of_shards, "run_folder": site.checkpoint.run_folder}
    with pytest.raises(InputError, match=r"holds no metadata_0\.parquet; give --embeddings"):
        open_gallery(site.index_of_shards, run_folder=site.checkpoint.run_folder)
    with pytest.raises(InputError, match=r"index\.json: no such file"):
        open_gallery(str(tmp_path), **shards)
    with pytest.raises(ConfigError, match="give --images FOLDER"):
        open_gallery(site.index_of_shards, embeddings_folder=site.features_of_shards)
    with pytest.raises(InputError, match="holds no shards"):
        open_gallery(site.index_of_shards, **shards, images_folder=str(tmp_path))

    (tmp_path / "metadata").mkdir()
    metadata = tmp_path / "metadata" / "metadata_0.parquet"
    pl.DataFrame({"path": ["/etc/passwd"] * NUM_SAMPLES}).write_parquet(metadata)
    with pytest.raises(
        InputError, match="has no column key or image_id or image_path to find images by; found: path"
    ):
        open_gallery(site.index_of_shards, embeddings_folder=str(tmp_path), run_folder="run")
    pl.DataFrame({"key": ["other"] * NUM_SAMPLES}).write_parquet(metadata)
    with pytest.raises(InputError, match="none of the index's 14 keys is in these shards"):
        open_gallery(site.index_of_shards, **{**shards, "embeddings_folder": str(tmp_path)})
    pl.DataFrame({"key": [key_of(1)] * 3}).write_parquet(metadata)
    with pytest.raises(InputError, match="holds 14 rows, but the metadata has 3"):
        open_gallery(site.index_of_shards, **{**shards, "embeddings_folder": str(tmp_path)})

    with pytest.raises(ConfigError, match="search parameters 'nprobe=4'"):
        open_gallery(site.index_of_shards, **shards, parameters="nprobe=4")
    shutil.copytree(site.index_of_shards, tmp_path / "index")
    part = tmp_path / "index" / "parts" / "00001.index"
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(InputError, match=r"00001\.index: not a readable FAISS index"):
        open_gallery(str(tmp_path / "index"), **shards)

    images = site.galleries[0].images
    narrow = Gallery("narrow", 5, NUM_IMAGES, images, site.galleries[0].search)
    with pytest.raises(InputError, match="narrow: an index of width 5, but tiny-vit gives"):
        Searcher(site.encoder, [narrow])
    with pytest.raises(ConfigError, match="give another --host or --port"):
        SearchServer(Searcher(site.encoder, site.galleries), port=site.server.server_port)


def test_ids_that_fit_two_sets_are_asked_about(site: Site, tmp_path: Path) -> None:
    images = {100 + row: png_bytes(row) for row in range(NUM_IMAGES)}
    for name in ("one", "two"):
        write_evaluation(tmp_path / "sets" / name, name, images, [(0, "图", [100])])
    write_evaluation(tmp_path / "sets" / "more", "more", {**images, 1: png_bytes(99)}, [(0, "图", [100])])
    features = str(site.folder / "run" / "embed" / "small" / "stage1")
    build_parts(
        Embeddings.open(features), str(tmp_path / "index"), factory="HNSW8", rows_per_part=100, train_rows=12
    )
    where = {"embeddings_folder": features, "images_folder": str(tmp_path / "sets")}
    with pytest.raises(ConfigError, match="fit one, two equally"):
        open_gallery(str(tmp_path / "index"), **where)
    shutil.rmtree(tmp_path / "sets" / "two")
    gallery = open_gallery(str(tmp_path / "index"), **where)
    assert isinstance(gallery.images, EvaluationImages)
    assert gallery.images.evaluation.name == "one"
    assert gallery.nearest(np.load(f"{features}/img_emb/img_emb_0.npy")[4], 3).pairs[0][0] == 4


def test_rows_that_an_index_does_not_find_are_left_out(site: Site) -> None:
    rows, scores = np.array([[3, -1, -1]]), np.array([[0.5, -np.inf, -np.inf]])
    gallery = Gallery("ivf", 32, 12, site.galleries[0].images, lambda query, k: (scores, rows))
    assert gallery.nearest(np.zeros(32, dtype=np.float32), 3).pairs == [(3, 0.5)]


def test_an_index_over_files_shows_them(site: Site, tmp_path: Path) -> None:
    """What `cnclip embed --images` wrote, with more texts than images; one file is gone meanwhile."""
    for row in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{row}.png").write_bytes(png_bytes(row))
    captions = [f"第{row}张图片" for row in range(6)]
    (tmp_path / "captions.txt").write_text("\n".join(captions), encoding="utf-8")
    model = [site.checkpoint.path, "--vocab", str(site.checkpoint.vocabulary)]
    features, index = str(tmp_path / "features"), str(tmp_path / "index")
    inputs = ["--images", str(tmp_path / "images"), "--texts", str(tmp_path / "captions.txt")]
    assert command_line.main(["embed", *model, *inputs, "--out", features]) == 0
    assert command_line.main(["index", features, index]) == 0
    gallery = open_gallery(index, embeddings_folder=features, images_folder=str(tmp_path / "images"))
    assert gallery.num_rows == 4
    elsewhere = open_gallery(index, embeddings_folder=features, images_folder=str(tmp_path / "index"))
    with pytest.raises(InputError, match=r"0\.png: lies outside"):
        elsewhere.images.read(0)
    query = site.encoder.image(png_bytes(2))
    (row, score), *_ = gallery.nearest(query, 4).pairs
    assert (row, round(score, 4)) == (2, 1.0)
    assert gallery.images.describe(2).captions == (captions[2],)
    assert gallery.images.describe(2).source == "2.png"
    assert gallery.images.read(2) == png_bytes(2)
    (tmp_path / "images" / "3.png").unlink()
    with pytest.raises(InputError, match=r"3\.png: cannot be read"):
        gallery.images.read(3)


@pytest.mark.parametrize(
    ("images", "captions", "shown"),
    [
        (["a.jpg", "b.jpg", "c.jpg"], ["甲", "乙", "丙"], True),
        (["a.jpg", "b.jpg", "c.jpg"], ["甲", None, "丙"], True),  # one image has no caption
        (["a.jpg", "b.jpg", "c.jpg"], ["甲", None, None], False),  # a text, but no caption
        (["a.jpg", None, None], ["甲", "乙", "丙"], False),
    ],
)
def test_texts_that_were_embedded_with_images_are_no_captions(
    images: list[str | None], captions: list[str | None], shown: bool, tmp_path: Path
) -> None:
    (tmp_path / "metadata").mkdir()
    table = pl.DataFrame({"image_path": images, "caption": captions})
    table.write_parquet(tmp_path / "metadata" / "metadata_0.parquet")
    found = FileImages.of(str(tmp_path), str(tmp_path))
    assert found.describe(0).captions == (("甲",) if shown else ("",))
