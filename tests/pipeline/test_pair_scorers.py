"""The score stage on a run's images with mCLIP and with a trained model: resumed, refiltered, never mixed."""

import dataclasses
import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from data_prep.accounting.funnel import lost_captions
from data_prep.filters import score
from data_prep.filters.score import FilterScoreConfig, ScoreConfig
from data_prep.formats.parquet import write_table
from data_prep.formats.tar import TarWriter
from data_prep.sources.table import TableSource, describe
from pipeline import pair_scorers, runner
from pipeline.catalog import load, make_run
from pipeline.core import store
from pipeline.core.config import build
from pipeline.core.records import ConfigError, InputError
from pipeline.core.run import Run, State, make_context, manifest_path, read_manifest, survey_stage
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task
from tests.helpers.mclip_files import write_mclip
from tests.helpers.tiny_model import write_tiny_model
from training.model.clip import build_clip
from training.model.config import MODELS
from training.weights.image_tower import load_image_tower
from training.weights.weights import save_openai

CAPTIONS = [
    "一只黑色的猫",
    "两只白色的狗在草地上跑",
    "蓝色的天空下有一座山",
    "红色汽车停在路边",
    "a cat on the table",
]
NUM_ROWS = 10


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    pixels = rng.integers(0, 255, (6, 9, 3), np.uint8)
    Image.fromarray(pixels).resize((54, 36)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def one_task(config: Any, context: Context) -> list[Task]:
    return [Task("00000", {}), Task("00001", {})]


def make_corpus(config: Any, context: Context, task: Task, progress: Progress) -> Outcome:
    store.write_text(context.path(f"{task.name}.parquet"), "")
    name = "scored" if task.name == "00000" else "plain"
    source = describe(
        TableSource(
            path="x",
            name=name,
            exempt_from=config["exempt"] if name == "plain" else (),
            list_captions=config.get("list_captions") if name == "plain" else None,
        )
    )
    extra = {"tables": {f"{task.name}.parquet": source}}
    return Outcome({f"{task.name}.parquet": 1}, 1, 1, extra=extra)


def make_pictures(config: Any, context: Context, task: Task, progress: Progress) -> Outcome:
    path = f"pictures/{task.name}.tar"
    with store.publish(context.path(path)) as temporary, TarWriter(temporary) as tar:
        for number in range(NUM_ROWS):
            tar.add(f"{number}.jpg", picture(100 * int(task.name) + number))
    return Outcome({path: NUM_ROWS}, NUM_ROWS, NUM_ROWS)


def make_rows(config: Any, context: Context, task: Task, progress: Progress) -> Outcome:
    """Half of the first partition's rows have a score of their source."""
    first = int(task.name) * NUM_ROWS
    path = context.path_in("download", f"pictures/{task.name}.tar")
    data = Path(path).read_bytes()
    pictures = [picture(100 * int(task.name) + number) for number in range(NUM_ROWS)]
    table = pl.DataFrame(
        {
            "key": [f"{first + number:032x}" for number in range(NUM_ROWS)],
            "url": [f"http://a.cn/{first + number}" for number in range(NUM_ROWS)],
            "caption": [CAPTIONS[number % 5] for number in range(NUM_ROWS)],
            "source": ["scored" if task.name == "00000" else "plain"] * NUM_ROWS,
            "score": [0.3 if task.name == "00000" and number % 2 else None for number in range(NUM_ROWS)],
            "tar": [f"pictures/{task.name}.tar"] * NUM_ROWS,
            "offset_bytes": [data.index(item) for item in pictures],
            "size_bytes": [len(item) for item in pictures],
        },
        schema_overrides={"score": pl.Float32},
    )
    if config is not None and first:  # the plain source keeps several captions, where it has them
        lists = [CAPTIONS[number % 5 :] if number < 8 else None for number in range(NUM_ROWS)]
        table = table.with_columns(captions=pl.Series(lists, dtype=pl.List(pl.String)))
    write_table(table, context.path(f"kept/{task.name}.parquet"))
    return Outcome({f"kept/{task.name}.parquet": NUM_ROWS}, NUM_ROWS, NUM_ROWS)


def make(
    folder: Path,
    config: ScoreConfig,
    min_score: float | None = 0.0,
    exempt: tuple[str, ...] = (),
    drop_share: float | None = None,
    list_captions: str | None = None,
) -> Run:
    corpus = {"exempt": exempt, **({"list_captions": list_captions} if list_captions else {})}
    stages = (
        Stage("corpus", "", 1, corpus, (), one_task, make_corpus),
        Stage("download", "", 1, None, ("corpus",), one_task, make_pictures),
        Stage("filter_image", "", 1, list_captions, ("corpus", "download"), one_task, make_rows),
        Stage(
            "score", "", 1, config, ("corpus", "download", "filter_image"),
            functools.partial(score.plan, identify=pair_scorers.identify_pair),
            functools.partial(score.run, load=pair_scorers.load),
        ),
        Stage(
            "filter_score", "", 1, FilterScoreConfig(min_score=min_score, drop_share=drop_share),
            ("corpus", "filter_image", "score"), score.plan_filter, score.run_filter,
        ),
    )  # fmt: skip
    return Run(str(folder), 0, "local", 1, stages)


def execute(run: Run, redo: bool = False) -> int:
    return runner.execute(run, run.stages, redo=redo)


def scores(run: Run) -> pl.DataFrame:
    return _all_of(Path(run.folder, "score", "scores"))


def kept(run: Run) -> pl.DataFrame:
    return _all_of(Path(run.folder, "filter_score", "kept"))


def _all_of(folder: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted(folder.glob("*"))], how="diagonal")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[ScoreConfig, Any, str]:
    """A tiny mCLIP with its tiny CLIP; the package's text tower and the image weights' path."""
    pytest.importorskip("multilingual_clip")
    folder = tmp_path_factory.mktemp("encoders")
    peer = write_mclip(folder / "text")
    torch.manual_seed(3)
    model = build_clip(MODELS["tiny-vit"]).eval()
    save_openai(str(folder / "clip.pt"), model, model.config)
    config = ScoreConfig(
        text_encoder=str(folder / "text"), image_encoder=str(folder / "clip.pt"), device="cpu"
    )
    return config, peer, str(folder / "clip.pt")


