"""A stage that starts from two published towers (appendix A.2)."""

import dataclasses
import json
from pathlib import Path

import torch

from tests.helpers.train_jobs import make_job, small_models
from training.model.clip import build_clip
from training.model.config import MODELS
from training.model.tokenizer import Tokenizer
from training.pretrain import build_model, describe
from training.weights.weights import save_openai, state_for_file


def test_both_towers_are_taken_over_and_the_text_projection_is_not(tmp_path: Path) -> None:
    MODELS.update(small_models())
    job = make_job(tmp_path, "run", model="small-vit")
    tokenizer = Tokenizer.load(job.vocabulary)
    torch.manual_seed(3)
    source = build_clip(MODELS["small-vit"], vocab_size=tokenizer.vocab_size)
    save_openai(str(tmp_path / "english.pt"), source, source.config)
    (tmp_path / "bert").mkdir()
    state = {name: value for name, value in state_for_file(source).items() if name.startswith("bert.")}
    torch.save(state, tmp_path / "bert" / "pytorch_model.bin")
    (tmp_path / "bert" / "config.json").write_text(
        json.dumps({"model_type": "bert", "num_attention_heads": 2})
    )
    started = dataclasses.replace(
        job, image_weights=str(tmp_path / "english.pt"), text_weights=str(tmp_path / "bert")
    )
    model = build_model(started, tokenizer)
    ours, theirs, new = (
        state_for_file(model),
        state_for_file(source),
        state_for_file(build_model(job, tokenizer)),
    )
    for name, value in ours.items():
        assert torch.equal(value, (new if name == "text_projection" else theirs)[name]), name
    rows = dict(
        line.split("\t")[:2] for line in (Path(job.folder) / "initial_weights.tsv").read_text().splitlines()
    )
    assert rows["text_projection"] == "initialised"
    assert rows["visual.proj"] == rows["logit_scale"] == rows["bert.embeddings.LayerNorm.weight"] == "taken"
    assert (
        describe(started, model, tokenizer)["text_weights"] != describe(job, model, tokenizer)["text_weights"]
    )
