"""An index is tuned to its target, remembers that, and is searched with it; targets out of reach are said."""

import json
from pathlib import Path

import faiss
import numpy as np
import pytest

import cnclip
from benchmarks.eval.clip_like import ClipLike, write
from eval.index.embeddings import Embeddings
from eval.index.partitioned import PartedIndex, build_parts
from eval.index.tuning.queries import choose_queries, own_rows
from eval.index.tuning.suggest import FAMILIES, num_lists, suggest
from eval.index.tuning.tune import Knobs, Tuning, tune
from pipeline import cli as command_line
from pipeline.core.records import ConfigError, InputError

LIKE = ClipLike(dim=32, num_clusters=60)
ROWS, TEXTS = 4000, 600


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    faiss.omp_set_num_threads(1)
    folder = tmp_path_factory.mktemp("features")
    write(folder, LIKE, ROWS, TEXTS)
    return folder


def recall_on_new_texts(index: PartedIndex, k: int = 10) -> float:
    queries_QD = LIKE.texts(1700, ROWS)[1::2]  # other texts of other images
    exact_QK = np.argsort(-(queries_QD @ LIKE.images(0, ROWS).T), axis=1)[:, :k]
    _, found_QK = index.search(queries_QD, k)
    return float(np.mean([np.isin(found, exact) for found, exact in zip(found_QK, exact_QK, strict=True)]))


@pytest.mark.parametrize("target", [0.5, 0.9, 0.99])
def test_an_index_reaches_its_target_on_new_queries(target: float, features: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "index")
    words = ["index", str(features), out, "--factory", "IVF32,Flat", "--recall", str(target)]
    assert command_line.main([*words, "--rows-per-part", "2500", "--quiet"]) == 0
    described = json.loads((tmp_path / "index" / "index.json").read_text())["search"]
    assert described["reached"]
    assert (described["num_queries"], described["num_tuned"]) == (300, 300)
    assert described["queries"].startswith("600 text features of ")
    assert "nprobe=" in described["parameters"]
    index = PartedIndex.open(out)
    assert recall_on_new_texts(index) == pytest.approx(target, abs=0.03)
    assert described["recall"] == pytest.approx(target, abs=0.03)
    assert cnclip.Index(out).recall == described["recall"]
    queries = LIKE.texts(5, ROWS)
    explicit = index.search(queries, 10, parameters=described["parameters"])[1]
    assert np.array_equal(cnclip.Index(out).search(queries)[1], explicit)


def test_a_target_out_of_reach_is_said(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "index")
    words = ["index", str(features), out, "--factory", "IVF8,PQ4x4", "--recall", "0.95", "--quiet"]
    assert command_line.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}: IVF8,PQ4x4 reaches at most recall 0.")
    assert error.count("\n") == 1
    known = PartedIndex.open(out).tuned
    assert known is not None
    assert not known.reached
    assert command_line.main(words) == 1  # what is known is said again
    with pytest.warns(UserWarning, match="reaches at most recall@10 0"):
        cnclip.Index.build(str(features), out, factory="IVF8,PQ4x4")
    capsys.readouterr()
    assert command_line.main([*words[:-2], "0.05", "--quiet"]) == 0  # another target needs no --redo
    again = PartedIndex.open(out).tuned
    assert again is not None
    assert (again.target, again.reached) == (0.05, True)


def test_an_index_without_search_is_served_as_before(features: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "index")
    build_parts(
        Embeddings.open(str(features)), out, factory="IVF32,Flat", rows_per_part=9999, train_rows=4000
    )
    assert "search" not in json.loads((tmp_path / "index" / "index.json").read_text())
    index, queries = PartedIndex.open(out), LIKE.texts(5, ROWS)
    assert index.tuned is None
    assert np.array_equal(index.search(queries, 5)[1], index.search(queries, 5, parameters="nprobe=1")[1])
    words = ["index", str(features), out, "--factory", "IVF32,Flat", "--rows-per-part", "9999"]
    assert command_line.main([*words, "--train-rows", "4000", "--quiet"]) == 0
    assert PartedIndex.open(out).tuned is not None


