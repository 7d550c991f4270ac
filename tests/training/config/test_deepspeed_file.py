import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.core.records import ConfigError, Manifest
from pipeline.core.stage import Context, inputs_digest
from training.config.deepspeed_file import ZERO_KEYS, read_deepspeed_file
from training.config.train import TrainConfig
from training.stages import TrainStageConfig, plan


def shipped() -> list[str]:
    files = resources.files("deepspeed_configs").iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def test_shipped_files_are_as_they_are_named() -> None:
    plain = ["zero0", "zero1", "zero2", "zero3"]
    assert shipped() == sorted(
        [
            *plain,
            "zero1_autocast",
            "zero3_offload",
            *(f"zero{stage}_{half}" for stage in (1, 2, 3) for half in ("bf16", "fp16")),
        ]
    )
    for name in shipped():
        config = read_deepspeed_file(name)
        assert config["zero_optimization"]["stage"] == int(name[4])
        assert ("bf16" in config) == name.endswith("_bf16")
        assert ("fp16" in config) == name.endswith("_fp16")
        assert ("offload_optimizer" in config["zero_optimization"]) == name.endswith("_offload")
        assert name not in plain or config == {"zero_optimization": {"stage": int(name[4])}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"train_batch_size": 8},
            r"mine.json: train_batch_size: a DeepSpeed file holds memory, precision and",
        ),
        ({"optimizer": {"type": "AdamW"}}, r"mine.json: optimizer: "),
        ({"gradient_clipping": 1.0}, r"mine.json: gradient_clipping: "),
        ({"train_micro_batch_size_per_gpu": 1}, r"mine.json: train_micro_batch_size_per_gpu: "),
        (
            {"bf16": {"enabled": True, "check_grad_overflow": False}, "zero_optimization": {"stage": 1}},
            r"mine.json: bf16.check_grad_overflow: .* on_non_finite",
        ),
        ({"bf16": {"enabled": True}}, r"mine.json: bf16 at ZeRO stage 0 takes a wrong first Adam step"),
        (
            {"zero_optimization": {"stage": 4}},
            r"mine.json: zero_optimization.stage: found 4; must be 0, 1, 2",
        ),
        (
            {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
            r"mine.json: zero_optimization.round_robin_gradients: .* leave it out",
        ),
        ({"zero_optimization": 1}, r"mine.json: zero_optimization: found 1; must be an object"),
        ([1], r"mine.json: found list; a DeepSpeed file is one object"),
        ({"fp16": {"enabled": True}}, r"mine.json: fp16 at ZeRO stage 0 takes a wrong first Adam step"),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucketsize": 5}},
            r"zero_optimization.reduce_bucketsize: unknown to DeepSpeed; did you mean reduce_bucket_size\?",
        ),
        ({"bf16": {"enabled": "false"}}, r"mine.json: bf16.enabled: found 'false'; must be true or false"),
        (
            {"bf16": {"enabled": True}, "fp16": {"enabled": True}, "zero_optimization": {"stage": 1}},
            r"mine.json: bf16 and fp16 are enabled; a run computes in one of them",
        ),
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            r"torch_autocast.dtype: found 'float16'; must be 'bfloat16'",
        ),
    ],
)
def test_what_training_owns_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_deepspeed_file(str(path))


def test_the_keys_are_those_of_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    assert set(ZERO_KEYS) == {*fields, *(field.alias for field in fields.values() if field.alias)}


def test_a_file_that_is_not_there_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'zero9': no such file; known: zero0, zero1, zero1_autocast"):
        read_deepspeed_file("zero9")
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ConfigError, match=r"mine.json: not valid JSON"):
        read_deepspeed_file(str(tmp_path / "mine.json"))


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"gradient_clipping": 1.0}, "[stage2] {}: gradient_clipping: a DeepSpeed file holds memory, "),
        ({"optimizer": {"type": "Adam"}}, "[stage2] {}: optimizer: a DeepSpeed file holds memory, "),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "bf16 rounds the weights of batch"),
        (None, "[stage2] deepspeed = '{}': no such file; known: zero0, "),
    ],
)
def test_a_run_is_refused_before_its_first_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, content: Any, said: str
) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(json.dumps(content))
    settings = f"--set=run.folder={tmp_path / 'run'}", f"--set=stage2.deepspeed={path}"
    assert main([command, "demo", *settings]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert len(error.splitlines()) == 1
    assert said.format(path) in error
    assert not (tmp_path / "run").exists()


def test_a_changed_file_of_ones_own_makes_the_stage_stale(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    shards = Manifest("shards", 1, "", "", {}, (), 1, 1, {})
    config = TrainStageConfig(
        train=TrainConfig(epochs=1, deepspeed=str(path)),
        model="tiny-vit",
        vocabulary="vocab.txt",
        validate=False,
    )
    digests = []
    for stage in (1, 2, 1):
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        digests.append(inputs_digest(plan(config, Context(str(tmp_path), "stage1", 0, {"shards": shards}))))
    assert digests[0] == digests[2] != digests[1]
