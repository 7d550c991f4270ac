"""Loads a folder as somebody does who has transformers and not this project, in a program of its own.

`python load_with_transformers.py FOLDER COPY INPUTS OUTPUTS`: INPUTS and OUTPUTS are `.npz`; the program
saves the model into COPY and loads it from there for the second half of the outputs.
"""

import importlib.util
import os
import sys
from typing import Any


def forget_the_project() -> None:
    """Take the project off the path; an editable install has it there in every program of the environment."""
    sys.path[:] = [path for path in sys.path if not os.path.isdir(os.path.join(path, "cnclip"))]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    for name in ("cnclip", "training", "pipeline"):
        assert importlib.util.find_spec(name) is None, f"{name} is on the path"


def main(folder: str, copy: str, inputs: str, outputs: str) -> None:
    forget_the_project()
    import numpy as np
    import torch
    from PIL import Image
    from transformers import (
        AutoImageProcessor,
        AutoModel,
        AutoProcessor,
        AutoTokenizer,
        ChineseCLIPModel,
        pipeline,
    )

    torch.set_num_threads(1)
    given = np.load(inputs)
    texts = [str(text) for text in given["texts"]]
    images = [Image.fromarray(pixels) for pixels in given["pixels"]]
    found: dict[str, Any] = {}
    for place, source in (("first", folder), ("again", copy)):
        model, info = AutoModel.from_pretrained(source, trust_remote_code=True, output_loading_info=True)
        assert isinstance(model, ChineseCLIPModel)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=True, backend="pil")
        batch = processor(
            text=texts, images=images, return_tensors="pt", padding=True, truncation=True, max_length=52
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
        assert tokenizer(texts[0])["input_ids"] == _ids(batch)
        images_alone = AutoImageProcessor.from_pretrained(source, trust_remote_code=True)
        assert images_alone.size["height"] == given["side"]
        with torch.no_grad():
            everything = model(**batch, return_loss=True)
            image = model.get_image_features(pixel_values=batch["pixel_values"])
            text = model.get_text_features(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            )
        found |= {
            f"{place}_{name}": tensor.numpy()
            for name, tensor in {
                "ids": batch["input_ids"],
                "pixels": batch["pixel_values"],
                "image": image.pooler_output,
                "cells": image.last_hidden_state,
                "text": text.pooler_output,
                "image_embeds": everything.image_embeds,
                "text_embeds": everything.text_embeds,
                "logits_per_image": everything.logits_per_image,
                "loss": everything.loss,
            }.items()
        }
        if place == "first":
            model.save_pretrained(copy)
            processor.save_pretrained(copy)
            guess = pipeline("zero-shot-image-classification", model=source, trust_remote_code=True)
            scores = guess(images[0], candidate_labels=texts, hypothesis_template="{}")
            found["scores"] = np.array(
                [{one["label"]: one["score"] for one in scores}[text] for text in texts]
            )
    np.savez(outputs, **found)


def _ids(batch: Any) -> list[int]:
    """Return the first text's ids without padding."""
    row = batch["input_ids"][0]
    return [int(one) for one in row[batch["attention_mask"][0] == 1]]


if __name__ == "__main__":
    main(*sys.argv[1:])
