"""What `cnclip plan` prints of training."""

import re
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.planning.requirements import hardware, next_to_the_paper, trainings_of_recipe
from training.config.recipes import fast_models
from training.flops import image_forward, muon_step, text_forward
from training.model.config import MODELS, at_size


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_every_stage_of_every_model_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, "pretrain")
    rows = [line.split() for line in said.splitlines()[1:10]]
    assert [row[:2] for row in rows] == [
        *([model, stage] for model in ("RN50", "ViT-B-16", "ViT-L-14") for stage in ("stage1", "stage2")),
        ["ViT-L-14-336", "stage2"],
        *(["ViT-H-14", stage] for stage in ("stage1", "stage2")),
    ]
    steps = {(row[0], row[1]): row[4] for row in rows}
    assert steps["ViT-B-16", "stage1"] == f"{44 * 200_000_000 // 32_768:,}"
    assert steps["ViT-L-14", "stage2"] == f"{7 * 200_000_000 // 4_608:,}"
    assert "ViT-H-14 stage1: 184 does not divide 32,768; " in said
    assert "128 or 256 ranks share evenly" in said
    assert said.count("does not divide") == 2


def test_models_beyond_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, "larger", "--hardware", "H100")
    rows = [line.split() for line in said.splitlines()[1:5]]
    assert [row[:2] for row in rows] == [
        [model, stage] for model in ("ViT-g-14", "ViT-bigG-14") for stage in ("stage1", "stage2")
    ]
    huge = [line.split() for line in plan(capsys, "pretrain", "--hardware", "H100").splitlines()[8:10]]
    assert [row[4] for row in rows] == 2 * [row[4] for row in huge]
    used = [line.split()[10] for line in said.splitlines()[7:11]]
    for row, share in zip(rows, used, strict=True):
        text = 3 * text_forward(MODELS[row[0]].text, 22)
        flops = text + image_forward(MODELS[row[0]]) * (1 if row[1] == "stage1" else 3)
        days = flops * int(row[4].replace(",", "")) * 32_768 / 989e12 / 86_400
        assert float(row[9]) == pytest.approx(days / (float(share.rstrip("%")) / 100), rel=0.02)
    assert "does not divide" not in said
    assert main(["plan", "larger", "--set", "stage1.epochs=2"]) == 2
    assert "larger is a fixed recipe without settings to override" in capsys.readouterr().err


def test_fast_trainings_stand_next_to_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, "fast").split("\n\n")
    sums = [line.split() for line in said[2].splitlines()[1:]]
    assert [row[:2] for row in sums] == [
        [model, name] for model in fast_models() for name in ("fast", "paper")
    ]
    for fast, paper in zip(sums[::2], sums[1::2], strict=True):
        for column in range(2, 6):  # steps, samples, EFLOPs, GPU-days
            assert float(fast[column].replace(",", "")) < float(paper[column].replace(",", ""))
        assert paper[6] == "100%"
    own = [line.split() for line in said[0].splitlines()[1:] if line.startswith("ViT-B-16 ")]
    (by_hand,) = [row for row in sums if row[:2] == ["ViT-B-16", "fast"]]
    steps = [int(row[4].replace(",", "")) for row in own]
    assert by_hand[2] == f"{sum(steps):,}"
    model = MODELS["ViT-B-16"]
    text = text_forward(model.text, 22)
    flops = [3 * (text + image_forward(at_size(model, side))) for side in (112, 224)]
    work = steps[0] * 32_768 * flops[0] + steps[1] * 16_384 * flops[1]
    work += sum(steps) * muon_step(model, locks_image=False)
    assert float(by_hand[4]) == pytest.approx(work / 1e18, abs=0.1)

    run = plan_of_an_absent_corpus(capsys, "fast_vit_b_16")  # without --hardware and --samples
    assert ["ViT-B-16", *by_hand[1:]] in [line.split() for line in run.splitlines()]
    assert "EFLOPs" not in plan_of_an_absent_corpus(capsys, "fast_vit_b_16", "--set=stage2.epochs=4")
    assert "EFLOPs" not in plan(capsys, "pretrain")
    tiny = plan(capsys, "fast", "--samples", "1000").split("\n\n")[2]  # of which some fill no batch
    assert {line.split()[-1] for line in tiny.splitlines() if line.startswith("ViT-L-14-336")} == {"?"}


