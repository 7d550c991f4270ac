"""`cnclip plan corpus`: its rates are the committed ones, and docs/scale.md has its numbers."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli as command_line
from pipeline.core.records import ConfigError
from pipeline.planning import corpus as planning
from pipeline.planning.corpus import Assumed, assumed, failure_rows, failures, steps, timetable

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_rates_are_those_of_the_results() -> None:
    stages, fetched = (_records(name) for name in ("data_stages.json", "fetch.json"))
    for rate, stage in (
        (planning.TABLE_ROWS, "corpus"),
        (planning.TEXT_ROWS, "filter_text"),
        (planning.DEDUP_ROWS, "dedup"),
        (planning.JUDGED, "filter_image"),
    ):
        cost = next(value["cost"] for name, value in _records("growth.json").items() if f"/{stage}@" in name)
        (few, cheap), (many, dear) = sorted((int(size), seconds) for size, seconds in cost.items())[-2:]
        assert rate == pytest.approx((many - few) / (dear - cheap), rel=0.005), stage
    assert stages["data_stages/download"]["ours"] == planning.DOWNLOADED
    checked = stages["data_stages/verify"]
    assert pytest.approx(checked["ours"] * checked["bytes_stored"], rel=0.005) == planning.HASHED_BYTES
    tls, plain = (fetched[f"fetch/{kind}/once"]["milliseconds"]["ours"] for kind in ("tls", "plain"))
    assert pytest.approx((tls - plain) / 1e3) == planning.TLS_SECONDS
    assert _records("survey.json")["survey/time@30000"]["seconds"] == planning.SURVEY_SECONDS
    default = Assumed()
    assert default.stored_bytes == stages["data_stages/download"]["bytes_stored"]
    assert default.wire_bytes == stages["data_stages/download"]["bytes_received"]


def test_a_stage_takes_as_long_as_its_tightest_bound() -> None:
    on = Assumed(request_seconds=5)
    download = next(step for step in steps(on) if step.name == "download")
    asked = 200e6 / 0.7
    assert download.bound_by == "connections"
    assert download.seconds == pytest.approx(asked * 5 / (2_048 * 10))
    cores = 200e6 / planning.DOWNLOADED + asked * 0.8 * planning.TLS_SECONDS
    assert download.core_seconds == pytest.approx(cores)
    assert download.bounds["network"] == pytest.approx(200e6 * on.wire_bytes * 8 / 10e9 / 10)
    one = steps(dataclasses.replace(on, machines=1))
    for alone, shared in zip(one, steps(on), strict=True):
        assert alone.seconds == pytest.approx(10 * shared.seconds), alone.name
    tight = steps(Assumed(busiest_host=0.5))[3]
    assert tight.bound_by == "one host"
    assert tight.seconds == pytest.approx(asked / 2 / 50 / 10)


def test_a_lost_machine_leaves_its_share_to_the_others() -> None:
    on = Assumed()
    download = steps(on)[3].seconds
    lost = next(item for item in failures(on) if "is lost" in item.name)
    assert lost.delay == pytest.approx(download / 2 * (10 / 9 - 1))
    assert next(item for item in failures(Assumed(machines=1)) if "is lost" in item.name).delay is None


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["plan", "corpus", "--set", "machines=4"]) == 0
    printed = capsys.readouterr().out
    assert "on 4 machines of 16 cores" in printed
    assert "download" in printed
    assert "machines=4" in printed
    assert command_line.main(["plan", "corpus", "--set", "machines=1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["assumed"]["machines"] == 1
    assert [step["name"] for step in document["steps"]][:2] == ["corpus", "filter_text"]
    assert any(item["delay"] is None for item in document["failures"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "machine=1"], r"--set machine: cnclip plan corpus has rows, row_bytes"),
        (["--set", "alive=2"], "--set alive=2: a share is at most 1"),
        (["--set", "rows=x"], "--set rows=x: give a number above 0"),
        (["--set", "cores=true"], "--set cores=True: give a number above 0"),
        (["--tokens", "22"], "takes only --set and --json"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["plan", "corpus", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_page_on_scale_has_these_numbers() -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for row in (*timetable(assumed([])), *failure_rows(assumed([]))):
        assert f"| {' | '.join(row)} |" in page
    for field in dataclasses.fields(Assumed):
        found = re.search(rf"^\| `{field.name}` \| ([\d,.e]+)", page, re.MULTILINE)
        assert found, field.name
        assert float(found[1].replace(",", "")) == field.default, field.name
    for record, script in re.findall(
        r"^\| .* \| `([\w/@, -]+)` \| `(benchmarks/\S+)` \|$", page, re.MULTILINE
    ):
        assert (ROOT / script).is_file()
        assert any(record in _records(path.name) for path in RESULTS.glob("*.json")), record


def test_the_readmes_lead_to_it() -> None:
    for name in ("README.md", "README.zh-CN.md"):
        assert "(docs/scale.md)" in (ROOT / name).read_text(encoding="utf-8")


def _records(name: str) -> dict[str, Any]:
    found = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return {record["name"]: record for record in found.get("results", [])} if isinstance(found, dict) else {}


def test_settings_are_read_as_the_plan_writes_them_and_may_be_no_share() -> None:
    on = assumed(["images=200,000,000", "https=0", "busiest_host=0.0", "machines=1"])
    assert (on.images, on.https) == (200_000_000, 0)
    assert "on 1 machine of 16 cores:" in planning.plan_table(on)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("rows=1,000", "rows=1,000: fewer than the 285,714,286 addresses that 200,000,000 images"),
        ("machines=2.5", "machines=2.5: give a whole number"),
        ("images=20,00", "images=20,00: give a number above 0, such as 200e6 or 200,000,000"),
        ("https=1.1", "a share is at most 1"),
        ("alive=0", "alive=0: give a number above 0"),
    ],
)
def test_impossible_settings_are_refused(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        assumed([given])
