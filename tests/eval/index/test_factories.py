"""Every family of FAISS's factory strings ranks by inner product, best first, or is refused in one line."""

from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from eval.index.bench.points import settings
from eval.index.build import new_index, try_factory
from eval.index.embeddings import Embeddings
from eval.index.flat import build_index, read_index, search
from eval.index.order import why_out_of_order
from eval.index.partitioned import PartedIndex, build_parts
from eval.index.structure import num_lists, quantised_bits
from eval.index.tuning.parameters import set_parameters
from pipeline import cli as command_line
from pipeline.core.records import ConfigError, InputError

DIM, ROWS = 16, 600

# Factory string and the least share of rows that must find themselves among five.
RIGHT = {
    "Flat": 1.0,
    "HNSW": 1.0,
    "HNSW16": 1.0,
    "HNSW16,Flat": 1.0,
    "HNSW16_SQ8": 1.0,
    "HNSW16,SQfp16": 1.0,
    "NSG16": 1.0,
    "NSG16,SQ8": 1.0,
    "SQ8": 1.0,
    "SQ6": 1.0,
    "SQ4": 1.0,
    "SQfp16": 1.0,
    "SQbf16": 1.0,
    "PQ8x4": 0.9,
    "PQ8x4np": 0.9,
    "PQ8x4fs": 0.9,
    "PQ4x6": 0.7,
    "OPQ8,PQ8x4": 0.9,
    "OPQ8_8,PQ8x4": 0.7,
    "RaBitQ": 0.9,
    "RaBitQ4": 1.0,
    "RaBitQfs": 0.9,
    "RR,RaBitQ": 0.9,
    "RQ4x4": 0.7,
    "LSQ4x4": 0.7,
    "PRQ2x2x4": 0.5,
    "PLSQ2x2x4": 0.7,
    "RQ4x4fs": 0.7,
    "LSQ4x4fs": 0.7,
    "PRQ2x2x4fs": 0.5,
    "RQ4x4_Nfloat": 0.7,
    "RQ4x4_Nqint8": 0.7,
    "IVF8,Flat": 1.0,
    "IVF8,FlatDedup": 1.0,
    "IVF8,FlatPanorama4": 1.0,
    "IVF8,SQ8": 1.0,
    "IVF8,SQ4": 1.0,
    "IVF8,SQfp16": 1.0,
    "IVF8,PQ8x4": 0.9,
    "IVF8,PQ8x4np": 0.9,
    "IVF8,PQ8x4fs": 0.9,
    "IVF8,PQ8x4fsr": 0.9,
    "IVF8,RaBitQ": 0.9,
    "IVF8,RaBitQfs": 0.9,
    "IVF8,RQ4x4": 0.7,
    "IVF8,LSQ4x4": 0.7,
    "IVF8,RQ4x4fs": 0.7,
    "IVF8,PRQ2x2x4fs": 0.7,
    "IVF8_HNSW16,Flat": 1.0,
    "OPQ8,IVF8,PQ8x4fs": 0.9,
    "IVF8,PQ8x4,RFlat": 0.95,
    "IVF8,PQ8x4,Refine(SQ8)": 0.95,
    "IVF8,PQ8x4fs,RFlat": 0.95,
    "PQ8x4,RFlat": 1.0,
    "HNSW16_SQ8,RFlat": 1.0,
    "LSH,RFlat": 1.0,
    "LSH64r,RFlat": 1.0,
    "ITQ12,LSHt,RFlat": 1.0,
    "LSHr,Refine(SQ8)": 1.0,
    "RR12,Flat": 0.9,
    "Pad32,Flat": 1.0,
    "L2norm,Flat": 1.0,
    "L2norm,IVF8,SQ8": 1.0,
}
REFUSED = [
    "HNSW16_PQ8x4",
    "HNSW16,PQ8x4",
    "HNSW16,PQ8x4,RFlat",
    "PCA12,HNSW16_PQ4x4",
    "HNSW16_8+PQ4",
    "HNSW16_2x4+PQ4",
    "NSG16,PQ8x4",
    "IDMap,Flat",
    "IDMap2,Flat",
    "Flat,IDMap",
    "IVF8,Flat,IDMap2",
    "IDMap,HNSW16",
    "PCA12,Flat",
    "PCAR12,IVF8,Flat",
    "PCA12,SQ8",
    "PCA12,L2norm,Flat",
    "PCA24,Flat",
    "ITQ24,Flat",
    "PCAW12,Flat",
    "PCAWR12,IVF8,Flat",
    "ITQ,LSH",
    "ITQ12,LSHt",
    "LSH",
    "LSHr",
    "IVF8,ITQ,SH",
    "SQ8_direct",
    "SQ8_direct_signed",
    "IMI2x3,Flat",
    "IMI2x3,PQ4x4",
    "Residual2x4,PQ4x4",
    "ZnLattice2x4_2",
    "MinMax,SQ8",
    "MinMaxFP16,SQ8",
    "BFlat",
    "BIVF8",
    "BHNSW16",
    "IVF16k,Flat",
    "IVF99999999999999999999,Flat",
    "PQ7",
    "PQ8x25",
    "Flat,Flat,Flat",
    "",
    "Nonsense",
]