def plan_of_an_absent_corpus(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 2
    return capsys.readouterr().out


def test_the_hardware_counts(capsys: pytest.CaptureFixture[str]) -> None:
    def days(*words: str) -> float:
        return float(plan(capsys, "pretrain", *words).splitlines()[1].split()[9].replace(",", ""))

    # two devices, one of 2.5 times the other's peak, at a fifth of a utilisation that lets nothing else count
    assert days("--hardware", "V100", "--utilisation", "0.0008") == pytest.approx(
        days("--hardware", "A100", "--utilisation", "0.004") * 312 / 125 * 5, rel=0.02
    )
    half = days("--samples", "100000000")
    assert days() == pytest.approx(2 * half, rel=0.02)
    small = plan(capsys, "pretrain", "--hardware", "V100", "--memory", "12")
    assert small.splitlines()[2].split()[7] == "128"  # RN50's stage 2 no longer fits as a whole
    assert "none fits" in plan(capsys, "pretrain", "--memory", "5")


def test_days_by_the_clock_are_gpu_days_of_all_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    for line in plan(capsys, "pretrain", "--utilisation", "0.001").splitlines()[1:10]:
        ranks, gpu_days, days = (float(line.split()[column].replace(",", "")) for column in (5, 9, 10))
        assert days * ranks == pytest.approx(gpu_days, rel=0.001)


RUN = """
[run]
folder = "/nowhere/run"
[corpus]
kind = "demo"
[model]
name = "ViT-B-16"
vocabulary = "bert-base-chinese"
[stage1]
recipe = "paper"
[stage2]
recipe = "paper"
"""


def test_the_papers_days_stand_beside_the_papers_work_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(RUN)

    def papers(*words: str, samples: str = "200000000") -> list[str]:
        said = plan(capsys, str(tmp_path / "run.toml"), "--hardware", "A100", "--samples", samples, *words)
        rows = [line.split() for line in said.splitlines() if line.startswith("ViT-B-16  ")]
        return ["".join(row[11:]) for row in rows]

    assert papers() == ["576", "384"]
    assert papers("--set=stage1.ranks=64") == ["576", "384"]  # it is the same work
    assert papers("--set=stage1.epochs=1") == ["", "384"]
    assert papers("--set=stage2.global_batch=4096") == ["576", ""]
    assert papers("--set=stage1.lock_image=false") == ["", "384"]
    assert papers(samples="20000000") == ["", ""]


def test_a_micro_batch_that_does_not_fit_is_told_one_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, "pretrain", "--hardware", "V100", "--memory", "12")
    told = "RN50 stage2: without micro_batch a rank holds its 256 samples at once, which needs "
    assert re.search(told + r"15\.\d+ of 10\.80 GiB; set micro_batch = 128", said)
    assert "RN50 stage1: without" not in said  # it fits as a whole
    own = ("demo", "--set=run.folder=/nowhere/demo", "--hardware=A100", "--memory=0.08", "--samples=3000")
    too_large = plan(capsys, *own, "--set=stage1.micro_batch=64")
    assert "tiny-rn stage1: micro_batch = 64 needs 0.09 of 0.07 GiB; micro_batch = 32 fits" in too_large
    (row,) = [line.split() for line in too_large.splitlines() if line.startswith("tiny-rn  stage1")]
    assert row[7] == "64"  # what runs
    assert "tiny-rn stage1: " not in plan(capsys, *own, "--set=stage1.micro_batch=32")


