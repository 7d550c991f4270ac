"""Writes evaluation sets in Chinese-CLIP's layout (its README, "数据集格式预处理")."""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EvaluationText:
    text: str
    image_ids: Sequence[int]  # all images that count as hits


def write_evaluation(
    folder: Path, name: str, images: Iterable[bytes], texts: Iterable[EvaluationText], urls: Iterable[str]
) -> None:
    """Write one evaluation set; image and text ids count from 0 in the given order.

    `<name>_imgs.tsv` has lines `image id, tab, base64 of the image file`; `<name>_texts.jsonl` has objects
    `{"text_id", "text", "image_ids"}`; `<name>_urls.txt` has one URL a line: where the images come from,
    so that these can be kept out of training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}_imgs.tsv", "w", encoding="ascii", newline="\n") as table:
        for image_id, image_bytes in enumerate(images):
            table.write(f"{image_id}\t{base64.b64encode(image_bytes).decode('ascii')}\n")
    with open(folder / f"{name}_texts.jsonl", "w", encoding="utf-8", newline="\n") as lines:
        for text_id, text in enumerate(texts):
            row = {"text_id": text_id, "text": text.text, "image_ids": list(text.image_ids)}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / f"{name}_urls.txt").write_text("".join(f"{url}\n" for url in urls), encoding="utf-8")