@pytest.mark.parametrize(
    "search", [{"parameters": 3}, {"k": True}, {"recall": 2}, {"reached": 1}, {"more": 1}, [], "nprobe=1"]
)
def test_a_wrong_description_of_the_search_is_refused(search: object, features: Path, tmp_path: Path) -> None:
    build_parts(
        Embeddings.open(str(features)), str(tmp_path), factory="Flat", rows_per_part=9999, train_rows=4000,
        tuning=Tuning(own_rows(Embeddings.open(str(features)), 10), 0.9),
    )  # fmt: skip
    fields = json.loads((tmp_path / "index.json").read_text())
    assert fields["search"]["recall"] == 1.0
    fields["search"] = fields["search"] | search if isinstance(search, dict) else search
    (tmp_path / "index.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"index\.json: not an index's description"):
        PartedIndex.open(str(tmp_path))


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [
        ("HNSW8", "efSearch=2000000000"),
        ("NSG8", f"search_L={10**30}"),
        ("IVF8,SQ8,RFlat", "k_factor_rf=1e18,nprobe=1e18"),
    ],
)
def test_parameters_in_the_description_are_limited(factory: str, parameters: str, tmp_path: Path) -> None:
    rows_ND = LIKE.images(0, 400)
    np.save(tmp_path / "rows.npy", rows_ND)
    embeddings = Embeddings.open(str(tmp_path / "rows.npy"))
    build_parts(
        embeddings, str(tmp_path / "index"), factory=factory, rows_per_part=400, train_rows=400,
        tuning=Tuning(own_rows(embeddings, 20), 0.5),
    )  # fmt: skip
    path = tmp_path / "index" / "index.json"
    fields = json.loads(path.read_text())
    fields["search"]["parameters"] = parameters
    path.write_text(json.dumps(fields))
    assert PartedIndex.open(str(tmp_path / "index")).search(rows_ND[:9], 1)[1].ravel().tolist() == [*range(9)]


def test_rows_of_the_index_do_not_find_themselves(features: Path, tmp_path: Path) -> None:
    path = str(features / "img_emb")
    embeddings = Embeddings.open(path)
    queries = choose_queries(path, embeddings, "image", 400, None)
    assert queries.are_own
    built = build_parts(
        embeddings, str(tmp_path), factory="IVF32,Flat", rows_per_part=9999, train_rows=4000,
        tuning=Tuning(queries, 0.3, k=1),
    )  # fmt: skip
    assert built.tuned is not None
    assert 0.3 - 0.1 < built.tuned.recall < 1  # a row finds itself in its own list always