@pytest.fixture(scope="module")
def rows() -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, DIM))
    found = centres[rng.integers(30, size=ROWS)] + 0.7 * rng.normal(size=(ROWS, DIM))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def features(rows: npt.NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("features") / "rows.npy"
    np.save(path, rows)
    return str(path)


@pytest.mark.parametrize("factory", RIGHT)
def test_a_factory_finds_rows_by_inner_product(
    factory: str, rows: npt.NDArray[np.float32], features: str, tmp_path: Path
) -> None:
    build_parts(Embeddings.open(features), str(tmp_path), factory=factory, rows_per_part=350, train_rows=ROWS)
    scores_QK, rows_QK = PartedIndex.open(str(tmp_path)).search(rows[::6], 5)
    found = (rows_QK == np.arange(0, ROWS, 6)[:, None]).any(axis=1).mean()
    assert found >= RIGHT[factory]
    assert (np.diff(scores_QK, axis=1) <= 0).all()
    true_QK = np.einsum("qd,qkd->qk", rows[::6], rows[rows_QK])
    assert true_QK[:, 0].mean() > true_QK[:, -1].mean()


@pytest.mark.parametrize("factory", REFUSED)
def test_what_ranks_otherwise_is_refused_in_one_line(factory: str, features: str, tmp_path: Path) -> None:
    embeddings = Embeddings.open(features)
    with pytest.raises(InputError) as caught:
        build_parts(embeddings, str(tmp_path), factory=factory, rows_per_part=350, train_rows=ROWS)
    assert repr(factory) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trained.index").exists()
    with pytest.raises(InputError) as caught:
        build_index(features, str(tmp_path / "one.index"), factory=factory)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "one.index").exists()


def test_bits_of_lsh_choose_rows_for_cosines(
    rows: npt.NDArray[np.float32], features: str, tmp_path: Path
) -> None:
    folder, embeddings = str(tmp_path / "index"), Embeddings.open(features)
    index = build_parts(embeddings, folder, factory="LSH64r,RFlat", rows_per_part=350, train_rows=ROWS)
    found = [index.search(rows[:9], 5, parameters=f"k_factor_rf={times}") for times in (1, 1024)]
    cosines = np.sort(rows[:9] @ rows.T, axis=1)[:, ::-1][:, :5]
    assert np.allclose(found[1][0], cosines, atol=1e-5)
    assert (found[0][0] <= found[1][0] + 1e-6).all()
    assert settings("LSH64r,RFlat", DIM, ROWS)[-1] == "k_factor_rf=1024"
    build_index(features, str(tmp_path / "one.index"), factory="LSH64r,RFlat")
    assert np.allclose(search(read_index(str(tmp_path / "one.index")), rows[:9], 1)[0], 1, atol=1e-5)
    with pytest.raises(InputError, match="FAISS cannot filter a search of IndexLSH"):
        index.search(rows[:1], 1, rows=[3])
    with pytest.raises(InputError, match="have no radius in scores; search for the k nearest"):
        list(index.search_range(rows[:1], 0.5))
    with pytest.raises(InputError, match="LSH ranks unit vectors only; leave --centre out"):
        build_parts(
            embeddings, folder, factory="LSH,RFlat", rows_per_part=9, train_rows=9, redo=True, centre=True
        )
    with pytest.raises(InputError, match="not inner products; use --metric cosine"):
        new_index(DIM, "LSH,RFlat", "ip")


def test_the_worst_first_is_seen_whatever_an_index_says_of_itself(rows: npt.NDArray[np.float32]) -> None:
    """Scores of inner products that are ranked as if they were distances, and scores of another scale."""

    class Reversed:
        ntotal, metric_type = ROWS, faiss.METRIC_INNER_PRODUCT

        def search(self, queries: npt.NDArray[np.float32], k: int) -> tuple[object, object]:
            scores = queries @ rows.T
            order = np.argsort(scores, axis=1)[:, :k]
            return np.take_along_axis(scores, order, axis=1), order

    class Negated(Reversed):
        def search(self, queries: npt.NDArray[np.float32], k: int) -> tuple[object, object]:
            scores, order = super().search(queries, k)
            return -np.asarray(scores), order

    class Scaled(Reversed):
        def search(self, queries: npt.NDArray[np.float32], k: int) -> tuple[object, object]:
            scores = queries @ rows.T
            order = np.argsort(-scores, axis=1)[:, :k]
            return 100 * np.take_along_axis(scores, order, axis=1), order

    def reason(index: object) -> str:
        return str(why_out_of_order(index, rows[:50], rows.mean(axis=0), lambda ids: rows[ids]))

    assert "the worst comes first" in reason(Reversed())
    assert "of the way from random rows" in reason(Negated())
    assert "off the exact ones" in reason(Scaled())
    flat = faiss.IndexFlatIP(DIM)
    flat.add(rows)
    assert reason(flat) == "None"


