"""The corpora that the experiments on open questions plant."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.training.findings import balancing, filter_strength


def write_style(folder: Path, style: str, names: list[str]) -> None:
    columns = {
        "name_zh": names,
        "name_en": [f"{name} in English" for name in names],
        "keywords_zh": [[f"{name}1"] for name in names],
        "keywords_en": [[f"{name}2"] for name in names],
        "category_en": ["smileys"] * len(names),
        "png": [f"{style}/{name}".encode() for name in names],
    }
    pq.write_table(pa.table(columns), folder / f"{style}.parquet")


def read_names(folder: Path, styles: tuple[str, ...]) -> list[str]:
    return [
        name for style in styles for name in pq.read_table(folder / f"{style}.parquet")["name_zh"].to_pylist()
    ]


def test_zipf_and_uniform_have_as_many_pairs_of_the_same_concepts(tmp_path: Path) -> None:
    names = [f"物{number:04d}" for number in range(1200)]
    for style in (*balancing.STYLES, balancing.SCORED):
        write_style(tmp_path, style, names)
    sizes = balancing.write_corpora(tmp_path, tmp_path / "out")
    zipf, uniform = (read_names(tmp_path / "out" / name, balancing.STYLES) for name in ("zipf", "uniform"))
    assert len(zipf) == len(uniform)
    assert set(zipf) == set(uniform) == set(names)
    counts = [zipf.count(name) for name in names]
    assert sorted(set(counts)) == [1, 2, 3, 4, 5, 6]
    assert max(uniform.count(name) for name in names) - min(uniform.count(name) for name in names) == 1
    assert sizes["rare"] == counts.count(1)
    assert sizes["frequent"] == counts.count(6)
    assert set(read_names(tmp_path / "out" / "zipf", ("rare",))) == {
        name for name, count in zip(names, counts, strict=True) if count == 1
    }


def test_half_of_the_pool_has_the_captions_of_another_image(tmp_path: Path) -> None:
    names = [f"物{number}" for number in range(10)]
    for style in (*filter_strength.POOL, *filter_strength.SCORED):
        write_style(tmp_path, style, names)
    bad = filter_strength.write_pool(tmp_path, tmp_path / "out")
    assert len(bad) == 5 * len(filter_strength.POOL)
    for style in filter_strength.POOL:
        pool, good = (
            pq.read_table(tmp_path / "out" / name / f"{style}.parquet") for name in ("pool", "good")
        )
        for row, found in enumerate(pool.to_pylist()):
            true_name = found["png"].decode().removeprefix(f"{style}/")
            assert (found["name_zh"] != true_name) == ((style, f"{row:05d}") in bad)
            assert found["name_en"] == f"{found['name_zh']} in English"  # both captions moved together
        assert [row["png"].decode() for row in good.to_pylist()] == [
            f"{style}/{name}" for name in good["name_zh"].to_pylist()
        ]
        assert good.num_rows == 5
