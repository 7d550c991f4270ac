"""Reads Tux Paint's stamps: photographs and drawings with captions in many languages."""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from data_prep.corpora.packages.archives import read_members
from data_prep.corpora.packages.drawing import Source
from data_prep.corpora.pictures.items import Item, is_chinese

_ROOT = "usr/share/tuxpaint/stamps/"
_ENDINGS = (".svg", ".png", ".txt")
_GROUPS = {
    "animals": "动物",
    "clothes": "衣物",
    "food": "食物",
    "hobbies": "爱好",
    "household": "家居用品",
    "medical": "医疗",
    "military": "军事",
    "naturalforces": "自然力",
    "people": "人物",
    "plants": "植物",
    "seasonal": "节日",
    "space": "太空",
    "sports": "运动",
    "symbols": "符号",
    "town": "城镇",
    "vehicles": "交通工具",
}


def captions_of(text: str) -> tuple[str, str]:
    """Return the English and the Chinese caption of a stamp's text; one that is not there is empty."""
    english, *translations = text.splitlines() or [""]
    chinese = next((line for line in translations if line.lower().startswith("zh_cn.utf8=")), "=")
    return english.strip().rstrip("."), chinese.partition("=")[2].strip().rstrip("。.")


def read_stamps(files: Mapping[str, Path], images: str) -> Iterator[Item]:
    """Read the stamps that have a Chinese caption; the PNG if it is there as PNG and SVG."""
    found = dict(read_members(files[images], lambda path: path.startswith(_ROOT) and path.endswith(_ENDINGS)))
    for path in sorted(found):
        stem, ending = path[:-4], path[-4:]
        if ending == ".txt" or (ending == ".svg" and f"{stem}.png" in found) or f"{stem}.txt" not in found:
            continue
        english, chinese = captions_of(found[f"{stem}.txt"].decode("utf-8", "replace"))
        group = PurePosixPath(path.removeprefix(_ROOT)).parts[0]
        if english and is_chinese(chinese):
            yield Item(
                item=stem.removeprefix(_ROOT),
                name_zh=chinese,
                keywords_zh=(_GROUPS[group],) if group in _GROUPS else (),
                name_en=english,
                keywords_en=(group,),
                category_zh=_GROUPS.get(group, group),
                category_en=group,
                source=Source("svg" if ending == ".svg" else "image", found[path]),
            )
