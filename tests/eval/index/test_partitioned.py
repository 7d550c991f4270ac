"""Indices in parts: the same answers as one index, resumed, refused."""

import os
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from eval.index.partitioned import Embeddings, PartedIndex, build_parts
from eval.index.truth import exact_neighbours, recall_of
from pipeline import cli as command_line
from pipeline.core.records import ConfigError, InputError

DIM = 32


def unit_rows(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, DIM))
    rows = centres[rng.integers(40, size=count)] + 0.5 * rng.normal(size=(count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """clip-retrieval's layout: 3,000 rows in 11 files, so that names must be ordered by number."""
    rows = unit_rows(3000)
    (tmp_path / "features" / "img_emb").mkdir(parents=True)
    for number, part in enumerate(np.array_split(rows, 11)):
        np.save(tmp_path / "features" / "img_emb" / f"img_emb_{number}.npy", part)
    return tmp_path


def build(folder: Path, **settings: object) -> PartedIndex:
    options = {"factory": "Flat", "rows_per_part": 700, "train_rows": 2000} | settings
    embeddings = Embeddings.open(str(folder / "features"))
    return build_parts(embeddings, str(folder / "index"), **options)  # type: ignore[arg-type]


def test_rows_and_blocks_are_those_of_the_whole(folder: Path) -> None:
    embeddings = Embeddings.open(str(folder / "features"))
    assert (embeddings.num_rows, embeddings.dim, len(embeddings.paths)) == (3000, DIM, 11)
    assert np.array_equal(np.concatenate(list(embeddings.blocks(250, 2900))), unit_rows(3000)[250:2900])
    wanted = np.array([0, 272, 273, 2999])
    assert np.array_equal(embeddings.rows(wanted), unit_rows(3000)[wanted])


def test_parts_answer_as_exact_search_does(folder: Path) -> None:
    index = build(folder)
    assert [part.first_row for part in index.parts] == [0, 700, 1400, 2100, 2800]
    queries = unit_rows(50, seed=1)
    scores, rows = PartedIndex.open(str(folder / "index")).search(queries, 10)
    expected = np.argsort(-(queries @ unit_rows(3000).T), axis=1, kind="stable")[:, :10]
    assert np.array_equal(rows, expected)
    assert np.abs(scores - np.take_along_axis(queries @ unit_rows(3000).T, rows, axis=1)).max() < 1e-5
    assert index.bytes_per_vector == pytest.approx(4 * DIM, rel=0.05)


@pytest.mark.parametrize(
    "factory",
    [
        "IVF16,Flat",
        "IVF16,PQ8x4",
        pytest.param("OPQ8,IVF16,PQ8x4", marks=pytest.mark.slow),
        "HNSW16",
        "SQ8",
        "IVF16,RaBitQ",
    ],
)
def test_parts_find_what_the_one_index_finds(folder: Path, factory: str) -> None:
    parameters = "nprobe=16" if "IVF" in factory else ""
    in_parts = build(folder, factory=factory)
    queries = unit_rows(50, seed=1)
    embeddings = Embeddings.open(str(folder / "features"))
    exact = exact_neighbours(embeddings, queries, 10)
    whole = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    if not whole.is_trained:
        whole.train(unit_rows(3000))
    whole.add(unit_rows(3000))
    if parameters:
        faiss.ParameterSpace().set_index_parameters(whole, parameters)
    recall = recall_of(embeddings, queries, whole.search(queries, 10)[1], exact).strict
    parted = in_parts.search(queries, 10, parameters=parameters)[1]
    assert recall_of(embeddings, queries, parted, exact).strict > recall - 0.1


def test_a_killed_build_goes_on_and_gives_the_same_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faiss.omp_set_num_threads(1)
    build(folder, factory="IVF16,PQ8x4")
    whole = {path.name: path.read_bytes() for path in (folder / "index").rglob("*") if path.is_file()}
    for name in ("index.json", "parts/00003.index", "parts/00004.index"):
        (folder / "index" / name).unlink()
    kept = (folder / "index" / "parts" / "00000.index").stat().st_mtime_ns
    with pytest.raises(InputError, match="go"):
        PartedIndex.open(str(folder / "index"))
    build(folder, factory="IVF16,PQ8x4")
    assert (folder / "index" / "parts" / "00000.index").stat().st_mtime_ns == kept
    again = {path.name: path.read_bytes() for path in (folder / "index").rglob("*") if path.is_file()}
    assert again == whole


def test_other_settings_or_embeddings_need_redo(folder: Path) -> None:
    build(folder)
    with pytest.raises(ConfigError, match="give --redo"):
        build(folder, factory="SQ8")
    assert build(folder, factory="SQ8", redo=True).factory == "SQ8"
    np.save(folder / "features" / "img_emb" / "img_emb_10.npy", unit_rows(5, seed=9))
    with pytest.raises(ConfigError, match="other embeddings"):
        build(folder, factory="SQ8")


def test_float16_is_read_and_brought_to_unit_length(folder: Path) -> None:
    for path in (folder / "features" / "img_emb").iterdir():
        np.save(path, np.load(path).astype(np.float16))
    _, rows = build(folder).search(unit_rows(3000)[:40], 1)
    assert rows[:, 0].tolist() == list(range(40))


def test_bad_input_is_one_line(folder: Path) -> None:
    build(folder)
    index = PartedIndex.open(str(folder / "index"))
    with pytest.raises(InputError, match="it belongs to another model"):
        index.search(np.ones((1, DIM + 1), dtype=np.float32), 3)
    with pytest.raises(InputError, match="k = 3001, but the index holds 3000"):
        index.search(unit_rows(1), 3001)
    with pytest.raises(ConfigError, match="search parameters 'nprobe=4'"):
        index.search(unit_rows(1), 3, parameters="nprobe=4")
    os.truncate(folder / "index" / "parts" / "00001.index", 100)
    with pytest.raises(InputError, match=r"00001.index: not a readable FAISS index"):
        index.search(unit_rows(1), 3)
    with pytest.raises(InputError, match="FAISS refuses the index 'Flatt'"):
        build(folder, factory="Flatt", redo=True)
    bad = unit_rows(10)
    bad[4] = np.nan
    np.save(folder / "features" / "img_emb" / "img_emb_0.npy", bad)
    with pytest.raises(InputError, match=r"img_emb_0.npy: 1 of 10 features are NaN .* row 4"):
        build(folder, redo=True)
    np.save(folder / "features" / "img_emb" / "img_emb_3.npy", np.ones((3, DIM + 1), dtype=np.float32))
    with pytest.raises(InputError, match=r"img_emb_3.npy: features of width 33, but .* has 32"):
        Embeddings.open(str(folder / "features"))
    rows = np.zeros((400, DIM), dtype=np.float32)
    rows[:, 0] = 1
    rows[300] *= 2
    np.save(folder / "long.npy", rows)
    sampled = Embeddings.open(str(folder / "long.npy"))
    with pytest.raises(InputError, match=r"long.npy: row 300 has norm 2.0000; .*give --metric cosine"):
        sampled.rows(np.arange(0, 400, 100))  # the row's number in the file, not among those read
    with pytest.raises(InputError, match=r"nowhere: no such file or folder"):
        Embeddings.open(str(folder / "nowhere"))


def test_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features, out = str(folder / "features"), str(folder / "out")
    assert command_line.main(["index", features, out, "--rows-per-part", "2000"]) == 0
    captured = capsys.readouterr()
    assert "Flat, 3,000 rows of width 32 in 2 parts" in captured.out
    assert "index: 3,000 of 3,000" in captured.err
    assert command_line.main(["index", features, out, "--rows-per-part", "2000", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