def test_lists_are_counted_in_the_index_and_not_in_its_name() -> None:
    for factory, count in (
        ("IVF64_HNSW32,Flat", 64),
        ("IVF16k,Flat", 16_384),
        ("OPQ8,IVF32,PQ8x4", 32),
        ("IVF8(PQ4x4),Flat", 8),
        ("RR8,IVF128,SQ8,RFlat", 128),
        ("HNSW32", None),
    ):
        assert num_lists(new_index(DIM, factory)) == count, factory
    assert settings("IVF64_HNSW32,Flat", DIM, ROWS)[-1] == "quantizer_efSearch=256,nprobe=64"
    assert settings("IVF16k,Flat", DIM, ROWS)[-1] == "nprobe=16384"
    efforts = ["efSearch=16", "efSearch=64", "efSearch=256", "efSearch=1024", "efSearch=2048"]
    assert settings("HNSW32", DIM, 10**6) == efforts
    assert settings("NSG32", DIM, 100) == ["search_L=16", "search_L=64", "search_L=100"]
    refined = ["k_factor_rf=1", "k_factor_rf=4", "k_factor_rf=16", "k_factor_rf=64"]
    assert settings("PQ8x4,RFlat", DIM, ROWS) == refined
    bits = [f"qb={bits},{setting}" for bits in (4, 8) for setting in refined]
    assert settings("RaBitQ,RFlat", DIM, ROWS) == bits
    assert settings("IVF8,RaBitQ4", DIM, ROWS)[-1] == "qb=8,nprobe=8"
    assert settings("RaBitQfs", DIM, ROWS) == [""]  # the fast scan takes no other number


def test_bits_of_queries_are_set_and_limited(rows: npt.NDArray[np.float32]) -> None:
    index = new_index(DIM, "RR16,IVF8,RaBitQ,RFlat")
    index.train(rows)
    index.add(rows)
    found = {}
    for bits in (1, 8):
        set_parameters(index, f"qb={bits},k_factor_rf=1,nprobe=8")
        assert quantised_bits(index) == bits
        found[bits] = (index.search(rows[:100], 1)[1][:, 0] == np.arange(100)).mean()
    assert found[8] > found[1]
    with pytest.raises(ConfigError, match="qb=9: 0 to 8"):
        set_parameters(index, "qb=9")
    with pytest.raises(ConfigError, match="'qb=4'"):
        set_parameters(new_index(DIM, "Flat"), "qb=4")
    assert settings("SQ8", DIM, ROWS) == [""]


def test_an_index_file_of_another_measure_is_refused(rows: npt.NDArray[np.float32], tmp_path: Path) -> None:
    other = faiss.IndexFlatL2(DIM)
    other.add(rows)
    faiss.write_index(other, str(tmp_path / "l2.index"))
    with pytest.raises(InputError, match=r"l2\.index: IndexFlatL2 ranks by L2 distance, not by"):
        read_index(str(tmp_path / "l2.index"))


def test_bench_index_leaves_out_what_ranks_otherwise(
    features: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench-index", features, "--num-queries", "50", "--grid", "SQ8;HNSW16_PQ8x4;IDMap,Flat"]
    words += ["--rounds", "2"]
    assert command_line.main(words) == 0
    printed = capsys.readouterr()
    assert "left out: FAISS's factory 'HNSW16_PQ8x4': IndexHNSWPQ ranks by L2 distance" in printed.err
    assert "left out: FAISS's factory 'IDMap,Flat': IndexIDMap keeps separate ids" in printed.err
    assert "HNSW16_PQ8x4" not in printed.out
    assert "SQ8" in printed.out


def test_rows_that_are_all_alike_are_no_reason_to_refuse(rows: npt.NDArray[np.float32]) -> None:
    """A collapsed model gives one vector for everything: no row is better than another."""
    try_factory(new_index(DIM, "Flat"), "Flat", np.repeat(rows[:1], 50, axis=0))
    try_factory(new_index(DIM, "HNSW16"), "HNSW16", rows[:1])
