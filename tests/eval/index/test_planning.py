"""`cnclip plan index`: sizes, machines and prices from a table; and energy counters."""

import json
from pathlib import Path

import pytest

from eval.index.bench.energy import Meter, counters
from eval.index.planning import Machine, plan_index
from pipeline import cli as command_line
from pipeline.core.records import ConfigError

PRICES = """
[[machine]]
name = "large"
cores = 64
memory_gib = 512
price_per_hour = 4
[[machine]]
name = "small"
cores = 16
memory_gib = 128
price_per_hour = 0.9
"""


def test_a_billion_vectors_are_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    words = ["plan", "index", "--vectors", "1e9", "--prices", str(tmp_path / "prices.toml")]
    assert command_line.main([*words, "--json"]) == 0
    large, small = json.loads(capsys.readouterr().out)["plans"]
    assert large["feature_bytes"] == 1e9 * 512 * 2
    assert large["index_bytes"] > 1e9 * 512
    assert (large["num_machines"], small["num_machines"]) == (2, 5)
    cost = large["num_machines"] * 4 / 3600 / large["queries_per_second"] * 1e6
    assert large["price_per_million"] == pytest.approx(cost)
    assert large["price_to_build"] == pytest.approx(large["build_hours"] * 8)
    assert command_line.main(words) == 0
    assert "IVF65536,SQ8" in capsys.readouterr().out


def test_a_plan_grows_with_what_is_asked() -> None:
    machine = Machine("m", 32, 256, 2.0)
    few, many = (plan_index(count, 512, 0.95, 64, machine) for count in (10**7, 10**9))
    assert few.num_machines == 1 < many.num_machines
    assert few.build_hours < many.build_hours
    assert few.queries_per_second > many.queries_per_second
    deep = plan_index(10**9, 512, 0.95, 256, machine)
    assert deep.queries_per_second < many.queries_per_second
    assert plan_index(10**7, 512, 0.3, 64, machine).index_bytes < few.index_bytes
    with pytest.raises(ConfigError, match=r"do not hold the 65,536 lists' centroids"):
        plan_index(10**9, 512, 0.95, 64, Machine("tiny", 1, 0.1))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("x = 1", "holds x; give one"),
        ('[[machine]]\nname = "a"', "machine 1 needs exactly the keys cores, memory_gib"),
        (
            PRICES.replace("cores = 16", "cores = -1"),
            "machine 2: cores, memory_gib and price_per_hour are above 0",
        ),
        ("[[", "not a readable TOML file"),
    ],
)
def test_wrong_price_tables(
    table: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prices.toml").write_text(table)
    assert (
        command_line.main(["plan", "index", "--vectors", "10", "--prices", str(tmp_path / "prices.toml")])
        == 1
    )
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["index"], "needs --vectors N"),
        (["index", "--vectors", "1.5"], "needs --vectors N"),
        (["index", "--vectors", "10", "--hardware", "A100"], "takes only --vectors"),
        (["index", "--vectors", "10", "--recall", "2"], "--recall is between 0 and 1"),
        (["index", "--vectors", "10", "--nprobe", "0"], "--nprobe are at least 1"),
        (["index", "--vectors", "10", "--dim", "0"], "--dim and --nprobe are at least 1"),
        (["demo", "--vectors", "10"], "belong to `cnclip plan index`"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


def test_energy_is_read_from_counters_that_wrap_around(tmp_path: Path) -> None:
    assert Meter([]).joules() is None
    for name in ("intel-rapl:0", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("9000000\n")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")
    found = [counter for counter in counters(str(tmp_path)) if counter.name.startswith("RAPL")]
    assert [counter.name for counter in found] == ["RAPL intel-rapl:0"]
    meter = Meter(found)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("9500000\n")
    assert meter.joules() == pytest.approx(0.5)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1000000\n")
    assert meter.joules() == pytest.approx(2.0)
