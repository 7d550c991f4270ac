"""What a run on a GPU machine left, as records and shares; the results here stand in for a GPU's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import records

STEP = {
    "step": "steps", "name": "train_step/stage2@ViT-L-14", "ours": 1000, "peer": 300, "unit": "samples/s",
    "ratio": 3.333, "equal": True, "machine": "NVIDIA H100 80GB HBM3, 16 cores", "utilisation": 0.5,
}  # fmt: skip
SECOND_PEER = {
    **STEP, "name": "train_step/stage2/open_clip@ViT-L-14", "peer": 500, "ratio": 2.0,
    "peer_is": "open_clip_torch 3.3.0", "compiled": {"ours": True, "peer": True},
}  # fmt: skip
PROFILE = [
    {"step": "profile", "name": "profile/ViT-L-14", "ms_profiled": 100.0, "busy_ms": 90.0,
     "idle_ms_inside": 6.0},
    {"step": "profile", "name": "profile/ViT-L-14/ms a step", "matmul": 60.0, "attention": 10.0,
     "elementwise": 15.0, "layer norm": 5.0},
]  # fmt: skip


def test_records_have_the_devices_name_and_a_steps_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(*lines: dict[str, Any]) -> int:
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        monkeypatch.setattr("sys.argv", ["records", str(tmp_path), "--results", str(tmp_path)])
        return records.main()

    on_cpu = {**STEP, "machine": "AMD EPYC, 2 cores, Python 3.11.7"}
    assert write(on_cpu, STEP, SECOND_PEER, *PROFILE) == 0
    body = json.loads((tmp_path / "gpu_nvidia_h100_80gb_hbm3.json").read_text())
    assert (body["machine"], body["results"][0]["name"]) == (STEP["machine"], STEP["name"])
    assert [(row["ratio"], row["utilisation"]) for row in body["results"]] == [(3.333, 0.5), (2.0, 0.5)]
    assert body["results"][1]["compiled"]["peer"]
    assert body["results"][0].keys() == STEP.keys() - {"step", "machine"}
    assert body["shares"]["ViT-L-14"] == {
        "products": 0.6, "attention": 0.1, "memory-bound": 0.2, "host": 0.04, "idle": 0.06,
    }  # fmt: skip
    assert "| ViT-L-14 | 60% | 10% | 20% | 4% | 6% |" in capsys.readouterr().out
    for lines, why in (
        ([on_cpu, *PROFILE], "no result of a known GPU"),
        (
            [STEP, {**STEP, "machine": "NVIDIA H200, 16 cores"}],
            "results of NVIDIA H100 80GB HBM3 and NVIDIA H200",
        ),
    ):
        assert write(*lines) == 1
        assert why in capsys.readouterr().err


def test_later_runs_replace_what_they_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = [
        {"step": "data", "name": "feeder", "workers": workers, "images_per_s": 500.0} for workers in (1, 2)
    ]
    for name, lines in (
        ("first", [STEP, *rates]),
        ("second", [{**STEP, "ours": 2000}, {**rates[1], "images_per_s": 900.0}]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = [str(tmp_path / name) for name in ("first", "second")]
    monkeypatch.setattr("sys.argv", ["records", *folders, "--results", str(tmp_path)])
    assert records.main() == 0
    body = json.loads((tmp_path / "gpu_nvidia_h100_80gb_hbm3.json").read_text())
    assert [row["ours"] for row in body["results"]] == [2000]
    assert [(line["workers"], line["images_per_s"]) for line in body["observed"]] == [(1, 500.0), (2, 900.0)]


def test_steps_take_turns_and_none_waits_for_those_after_it() -> None:
    from benchmarks.gpu.steps import taking_turns

    begun = []

    def comparison(model: str, peers: int) -> Iterator[dict[str, Any]]:
        for peer in range(peers):
            begun.append((model, peer))
            yield {"model": model, "peer": peer}

    turns = taking_turns([comparison("B", 2), comparison("L", 1)])
    assert next(turns) == {"model": "B", "peer": 0}
    assert begun == [("B", 0)]
    assert [(found["model"], found["peer"]) for found in turns] == [("L", 0), ("B", 1)]