def test_centred_rows_give_the_same_scores(features: Path, tmp_path: Path) -> None:
    embeddings, queries = Embeddings.open(str(features)), LIKE.texts(20, ROWS)
    settings = {"factory": "Flat", "rows_per_part": 1500, "train_rows": 4000}
    plain = build_parts(embeddings, str(tmp_path / "plain"), **settings)  # type: ignore[arg-type]
    build_parts(embeddings, str(tmp_path / "centred"), centre=True, **settings)  # type: ignore[arg-type]
    centred = PartedIndex.open(str(tmp_path / "centred"))
    (scores, rows), (expected_scores, expected) = centred.search(queries, 5), plain.search(queries, 5)
    assert np.array_equal(rows, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    np.save(tmp_path / "centred" / "centre.npy", np.zeros(32, np.float32))
    with pytest.raises(InputError, match=r"centre\.npy: its bytes have changed"):
        PartedIndex.open(str(tmp_path / "centred"))


def test_the_least_effort_is_found() -> None:
    knobs = Knobs("nprobe", 1000, ())
    asked = []

    def recall(parameters: str) -> float:
        asked.append(int(parameters.removeprefix("nprobe=")))
        return min(1.0, asked[-1] / 700)

    found = tune(knobs, recall, lambda _: 0.0, 0.5)
    assert found.is_reached
    assert 350 <= int(found.parameters.removeprefix("nprobe=")) <= 362
    assert max(asked) <= 512  # what is dear is not tried
    assert len(asked) < 20
    short = tune(knobs, lambda parameters: recall(parameters) / 2, lambda _: 0.0, 0.6)
    assert (short.is_reached, short.recall) == (False, 0.5)


def test_the_fastest_of_several_parameters_is_taken() -> None:
    knobs = Knobs("nprobe", 64, (("k_factor_rf", (1, 2, 4)),))

    def values(parameters: str) -> tuple[int, int]:
        factor, lists = (int(part.split("=")[1]) for part in parameters.split(","))
        return factor, lists

    def recall(parameters: str) -> float:
        factor, lists = values(parameters)
        return min(1, factor / 3) * min(1, lists / 32)

    def seconds(parameters: str) -> float:
        factor, lists = values(parameters)
        return lists + 30 * factor

    assert tune(knobs, recall, seconds, 0.6).parameters == "k_factor_rf=2,nprobe=29"
    assert tune(knobs, recall, lambda text: sum(values(text)), 0.6).parameters == "k_factor_rf=4,nprobe=20"


def test_suggestions_can_be_built_and_fit() -> None:
    gib = 2**30
    assert suggest(10_000, 512, gib, 0.9) == "Flat"
    assert suggest(500_000, 512, 2 * gib, 0.95) == "IVF2048,PQ256x4fsr,RFlat"
    assert suggest(500_000, 511, 2 * gib, 0.95) == "HNSW32"
    assert suggest(500_000, 512, 1.1 * gib, 0.5) == "IVF2048,Flat"  # meets it exactly, by max_codes
    assert suggest(10_000_000, 512, 30 * gib, 0.95) == "IVF8192,PQ256x4fsr,RFlat"
    assert suggest(10_000_000, 512, 30 * gib, 0.95, device="gpu") == "IVF8192,Flat"
    assert suggest(10_000_000, 512, 6.5 * gib, 0.95) == "IVF8192,PQ256x4fsr,Refine(SQ8)"
    assert suggest(10_000_000, 512, 15 * gib, 0.99) == "IVF8192,SQfp16"
    assert suggest(10_000_000, 512, 5 * gib, 0.95).endswith(",SQ8")
    for memory in (30, 11, 6, 3, 1):
        factory = suggest(10_000_000, 512, memory * gib, 0.95)
        faiss.index_factory(512, factory, faiss.METRIC_INNER_PRODUCT)
        family = next(family for family in FAMILIES if family.factory(512, 8192) == factory)
        assert family.row_bytes(512) <= memory * gib / 10_000_000
    with pytest.raises(InputError, match="the smallest codes"):
        suggest(10_000_000, 512, gib / 100, 0.9)
    with pytest.raises(InputError, match="exact search over"):
        suggest(10_000_000, 512, gib, 1.0)
    for count in (1, 39, 100, 10_000, 10_000_000):
        lists = num_lists(count)
        assert lists & (lists - 1) == 0
        assert lists == 1 or lists <= min(count / 39, 4 * count**0.5) <= 2 * lists
    assert num_lists(10_000_000, train_rows=262_144) == 4096


def test_wrong_settings_are_one_line(features: Path, tmp_path: Path) -> None:
    embeddings = Embeddings.open(str(features))
    with pytest.raises(ConfigError, match=r"--recall 1\.5: give a share"):
        Tuning(own_rows(embeddings, 10), 1.5)
    with pytest.raises(ConfigError, match="--num-queries 1: give at least 2"):
        choose_queries(str(features), embeddings, "image", 1, None)
    np.save(tmp_path / "narrow.npy", np.ones((5, 1), np.float32))
    with pytest.raises(
        InputError, match=r"narrow\.npy: queries of width 1 do not fit embeddings of width 32"
    ):
        choose_queries(str(features), embeddings, "image", 10, str(tmp_path / "narrow.npy"))


def test_centring_spends_bits_on_what_differs(tmp_path: Path) -> None:
    """Codes of one bit a dimension: without the mean, and with centroids as long as the rows' means are."""
    like = ClipLike(dim=128, num_clusters=60)
    rows_ND, queries_QD = like.images(0, 3000), like.texts(200, 3000)
    np.save(tmp_path / "rows.npy", rows_ND)
    embeddings = Embeddings.open(str(tmp_path / "rows.npy"))
    exact_QK = np.argsort(-(queries_QD @ rows_ND.T), axis=1)[:, :10]
    recall = []
    for centre in (False, True):
        built = build_parts(
            embeddings, str(tmp_path / str(centre)), factory="IVF16,RaBitQ", rows_per_part=3000,
            train_rows=3000, centre=centre,
        )  # fmt: skip
        _, found_QK = built.search(queries_QD, 10, parameters="nprobe=16")
        pairs = zip(found_QK, exact_QK, strict=True)
        recall.append(np.mean([np.isin(found, exact).mean() for found, exact in pairs]))
    assert recall[1] > recall[0] + 0.1
