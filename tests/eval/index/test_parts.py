"""Indices in parts that stay open, are filtered, extended and pruned, and range search."""

import json
import shutil
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest

import cnclip
from eval.index import partitioned
from eval.index.embeddings import Embeddings
from eval.index.partitioned import PartedIndex, build_parts
from eval.index.parts import opened as opening
from eval.index.tuning.parameters import set_parameters
from pipeline import cli as command_line
from pipeline.core.records import ConfigError, InputError

DIM = 32


def unit_rows(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(40, DIM))
    rows = centres[rng.integers(40, size=count)] + 0.5 * rng.normal(size=(count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """900 rows in three files, with a table of their sources and years."""
    import polars as pl

    faiss.omp_set_num_threads(1)
    folder = tmp_path / "features"
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number in range(3):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", unit_rows(300, seed=number))
        table = {"source": ["web", "book", "web"] * 100, "year": [2000 + number] * 300}
        pl.DataFrame(table).write_parquet(folder / "metadata" / f"metadata_{number}.parquet")
    return folder


def all_rows() -> npt.NDArray[np.float32]:
    return np.concatenate([unit_rows(300, seed=number) for number in range(3)])


def built(
    features: Path, factory: str = "IVF8,Flat", rows_per_part: int = 250, **more: object
) -> PartedIndex:
    rows = Embeddings.open(str(features))
    folder = str(features.parent / "index")
    options: dict[str, object] = {"rows_per_part": rows_per_part, "train_rows": 900, **more}
    return build_parts(rows, folder, factory=factory, **options)  # type: ignore[arg-type]


def test_parts_stay_open_and_answer_as_one_index(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, loads = opening.load_index, list[str]()

    def counted(path: str, **options: object) -> object:
        loads.append(path)
        return real(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(opening, "load_index", counted)
    queries = unit_rows(20, seed=9)
    refined = ("IVF8,PQ16x4fsr,RFlat", "RR32,IVF8,PQ16x4fs,Refine(SQ8)")
    for factory in ("IVF8,Flat", "RR32,IVF8,SQ8", "IVF8,RaBitQ", "HNSW8", "SQ8", *refined):
        shutil.rmtree(features.parent / "index", ignore_errors=True)
        index = built(features, factory)
        loads.clear()
        parameters = "nprobe=3" if "IVF" in factory else ""
        parameters += ",k_factor_rf=4" if factory in refined else ""
        kept = [index.search(queries, 7, parameters=parameters) for _ in range(3)][-1]
        assert len(loads) == 4, factory
        with monkeypatch.context() as patch:
            patch.setattr(opening, "_available_bytes", lambda: 0)
            patch.setattr(opening, "_MOST_FOUND", 1)  # merge after each part
            loads.clear()
            alone = [PartedIndex.open(index.folder).search(queries, 7, parameters=parameters) for _ in "ab"]
            assert len(loads) == 8, factory
        for one in alone:
            assert np.array_equal(kept[1], one[1])
            assert np.array_equal(kept[0], one[0])
        plain = [real(f"{index.folder}/{part.path}") for part in index.parts]
        for part in plain:
            set_parameters(part, parameters)
        found = [part.search(queries, 7) for part in plain]
        scores = np.concatenate([each[0] for each in found], axis=1)
        assert np.allclose(kept[0], -np.sort(-scores, axis=1)[:, :7], atol=1e-5), factory
    first = index.search(queries, 7)[1]
    assert np.array_equal(first, index.search(queries, 7, parameters="")[1])


def test_other_parameters_do_not_stay(features: Path) -> None:
    index, queries = built(features), unit_rows(20, seed=9)
    few = index.search(queries, 5, parameters="nprobe=1")[1]
    index.search(queries, 5, parameters="nprobe=8,max_codes=3")
    assert np.array_equal(index.search(queries, 5, parameters="nprobe=1")[1], few)
    every = np.argsort(-(queries @ all_rows().T), axis=1, kind="stable")[:, :5]
    assert np.array_equal(index.search(queries, 5, parameters="nprobe=8")[1], every)


@pytest.mark.parametrize("factory", ["IVF32,Flat", "HNSW16", "IVF32,RaBitQ,RFlat", "SQ8"])
def test_filtered_searches_keep_their_recall(features: Path, factory: str) -> None:
    index = built(features, factory)
    rows, queries = all_rows(), unit_rows(30, seed=9)
    parameters = {"I": "nprobe=8", "H": "efSearch=32", "S": ""}[factory[0]]
    if "RFlat" in factory:
        parameters += ",k_factor_rf=8"

    def recall(mask: npt.NDArray[np.bool_] | None, found: npt.NDArray[np.int64], k: int) -> float:
        scores = queries @ rows.T
        if mask is not None:
            scores[:, ~mask] = -9
        exact = np.argsort(-scores, axis=1)[:, :k]
        return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(exact, found, strict=True)]))

    free = recall(None, index.search(queries, 5, parameters=parameters)[1], 5)
    for share in (0.01, 0.1, 0.5):
        mask = np.random.default_rng(3).random(len(rows)) < share
        found = index.search(queries, 5, parameters=parameters, rows=mask)[1]
        assert mask[found[found >= 0]].all()
        assert recall(mask, found, 5) > free - 0.05, share
    some = [5, 800, 3]
    assert set(np.unique(index.search(queries, 9, rows=some)[1])) <= {-1, 3, 5, 800}


def test_kinds_that_cannot_be_filtered_say_so(features: Path) -> None:
    index = built(features, "PQ8x2")
    with pytest.raises(InputError, match="cannot filter a search of IndexPQ; use an index with IVF"):
        index.search(unit_rows(2), 3, rows=[1])
    for bad, message in (([900], "row 900 is asked for"), ([[1]], "whole numbers"), ([0.5], "whole numbers")):
        with pytest.raises(InputError, match=message):
            index.search(unit_rows(2), 3, rows=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("centre", [False, True])
def test_range_search_finds_all_that_are_near(features: Path, centre: bool) -> None:
    index = cnclip.Index(built(features, centre=centre).folder)
    rows, queries = all_rows(), unit_rows(80, seed=9)
    exact = queries @ rows.T
    for number, (scores, found) in enumerate(index.search_range(queries, 0.5, parameters="nprobe=8")):
        wanted = np.flatnonzero(exact[number] >= 0.5)
        near = np.abs(exact[number] - 0.5) < 1e-5
        assert set(found) ^ set(wanted) <= set(np.flatnonzero(near))
        assert np.allclose(scores, exact[number][found], atol=1e-5)
        assert (np.diff(scores) <= 0).all()


def test_grown_features_are_appended(
    features: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(features.parent / "index")
    words = ["index", str(features), folder, "--factory", "IVF8,Flat", "--rows-per-part", "250"]
    assert command_line.main(words) == 0
    before = json.loads(Path(folder, "index.json").read_text())
    np.save(features / "img_emb" / "img_emb_3.npy", unit_rows(260, seed=3))
    assert command_line.main(words) == 2
    assert "or --append if the features have only grown" in capsys.readouterr().err
    monkeypatch.setattr(partitioned, "train", None)  # not trained again
    assert command_line.main([*words[:3], "--append"]) == 0
    assert "260 rows appended" in capsys.readouterr().out
    index = PartedIndex.open(folder)
    assert [(part.first_row, part.num_rows) for part in index.parts[-3:]] == [
        (750, 150),
        (900, 250),
        (1150, 10),
    ]
    assert [vars_of(part) for part in index.parts[:4]] == before["parts"]
    rows = np.concatenate([all_rows(), unit_rows(260, seed=3)])
    found = index.search(rows[::50], 1, parameters="nprobe=8")[1][:, 0]
    assert found.tolist() == list(range(0, 1160, 50))
    assert command_line.main([*words[:3], "--append"]) == 0
    assert "0 rows appended" in capsys.readouterr().out
    assert command_line.main(words) == 0  # an ordinary resume: everything is there
    assert PartedIndex.open(folder).parts == index.parts
    Path(folder, index.parts[4].path).unlink()
    assert command_line.main(words) == 0  # the part that is missing, where it was
    assert PartedIndex.open(folder).parts == index.parts
    np.save(features / "img_emb" / "img_emb_0.npy", unit_rows(300, seed=7))
    assert command_line.main([*words[:3], "--append"]) == 2
    assert "do not begin with the files that were indexed" in capsys.readouterr().err


def vars_of(part: object) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(part)  # type: ignore[call-overload,no-any-return]


def test_rows_are_appended_from_python(features: Path) -> None:
    index = cnclip.Index(built(features).folder)
    more = unit_rows(30, seed=5)
    index.append(more)
    assert len(index) == 930
    assert index.search(more, 1, parameters="nprobe=8")[1][:, 0].tolist() == list(range(900, 930))
    with pytest.raises(InputError, match="width 16 for cosine, but the index has width 32"):
        index.append(np.eye(16, dtype=np.float32))


def test_removed_rows_do_not_answer(features: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, rows = built(features).folder, all_rows()
    index = cnclip.Index(folder)
    index.remove([5, 6])
    index.remove(np.arange(900) == 890)
    own = index.search(rows[[5, 6, 7, 890]], 1, parameters="nprobe=8")[1][:, 0]
    assert own[2] == 7
    assert not {5, 6, 890} & set(own.tolist())
    words = [
        "prune-index",
        folder,
        "--where",
        "source = 'book' AND year = 2001",
        "--embeddings",
        str(features),
    ]
    assert command_line.main(words) == 0
    assert "103 of 900 rows do not answer" in capsys.readouterr().out
    again = cnclip.Index(folder)
    assert (len(again), again.num_removed) == (900, 103)
    assert command_line.main([*words, "--restore"]) == 0
    assert cnclip.Index(folder).num_removed == 3
    index = cnclip.Index(folder)
    index.restore([5, 6, 890])
    assert not Path(folder, "removed.npy").exists()
    with pytest.raises(InputError, match="none of its 900 rows would be left"):
        index.remove(range(900))
    index.remove([1])
    np.save(Path(folder, "removed.npy"), np.array([2]))
    with pytest.raises(InputError, match=r"removed\.npy: its bytes have changed"):
        cnclip.Index(folder)


def test_search_index_writes_a_table(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import polars as pl

    folder, queries = built(features).folder, unit_rows(3, seed=9)
    np.save(tmp_path / "queries.npy", 3 * queries)  # an index of cosines takes them at any length
    words = ["search-index", folder, str(tmp_path / "queries.npy"), "--parameters", "nprobe=8"]
    where = ["--where", "year >= 2002", "--embeddings", str(features)]
    assert command_line.main([*words, *where, "--k", "4", "--out", str(tmp_path / "found.parquet")]) == 0
    found = pl.read_parquet(tmp_path / "found.parquet")
    assert found.columns == ["query", "rank", "row", "score"]
    exact = (queries @ all_rows()[600:].T).argmax(axis=1) + 600
    assert found.filter(pl.col("rank") == 1)["row"].to_list() == exact.tolist()
    assert command_line.main([*words, "--radius", "0.6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line[0].isdigit()]) == int((queries @ all_rows().T >= 0.6).sum())
    for bad, status, message in (
        (["--where", "year >"], 2, "--where 'year >': "),
        (["--where", "year"], 2, "--where 'year': gives Int64, not true or false"),
        (["--where", "colour = 1"], 2, "the columns are source, year"),
    ):
        assert command_line.main([*words, *bad, "--embeddings", str(features)]) == status
        assert message in capsys.readouterr().err
    assert command_line.main([*words, "--where", "year > 1"]) == 2
    assert "--where needs --embeddings FOLDER" in capsys.readouterr().err


def test_an_index_as_it_is_served_is_measured(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = built(features).folder
    np.save(tmp_path / "queries.npy", unit_rows(40, seed=9))
    words = ["bench-index", str(features), "--index", folder, "--queries", str(tmp_path / "queries.npy")]
    words += ["--threads", "1", "--rounds", "3", "--out", str(tmp_path / "out")]
    assert command_line.main([*words, "--rounds", "2", "--where", "source = 'book'"]) == 0
    assert "33.3% of 900 rows may answer" in capsys.readouterr().out
    assert command_line.main(words) == 0
    measured = json.loads((tmp_path / "out" / "served.json").read_text())
    every = measured["points"][-1]
    assert (every["parameters"], every["recall"]) == ("nprobe=8", 1.0)
    assert every["cold_first_ms"] > 0
    assert every["p50_ms"] <= every["p99_ms"]
    assert every["spread"] >= 0 < every["cpu_ms"]
    assert measured["facts"]["num_parts"] == 4
    assert command_line.main([*words, "--rounds", "1"]) == 2
    assert "--rounds 1: give at least 2" in capsys.readouterr().err
    assert command_line.main([*words, "--grid", "Flat"]) == 2
    assert "--index measures the index as it is: leave --grid out" in capsys.readouterr().err
    np.save(features / "img_emb" / "img_emb_3.npy", unit_rows(5, seed=3))
    assert command_line.main(words) == 1
    assert "905 rows, but the index has 900" in capsys.readouterr().err


def test_a_sweep_ends_when_more_effort_finds_no_more(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = built(features, "IVF70,Flat").folder  # 1, 4, 16, 64 and 70 lists
    words = ["bench-index", str(features), "--index", folder, "--num-queries", "40", "--threads", "1"]
    assert command_line.main([*words, "--rounds", "2", "--out", str(tmp_path / "out")]) == 0
    assert "nprobe=16: finds no more than nprobe=4, so the sweep ends" in capsys.readouterr().err
    measured = json.loads((tmp_path / "out" / "served.json").read_text())
    assert [point["parameters"] for point in measured["points"]][-1] == "nprobe=16"


def test_append_needs_to_know_how_an_index_was_built(features: Path) -> None:
    index = built(features)
    path = Path(index.folder, "index.json")
    body = json.loads(path.read_text())
    del body["settings"]
    path.write_text(json.dumps(body))
    with pytest.raises(ConfigError, match="rerun its `cnclip index` command once"):
        cnclip.Index(index.folder).append(unit_rows(3))
    built(features)
    cnclip.Index(index.folder).append(unit_rows(3))
