"""The model card: what these weights are, in the README.md that hubs show."""

import os
import tomllib
from collections.abc import Mapping
from typing import Any

from pipeline.core import store
from pipeline.core.files.foreign import foreign, parse_json
from training.model.config import ModelConfig, VisionTransformerConfig
from training.model.preprocess import MEAN, STD

_UNKNOWN = "not recorded in the file these weights came from"
FOLDER = "FOLDER"  # in the card's code: what the reader puts a path or a hub's id for
RESNET_CODE = "modeling_chinese_clip_resnet.py"  # in training/model, and in the folders of ResNets
RESNET_CODE_LICENCE = "apache-2.0"  # the project's, as the file says in its first line
_VIT_LINES = f"""
```python
from transformers import ChineseCLIPModel, ChineseCLIPProcessor

model = ChineseCLIPModel.from_pretrained({FOLDER})
processor = ChineseCLIPProcessor.from_pretrained({FOLDER}, backend="pil")
```
"""
_RESNET_LINES = f"""
```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained({FOLDER}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({FOLDER}, trust_remote_code=True, backend="pil")
```

transformers has no Chinese CLIP with a ResNet, so `trust_remote_code=True` is needed: the code is
`{RESNET_CODE}`, next to this file, under the license {RESNET_CODE_LICENCE}. `model` has
the methods and outputs of transformers' `ChineseCLIPModel`.
"""
# Bounded in tests/training/model/test_preprocess.py
_PIXELS = """
With `backend="pil"` the pixels are those of training. Without, transformers resizes with torchvision, which
rounds otherwise: pixels differ by up to 2 of 255, and by up to about 30 at hard edges of images that are
made smaller. A folder has no setting for this.
"""


def model_card(
    config: ModelConfig, num_parameters: int, facts: Mapping[str, str], *, for_transformers: bool = False
) -> str:
    """Return Markdown with Hugging Face's header: sizes, data, stage, samples seen, scores, inputs.

    `facts` may have `data`, `stage`, `samples_seen`, `scores` and `source`; the card says what it lacks.
    `tables` is Markdown that follows: the run's tables next to the paper's. `for_transformers` says that
    transformers loads the folder, and how its processor gives these very pixels.
    """
    vision = config.vision
    sizes = (
        f"ViT, {vision.layers} layers of width {vision.width}, patches of {vision.patch_size_px} pixels"
        if isinstance(vision, VisionTransformerConfig)
        else f"ResNet with attention pooling, blocks {vision.blocks}"
    )
    rows = {
        "Model": config.name,
        "Parameters": f"{num_parameters:,}",
        "Image tower": f"{sizes}; {vision.image_size_px} × {vision.image_size_px} pixels",
        "Text tower": f"BERT, {config.text.layers} layers of width {config.text.width},"
        f" {config.text.vocab_size:,} tokens",
        "Shared space": f"{config.embed_dim} dimensions",
        "Data": facts.get("data", _UNKNOWN),
        "Stage": facts.get("stage", _UNKNOWN),
        "Samples seen": facts.get("samples_seen", _UNKNOWN),
        "Scores": facts.get("scores", _UNKNOWN),
        "Converted from": facts.get("source", _UNKNOWN),
    }
    lines = _VIT_LINES if isinstance(vision, VisionTransformerConfig) else _RESNET_LINES
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    library = "transformers" if for_transformers else "pytorch"
    return f"""---
language: zh
library_name: {library}
pipeline_tag: zero-shot-image-classification
tags:
- clip
- chinese-clip
---

# {config.name}, Chinese CLIP

| | |
| --- | --- |
{table}

Images are turned to RGB and resized to the square (bicubic, no crop), scaled to [0, 1] and normalised by
mean {MEAN} and standard deviation {STD}. Captions are lower-cased, curly double quotes made straight, cut
into word pieces of the vocabulary next to this file, framed by [CLS] and [SEP], and cut to 52 tokens.
{lines + _PIXELS if for_transformers else ""}{facts.get("tables", "")}"""


def facts_of(path: str, recorded: Mapping[str, str]) -> dict[str, str]:
    """Return what a card can say of weights at `path`, from the file and from their run's folder.

    A run's folder is the one above the stage's: `run.resolved.toml` names the data, `report/report.json` has
    the scores of its models and the final model's tables, retrieval and classification.
    """
    facts = {"source": os.path.basename(path.rstrip("/")), **recorded}
    run = store.join(os.path.dirname(os.path.abspath(path)), "..") if store.is_local(path) else None
    if run is None or not os.path.isfile(os.path.join(run, "run.resolved.toml")):
        return facts
    settings, report = os.path.join(run, "run.resolved.toml"), os.path.join(run, "report", "report.json")
    with foreign(settings, "run's configuration", "repair or remove it"), store.open_read(settings) as file:
        corpus = tomllib.load(file).get("corpus", {})
        tables = ", ".join(table.get("name", "") for table in corpus.get("tables", []))
        facts.setdefault("data", f"{corpus.get('kind', 'tables')}{': ' if tables else ''}{tables}")
    if os.path.isfile(report):
        with foreign(report, "run's report", "make it again with --stage report --redo"):
            body = parse_json(store.read_bytes(report))
            stage = facts.get("stage", "")
            found = _scores(body.get("evaluations", {}), stage)
            if found:
                facts.setdefault("scores", found)
            is_earlier = any(name.endswith(f"/{stage}") for name in body.get("evaluations", {}))
            if not is_earlier:  # the tables are of the run's final model
                facts["tables"] = "".join(map(_table, body.get("comparisons", [])))
    return facts


def _table(comparison: Mapping[str, Any]) -> str:
    """Return one table of `report.json` in Markdown: ours with its interval, the paper's, the difference."""
    number = f"Table {comparison['number']}, " if comparison["number"] is not None else ""
    beside = f" next to {comparison['paper_model']}" if comparison["paper_model"] else ""
    rows = []
    for line in comparison["lines"]:
        ours, paper, difference = line["ours"], line["paper"], line["difference"]
        cells = (
            line["label"],
            "–" if ours is None else f"{ours['value']:.1f}",
            "–" if ours is None else f"{ours['low']:.1f} … {ours['high']:.1f}",
            "–" if paper is None else f"{paper:.1f}",
            "–" if difference is None else f"{difference['value']:+.1f}",
        )
        rows.append(f"| {' | '.join(cells)} |\n")
    notes = "".join(f"\nNote: {note}.\n" for note in comparison["notes"])
    return (
        f"\n## {number}{comparison['title']}, {comparison['setup']}{beside}\n\n"
        "| | ours | 95% interval | paper | difference |\n|---|--:|--:|--:|--:|\n"
        f"{''.join(rows)}{notes}"
    )


def _scores(evaluations: Mapping[str, Any], stage: str) -> str:
    """Return the recall of a stage's model.

    An earlier stage's stands under `name/stage`, the final one's under `name`.
    """
    earlier = {name: scores for name, scores in evaluations.items() if "/" in name}
    mine = {name: scores for name, scores in earlier.items() if name.endswith(f"/{stage}")}
    chosen = mine or {name: scores for name, scores in evaluations.items() if name not in earlier}
    return "; ".join(
        f"{name.partition('/')[0]}: "
        + ", ".join(
            f"{label} R@1/5/10 {scores[way]['r1']:.1f}/{scores[way]['r5']:.1f}/{scores[way]['r10']:.1f}"
            for way, label in (("t2i", "text to image"), ("i2t", "image to text"))
            if scores.get(way)
        )
        for name, scores in chosen.items()
    )
