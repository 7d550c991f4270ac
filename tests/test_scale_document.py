"""docs/scale.md calculates with the committed rates, and both READMEs link to it."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_rates_are_those_of_the_results() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text())["results"]
    results = {record["name"]: record.get("rows_per_cpu_second", record["ours"]) for record in found}
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    rates = re.findall(r"^\| r_\w+ \|.*\| ([\d,.]+) \S+/CPU s \| `(\S+)` \| `(\S+)` \|$", text, re.MULTILINE)
    assert len(rates) == 7
    for number, record, script in rates:
        assert float(number.replace(",", "")) == results[record], record
        assert (ROOT / script).is_file()


def test_hours_follow_from_the_formulas() -> None:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    rates = {
        name: float(number.replace(",", ""))
        for name, number in re.findall(r"^\| (r_\w+) \|.*?\| ([\d,.]+) \S+/CPU s", text, re.MULTILINE)
    }
    core_hours = {
        name: float(number.replace(",", ""))
        for name, number in re.findall(
            r"^\| ([^|]+) \| ([\d,.]+) \| [\d,.]+ \| [\d,.]+ \|$", text, re.MULTILINE
        )
    }
    for step, count, rate in (
        ("text", 5.85e9, "r_text"),
        ("download, decode", 200e6, "r_down"),
        ("images judged", 200e6, "r_image"),
        ("shards, packing", 200e6, "r_shard"),
    ):
        assert abs(core_hours[step] - count / rates[rate] / 3600) <= 0.006 * core_hours[step] + 0.05, step


def test_the_readmes_lead_to_it() -> None:
    for name in ("README.md", "README.zh-CN.md"):
        assert "(docs/scale.md)" in (ROOT / name).read_text(encoding="utf-8")