def test_memory_is_what_the_name_of_the_hardware_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Estimates assume A100 (40 GiB" in plan(capsys, "pretrain", "--hardware", "A100-SXM4-40GB")
    assert "Estimates assume A100 (20 GiB" in plan(
        capsys, "pretrain", "--hardware", "A100-40GB", "--memory", "20"
    )
    assert main(["plan", "pretrain", "--hardware", "A10G"]) == 2
    assert "--hardware A10G: unknown device; known: " in capsys.readouterr().err


def test_bfloat16_is_not_planned_in_silence_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "has no tensor cores for bfloat16"
    said = plan(capsys, "pretrain", "--hardware", "V100-SXM2-16GB")
    (note,) = [line for line in said.splitlines() if told in line]
    assert note.startswith("V100 ")
    assert '"zero1_fp16"' in note
    assert note.endswith("ViT-H-14 stage1, ViT-H-14 stage2")
    assert told not in plan(capsys, "pretrain", "--hardware", "A100")
    (tmp_path / "run.toml").write_text(RUN)
    run = (str(tmp_path / "run.toml"), "--hardware", "T4", "--set", "stage1.deepspeed=zero1_fp16")
    (note,) = [line for line in plan(capsys, *run).splitlines() if told in line]
    assert note.endswith(": ViT-B-16 stage2")
    assert told not in plan(capsys, *run, "--set", "stage2.deepspeed=zero2")


def test_finetuning(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, "finetune", "--hardware", "H100")
    assert len([line for line in said.splitlines() if line.startswith("ViT-B-16 ")]) == 4 + 2
    days = [line.split()[9:11] for line in said.splitlines() if line.startswith("RN50  ")]
    assert days[:2] == [["29.8min", "55.9s"], ["8.8min", "16.5s"]]  # no day has to be read as 0.0
    assert "ViT-B-16 coco-cn: unknown number of pairs; give --samples" in said


def test_samples_are_for_sets_whose_own_are_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    def steps(*words: str) -> dict[str, str]:
        rows = [line.split() for line in plan(capsys, "finetune", *words).splitlines()]
        return {row[1]: row[4] for row in rows if row[:1] == ["ViT-B-16"]}

    known, given = steps(), steps("--samples", "20000")
    assert (known["muge"], known["flickr30k-cn"]) == (given["muge"], given["flickr30k-cn"]) == ("391", "310")
    assert (known["coco-cn"], given["coco-cn"]) == ("?", f"{30 * 20_000 // 12_800}")


def test_the_building_of_a_cache_is_in_a_stages_days(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(RUN)

    def days(*words: str) -> float:
        hardware = ("--hardware=A100", "--utilisation=0.01", "--samples=200000000")
        said = plan(capsys, str(tmp_path / "run.toml"), *hardware, *words)
        assert ("GPU-days of a training with cached_views hold" in said) == bool(words)
        (row,) = [line.split() for line in said.splitlines() if line.startswith("ViT-B-16  stage1")]
        return float(row[9].replace(",", ""))

    one, three = (days(f"--set=stage1.cached_views={views}") for views in (1, 3))
    passes = 200_000_000 * image_forward(MODELS["ViT-B-16"]) / (0.01 * 312e12) / 86_400
    assert three - one == pytest.approx(2 * passes, rel=0.01)
    assert days() - one == pytest.approx(43 * passes, rel=0.01)  # live: 44 times, once an epoch


def test_a_warm_up_longer_than_its_training_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    short = plan(capsys, "pretrain", "--samples", "200000")
    assert (
        "ViT-B-16 stage1: warmup_steps = 5,000 is longer than the stage (268 steps), so the learning" in short
    )
    assert "warm-up" not in plan(capsys, "pretrain")


def test_a_run_shows_its_training_where_hardware_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    folder = "--set=run.folder=/nowhere/demo"
    assert "Estimates assume" not in plan(capsys, "demo", folder)
    listed = plan(capsys, "pretrain").partition("- Estimates assume")[2].splitlines()
    assert any(line.startswith("- GPU-days: ") for line in listed)
    assert max(len(line) for line in listed if line.startswith(("- ", "  "))) <= 100
    assert main(["plan", "demo", folder, "--hardware", "abacus"]) == 2
    assert capsys.readouterr().out == ""  # refused before anything is shown
    said = plan(capsys, "demo", folder, "--hardware", "A100", "--samples", "3000")
    (row,) = [line.split() for line in said.splitlines() if line.startswith("tiny-rn  stage2")]
    assert row[2:7] == ["128", "12", f"{12 * 3000 // 128}", "2", "64"]
    assert "paper's" not in said  # it did not train this
    assert "tiny-rn stage1: unknown number of pairs" in plan(capsys, "demo", folder, "--hardware", "A100")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--hardware", "abacus"), "--hardware abacus: unknown device"),
        (("--utilisation", "40"), "--utilisation 40.0: must be greater than 0 and at most 1"),
        (("--memory", "0"), "--memory 0.0: must be greater than 0 GiB"),
        (("--memory", "nan"), "--memory nan: must be greater than 0 GiB"),
        (("--tokens", "2"), "--tokens 2: must be from 3 ([CLS], one, [SEP]) to 52"),
        (("--tokens", "53"), "--tokens 53: must be from 3"),
        (("--set", "stage1.epochs=3"), "--set stage1.epochs=3: pretrain is a fixed recipe"),
        (("--samples", "0"), "--samples 0: must be greater than 0"),
    ],
)
def test_what_no_device_does_is_refused(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert main(["plan", "pretrain", *words]) == 2
    assert message in capsys.readouterr().err


def test_any_wish_about_training_plans_it(capsys: pytest.CaptureFixture[str]) -> None:
    folder = "--set=run.folder=/nowhere/demo"
    for wish in ("--samples=3000", "--utilisation=0.4", "--memory=80", "--tokens=22"):
        assert "Estimates assume A100 (80 GiB" in plan(capsys, "demo", folder, wish), wish
    for nonsense in ("--samples=0", "--utilisation=7", "--memory=-1", "--tokens=2000"):
        assert main(["plan", "demo", folder, nonsense]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert nonsense.partition("=")[0] in said.err


def test_training_is_planned_before_its_data_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where the recipe's sources are not
    assert main(["plan", "paper_corpus", "--hardware", "A100", "--samples", "200000000"]) == 2
    said = capsys.readouterr()
    (corpus,) = [line for line in said.out.splitlines() if line.startswith("corpus ")]
    assert "to do (an input is missing, see below)" in corpus
    assert "filter_text" in said.out
    (row,) = [line.split() for line in said.out.splitlines() if line.startswith("ViT-B-16  stage1")]
    assert row[4] == "268,554"
    assert said.err.startswith("error: evaluation/muge/muge-valid_imgs.tsv: no such file; ")


def test_the_training_guide_has_what_the_fast_recipes_take() -> None:
    page = (Path(__file__).parents[3] / "docs" / "guides" / "train.md").read_text(encoding="utf-8")
    pairs = next_to_the_paper(trainings_of_recipe("fast", None), hardware("A100", 0.4, None), 22)
    assert len(pairs) == 5
    for fast, paper in pairs:
        days = f"{fast.gpu_days:,.1f} | {paper.gpu_days:,.1f} | {fast.gpu_days / paper.gpu_days:.0%}"
        assert f" | {days} | {fast.flops / 1e18:,.1f} | {paper.flops / 1e18:,.1f} |" in page, fast.model