def test_scores_are_the_packages_cosines(encoders: tuple[ScoreConfig, Any, str], tmp_path: Path) -> None:
    import transformers
    from torchvision.transforms import v2

    config, peer, weights = encoders
    run = make(tmp_path, config, min_score=-1.0)
    execute(run)
    found = scores(run)
    assert found["pair_score"].is_null().to_list() == [bool(n % 2) for n in range(10)] + [False] * 10
    tokenizer = transformers.XLMRobertaTokenizer.from_pretrained(str(config.text_encoder))
    tower = load_image_tower(weights)
    prepare = v2.Compose(
        [
            v2.Resize(32, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(32),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    for row in (0, 4, 13, 19):
        image = prepare(Image.open(io.BytesIO(picture(100 * (row // 10) + row % 10))).convert("RGB"))
        with torch.inference_mode():
            text = torch.nn.functional.normalize(peer([CAPTIONS[row % 5]], tokenizer))
            expected = float((text * tower.encode(image[None])).sum())
        assert found["pair_score"][row] == pytest.approx(expected, abs=1e-5)


def test_another_threshold_costs_no_second_pass(
    encoders: tuple[ScoreConfig, Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = encoders[0]
    first = make(tmp_path, config, min_score=-1.0)
    execute(first)
    everything = kept(first)
    assert everything.height == 20
    middle = float(everything["pair_score"].median())  # type: ignore[arg-type]

    def loads(_: ScoreConfig) -> Any:
        raise AssertionError("a second pass")

    monkeypatch.setattr(pair_scorers, "load", loads)
    again = make(tmp_path, config, min_score=middle)
    with pytest.raises(ConfigError, match="filter_score is stale"):
        execute(again)
    assert execute(again, redo=True) == 1
    rows = kept(again)
    assert rows.height == 13  # 5 rows with a score of their source, and the upper half of 15 with the median
    assert (rows["pair_score"].drop_nulls() >= np.float32(middle)).all()
    text, image = (digest[:16] for digest in pair_scorers.identify_pair(config))
    judged = rows.filter(pl.col("pair_score").is_not_null())
    assert set(judged["pair_text_encoder"]) == {text}
    assert set(judged["pair_image_encoder"]) == {image}
    assert rows.filter(pl.col("pair_score").is_null())["pair_text_encoder"].is_null().all()
    manifest = read_manifest(again, "filter_score")
    assert manifest is not None
    assert manifest.dropped == {"score_below_threshold": 7}
    drops = pl.concat([pl.read_parquet(p) for p in Path(again.folder, "filter_score/dropped").glob("*")])
    lowest = float(everything["pair_score"].min())  # type: ignore[arg-type]
    assert f"{lowest:.4f} < {middle}" in [
        f"{float(text.split()[0]):.4f} < {text.split()[2]}" for text in drops["detail"]
    ]
    monkeypatch.undo()
    exempt = make(tmp_path / "exempt", config, min_score=2.0, exempt=("score",))
    execute(exempt)
    assert kept(exempt)["source"].value_counts().sort("source").rows() == [("plain", 10), ("scored", 5)]


def test_each_caption_of_a_row_with_several_is_judged(
    encoders: tuple[ScoreConfig, Any, str], tmp_path: Path
) -> None:
    config = encoders[0]
    one_each = make(tmp_path / "one", config, min_score=-1.0)
    execute(one_each)
    run = make(tmp_path / "several", config, min_score=-1.0, list_captions="random")
    execute(run)
    found = scores(run)
    assert found["pair_scores"].is_null().to_list() == [True] * 10 + [False] * 8 + [True] * 2
    several = found[10:18]
    assert several["pair_score"].to_list() == several["pair_scores"].list.max().to_list()
    # The first caption of each is the one that a corpus with single captions has.
    firsts = scores(one_each)["pair_score"]
    assert several["pair_scores"].list.first().to_list() == pytest.approx(firsts[10:18].to_list(), abs=1e-5)
    assert found["pair_score"][18:].to_list() == pytest.approx(firsts[18:].to_list(), abs=1e-5)
    middle = float(several["pair_scores"].explode().median())  # type: ignore[arg-type]
    before = {
        key: dict(zip(CAPTIONS[int(key, 16) % 5 :], of_row, strict=True))
        for key, of_row in several.select("key", "pair_scores").iter_rows()
    }
    for exempt in ((), ("score",)):
        again = make(tmp_path / f"{len(exempt)}", config, middle, exempt, list_captions="random")
        execute(again)
        rows = kept(again).filter(pl.col("captions").is_not_null())
        left = {
            key: dict(zip(captions, of_row, strict=True))
            for key, captions, of_row in rows.select("key", "captions", "pair_scores").iter_rows()
        }
        high = {
            key: {text: score for text, score in of_row.items() if exempt or score >= np.float32(middle)}
            for key, of_row in before.items()
        }
        assert left == {key: of_row for key, of_row in high.items() if of_row}
        assert rows["caption"].to_list() == rows["captions"].list.first().to_list()
        lost = sum(len(before[key]) - len(of_row) for key, of_row in left.items())
        assert (lost > 0) == (not exempt)
        said = f"filter_score: rows that stay lost {lost} of their captions: score_below_threshold {lost}"
        manifest = read_manifest(again, "filter_score")
        assert manifest is not None
        assert lost_captions(manifest) == (None if exempt else said)


def test_a_share_of_the_scored_rows_goes(encoders: tuple[ScoreConfig, Any, str], tmp_path: Path) -> None:
    config = dataclasses.replace(encoders[0], rows="all")
    everything = make(tmp_path, config, min_score=-1.0)
    execute(everything)
    values = np.sort(scores(everything)["pair_score"].to_numpy())
    run = make(tmp_path, config, min_score=None, drop_share=0.4)
    assert execute(run, redo=True) == 1
    manifest = read_manifest(run, "filter_score")
    assert manifest is not None
    found = {extra["min_score"] for extra in manifest.extra.values()}
    assert len(found) == 1
    threshold = found.pop()
    assert values[8] - 0.002 <= threshold <= values[8]  # 8 of 20 rows are below the ninth
    assert manifest.dropped == {"score_below_threshold": int((values < threshold).sum())}
    assert 6 <= manifest.dropped["score_below_threshold"] <= 8
    for fields, message in (
        ({"min_score": 0.1, "drop_share": 0.1}, "not both"),
        ({"drop_share": 1.0}, "drop_share: must be less than 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(FilterScoreConfig, fields, "run.toml")


def test_a_killed_stage_goes_on_at_the_next_partition(
    encoders: tuple[ScoreConfig, Any, str], tmp_path: Path
) -> None:
    class KilledError(KeyboardInterrupt):
        pass

    done: list[str] = []

    def killed(config: ScoreConfig, context: Context, task: Task, progress: Progress) -> Outcome:
        if task.name == "00001" and len(done) == 1:
            done.append("killed")
            raise KilledError
        done.append(task.name)
        return score.run(config, context, task, progress, load=pair_scorers.load)

    run = make(tmp_path, encoders[0], min_score=-1.0)
    stages = tuple(dataclasses.replace(s, run=killed) if s.name == "score" else s for s in run.stages)
    run = dataclasses.replace(run, stages=stages)
    with pytest.raises(KilledError):
        execute(run)
    execute(run)
    assert done == ["00000", "killed", "00001"]
    other = make(tmp_path / "other", encoders[0], min_score=-1.0)
    execute(other)
    assert scores(run).equals(scores(other))


def test_other_weights_make_the_scores_stale(encoders: tuple[ScoreConfig, Any, str], tmp_path: Path) -> None:
    config = encoders[0]
    moved = tmp_path / "clip.pt"
    moved.write_bytes(Path(encoders[2]).read_bytes())
    config = dataclasses.replace(config, image_encoder=str(moved))
    run = make(tmp_path / "run", config)
    execute(run)
    assert survey_stage(run, run.stage("score")).state is State.DONE
    torch.manual_seed(9)
    model = build_clip(MODELS["tiny-vit"]).eval()
    save_openai(str(moved), model, model.config)
    assert survey_stage(run, run.stage("score")).state is State.STALE
    elsewhere = make(tmp_path / "run", dataclasses.replace(config, image_encoder=encoders[2]))
    assert survey_stage(elsewhere, elsewhere.stage("score")).state is State.DONE  # the same bytes, moved
    gelu = make(
        tmp_path / "run", dataclasses.replace(config, image_encoder=encoders[2], image_activation="gelu")
    )
    assert survey_stage(gelu, gelu.stage("score")).state is State.STALE


def test_one_of_our_models_scores_both_sides(tmp_path: Path) -> None:
    from training.encoder import load as load_encoder

    weights, vocabulary = write_tiny_model(tmp_path)
    config = ScoreConfig(model=weights, vocabulary=vocabulary, rows="all", device="cpu")
    run = make(tmp_path / "run", config, min_score=-1.0)
    execute(run)
    found = scores(run)["pair_score"]
    assert found.null_count() == 0
    encoder = load_encoder(weights, vocabulary=vocabulary, device="cpu")
    image_ND = encoder.embed_images([picture(n) for n in range(10)])
    text_ND = encoder.embed_texts([CAPTIONS[n % 5] for n in range(10)])
    np.testing.assert_allclose(found[:10].to_numpy(), (image_ND * text_ND).sum(1), atol=1e-5)
    rounded = make(tmp_path / "run", dataclasses.replace(config, precision="bf16"), min_score=-1.0)
    assert survey_stage(rounded, rounded.stage("score")).state is State.STALE
    execute(rounded, redo=True)
    off = np.abs(scores(rounded)["pair_score"].to_numpy() - found.to_numpy())
    assert 1e-5 < off.max() < 0.02


def test_pairs_are_not_mixed(encoders: tuple[ScoreConfig, Any, str], tmp_path: Path) -> None:
    run = make(tmp_path, encoders[0])
    execute(run)
    path = manifest_path(run, "score")
    text = Path(path).read_text()
    old = pair_scorers.identify_pair(encoders[0])[0][:16]
    fields = json.loads(text.replace(old, "0" * 16, 1))
    del fields["seal"]  # as of a release without seals: these are the scores of two pairs
    Path(path).write_text(json.dumps(fields))
    context = make_context(run, run.stage("filter_score"))
    assert context is not None
    with pytest.raises(ConfigError, match="scores of 2 different encoder pairs have no threshold in common"):
        score.plan_filter(FilterScoreConfig(), context)


def test_encoders_of_two_spaces_are_refused(encoders: tuple[ScoreConfig, Any, str], tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = build_clip(MODELS["tiny-rn"]).eval()
    save_openai(str(tmp_path / "other.pt"), model, model.config)
    config = dataclasses.replace(encoders[0], image_encoder=str(tmp_path / "other.pt"))
    with pytest.raises(InputError, match=r"ends in 32 dimensions, .* in 128: give the two of one pair"):
        pair_scorers.load(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give text_encoder and image_encoder, or only model"),
        ({"text_encoder": "a"}, "or only model"),
        ({"text_encoder": "a", "image_encoder": "b", "model": "c"}, "or only model"),
        ({"model": "c", "rows": "some"}, "rows"),
    ],
)
def test_score_settings(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(ScoreConfig, fields, "run.toml")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.pt: no such file or folder; correct \[score\] model"):
        pair_scorers.identify_pair(ScoreConfig(model=str(tmp_path / "none.pt")))


def test_the_catalogue_has_the_stages_where_a_run_asks_for_them(tmp_path: Path) -> None:
    plain, _ = load("demo")
    assert not {"score", "filter_score"} & {stage.name for stage in plain.stages}
    run, config = load("demo", ["score.model=model.safetensors", "filter_score.min_score=0.1"])
    names = [stage.name for stage in run.stages]
    assert names[names.index("filter_image") : names.index("shards") + 1] == [
        "filter_image", "score", "filter_score", "shards",
    ]  # fmt: skip
    assert run.stage("shards").parents == ("download", "filter_score")
    assert not run.stage("score").parallel
    ray = dataclasses.replace(config, run=dataclasses.replace(config.run, executor="ray"))
    assert make_run(ray).stage("score").parallel
    with pytest.raises(ConfigError, match=r"filter_score: nothing to judge without \[score\]"):
        load("demo", ["filter_score.min_score=0.1"])
